package gate

import (
	"context"
	"slices"
	"testing"
	"time"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sealvol/sealvol/policy/mutation"
)

// Whatever the host changes in one place of a permitted CreateContainer (the stream of the policy's own test), the gate answers, and
// seals nothing for a request that it refuses.
func TestMutatedRequestsSealNothingUnlessTheyAreAllowed(t *testing.T) {
	t.Parallel()
	h := start(t, withRealPolicies)
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: realPolicy})
	must(t, err)
	h.sandbox()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	total, allowed := 0, 0
	for m := range mutation.All(sealedCreate()) {
		// As if the container before had never been: an id is taken once.
		h.gate.mu.Lock()
		h.gate.containers, h.gate.storages = map[string]*container{}, map[string]string{}
		h.gate.mu.Unlock()
		h.forget()
		_, err := h.host.CreateContainer(ctx, m.Message.(*agent.CreateContainerRequest))
		total++
		switch {
		case err == nil:
			allowed++
			if got := h.all(); !slices.Equal(got, []string{"acquire data", "attach data", "agent CreateContainer", "detach data"}) {
				t.Errorf("%v: allowed, and happened: %q", m, got)
			}
			req := h.agent.last("CreateContainer").(*agent.CreateContainerRequest)
			at := slices.IndexFunc(req.OCI.Mounts, func(m *agent.Mount) bool { return m.Destination == "/data" })
			if at < 0 || req.OCI.Mounts[at].Source != "/run/sealvol/volumes/data" || len(req.Storages) != 0 {
				t.Errorf("%v: the agent got %v and %v", m, req.OCI.Mounts, req.Storages)
			}
		case !slices.Contains([]codes.Code{codes.PermissionDenied, codes.InvalidArgument}, status.Code(err)):
			t.Errorf("%v: refused with %v", m, err)
		case len(h.all()) != 0:
			t.Errorf("%v: refused with %v, and happened: %q", m, err, h.all())
		}
	}
	if total < 3000 || allowed == 0 {
		t.Errorf("%d mutations, %d allowed: the stream is not what it was", total, allowed)
	}
	t.Logf("%d mutations, %d allowed", total, allowed)
}
