package policy

import (
	"context"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/policy/mutation"
)

// samplePods are the requests whose mutations are tried, with the state in which they are permitted.
func samplePods(tb testing.TB) map[string]samplePod {
	live := State{Containers: map[string]string{strings.Repeat("1", 64): ""}}
	return map[string]samplePod{
		"one volume":  {load(tb, "testdata/volumes/one-volume/policy.rego"), recorded(tb, "CreateContainer", "create-container.json"), live},
		"two volumes": {load(tb, "testdata/volumes/two-volumes/policy.rego"), recorded(tb, "CreateContainer", "create-container-two-volumes.json"), live},
		"the sandbox": {load(tb, "testdata/volumes/one-volume/policy.rego"), recorded(tb, "CreateContainer", "create-container-sandbox.json"), State{}},
	}
}

type samplePod struct {
	policy  *Policy
	request proto.Message
	state   State
}

// Every change to a permitted CreateContainer in one place is denied, or on the list of what is harmless.
func TestMutatedRequestsAreDeniedOrHarmless(t *testing.T) {
	t.Parallel()
	harmless := mutation.Harmless()
	var mu sync.Mutex
	used := make([]int, len(harmless))
	total, allowed := 0, 0
	try := func(sample samplePod, m mutation.Mutation) {
		_, err := sample.policy.Decide(context.Background(), "CreateContainer", m.Message, sample.state)
		mu.Lock()
		defer mu.Unlock()
		total++
		if err != nil {
			if !errdefs.IsPermissionDenied(err) {
				t.Errorf("%v: neither allowed nor denied: %v", m, err)
			}
			return
		}
		allowed++
		i := slices.IndexFunc(harmless, func(h mutation.HarmlessChange) bool { return h.Matches(m) })
		if i < 0 {
			t.Errorf("%s: allowed, and nobody says that it is harmless", m)
			return
		}
		used[i]++
	}
	for name, sample := range samplePods(t) {
		if _, err := sample.policy.Decide(t.Context(), "CreateContainer", sample.request, sample.state); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		mutations := make(chan mutation.Mutation)
		var workers sync.WaitGroup
		for range runtime.GOMAXPROCS(0) {
			workers.Go(func() {
				for m := range mutations {
					try(sample, m)
				}
			})
		}
		n := 0
		for m := range mutation.All(sample.request) {
			// The first pod's all; of the others, which have most in common with it, every order and every third value.
			if n++; name == "one volume" || n%3 == 0 || strings.HasPrefix(m.Change, "swap") {
				mutations <- m
			}
		}
		close(mutations)
		workers.Wait()
	}
	if total < 5000 {
		t.Errorf("only %d mutations", total)
	}
	for i, h := range harmless {
		if used[i] == 0 {
			t.Errorf("no mutation is %s, so the list need not say that it is harmless", h)
		}
	}
	t.Logf("%d mutations: %d denied, %d harmless by %d reasons", total, total-allowed, allowed, len(harmless))
}
