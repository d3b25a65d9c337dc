package policy

import (
	"context"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/policy/mutation"
)

// harmless are the changes to a permitted CreateContainer that are permitted too, each with the reason. A mutation's name is matched whole;
// mounts are named by their destinations.
var harmless = []struct{ name, reason string }{
	{`storages\[\d+\]\.(fstype|options).*`, "the gate drops the storage: file system and options come from the policy"},
	{`storages\[\d+\]\.source = "0[23]/0[0-9]"`, "the host lends what disk it likes, and it is sealed; a volume that has one keeps it (device_bound)"},
	{`storages\[\d+\] swap with the next`, "mounts find their storages by mount point, not by place"},
	{`OCI\.Mounts\[.*\] swap with the next`, "no volume lies on, above or below another mount, so the order hides nothing of one; CRI's own mounts hide only CRI's own"},
	{`OCI\.Mounts\[/mnt/[a-z]+\]\.options.*`, "the gate writes a volume's options, from the policy"},
	{`OCI\.Mounts\[/sys/fs/cgroup\] drop`, "it shows limits; without it the container sees less"},
	{`OCI\.Mounts\[/dev/shm\] drop`, "then it is a folder of the container's own /dev"},
	{`OCI\.Mounts\[/etc/(hosts|hostname|resolv.conf)\] drop`, "they are the host's files; without them it is the root file system's"},
	{`OCI\.Mounts\[/etc/(hosts|hostname|resolv.conf)\]\.source .*`, "they are the host's files, under whatever name in the share, and nothing but files of the share"},
	{`OCI\.Mounts\[.*\]\.options(\[\d+\])? (double|swap with the next)`, "options are a set"},
	{`OCI\.Mounts\[(/dev|/dev/pts|/sys/fs/cgroup)\]\.options\[\d+\] drop`, "what must be there is; a size, a mode and when access times are written are no protection"},
	{`OCI\.Mounts\[(/etc/[a-z.]+|/dev/shm)\]\.options(\[\d+\])? (drop|= "(bind|private)"|add "bind")`, "any way to bind that does not propagate is as good"},
	{`OCI\.Process\.Env.*`, "the environment is the host's choice (SECURITY.md)"},
	{`OCI\.Process\.User.*`, "the user is the host's choice (SECURITY.md); it has CRI's default capabilities at most"},
	{`OCI\.Process\.Cwd .*`, "the working directory is the host's choice (SECURITY.md), inside of the container"},
	{`OCI\.Process\.(Terminal|ConsoleSize) .*`, "how a terminal looks"},
	{`OCI\.Process\.NoNewPrivileges .*`, "the bounding set holds either way"},
	{`OCI\.Process\.ApparmorProfile .*`, "containerd sets it for the node; Kata's guests have no AppArmor"},
	{`OCI\.Process\.OOMScoreAdj .*`, "which process dies first: refusing service is the host's right"},
	{`OCI\.Process\.Capabilities\.[A-Za-z]+.* (drop|drop all|double|swap with the next)`, "less, or the same set, of CRI's default"},
	{`OCI\.Root\.Readonly .*`, "the root file system is the host's"},
	{`OCI\.(Version|Hostname) .*`, "names that decide nothing"},
	{`OCI\.Hooks = \{\}`, "no hook"},
	{`OCI\.Annotations\["io\.kubernetes\.cri\.(sandbox-|podsandbox\.|x).*`, "what CRI says about itself; the agent reads none of it"},
	{`OCI\.Annotations\["nerdctl/.*`, "what containerd says about itself; the agent reads none of it"},
	{`OCI\.Annotations\["io\.kubernetes\.cri\.image-name"\] .*`, "of a container whose image the policy does not pin, or the sandbox container, whose program is /pause"},
	{`OCI\.Annotations\["io\.katacontainers\.pkg\.oci\.bundle_path"\] .*`, "a path of the host; the agent makes its own"},
	{`OCI\.Process\.Args.*`, "of a container whose arguments the policy does not pin, which the guest logs"},
	{`OCI\.Linux\.Resources.*`, "limits are the host's, and refusing service its right; what of them becomes a file's name or text is checked"},
	{`OCI\.Linux\.CgroupsPath .*`, "where the limits are; it ends in the container's id, by which the gate finds it, and does not climb"},
	{`OCI\.Linux\.Namespaces\[\d+\] (swap with the next|drop)`, "ipc and uts are the pod's to share (SECURITY.md); its own mount namespace is required"},
	{`OCI\.Linux\.(MaskedPaths|ReadonlyPaths).*`, "paths below /proc and /sys alone; the gate adds those that CRI has"},
}

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
	patterns := make([]*regexp.Regexp, len(harmless))
	for i, h := range harmless {
		patterns[i] = regexp.MustCompile(`^(` + h.name + `)$`)
	}
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
		name := byDestination(m, sample.request)
		i := slices.IndexFunc(patterns, func(p *regexp.Regexp) bool { return p.MatchString(name) })
		if i < 0 {
			t.Errorf("%s: allowed, and nobody says that it is harmless", name)
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
			t.Errorf("no mutation is %s, so the list need not say that it is harmless", h.name)
		}
	}
	t.Logf("%d mutations: %d denied, %d harmless by %d reasons", total, total-allowed, allowed, len(harmless))
}

// byDestination is a mutation's name with a mount's destination in place of its index.
func byDestination(m mutation.Mutation, original proto.Message) string {
	name := m.String()
	for i, mount := range original.(*agent.CreateContainerRequest).OCI.Mounts {
		if rest, ok := strings.CutPrefix(name, "OCI.Mounts["+strconv.Itoa(i)+"]"); ok {
			return "OCI.Mounts[" + mount.Destination + "]" + rest
		}
	}
	return strings.ReplaceAll(name, "\n", `\n`)
}
