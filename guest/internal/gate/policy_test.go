package gate

import (
	"context"
	"testing"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"

	"github.com/sealvol/sealvol/policy"
)

const realPolicy = `package agent_policy

sealed_pod := {
  "version": 1,
  "containers": {"app": {"args": ["sleep", "infinity"], "rootfs": "host"}},
  "volumes": {"data": {
    "mode": "ephemeral", "layering": "memory-tags", "suites": ["aegis128-random"], "fs_type": "ext4",
    "options": ["nosuid", "nodev"], "size": {"min": 0, "max": 1073741824},
    "mounts": [{"container": "app", "path": "/data", "read_only": false}]
  }}
}
`

// sealedCreate is a request that realPolicy allows.
func sealedCreate() *agent.CreateContainerRequest {
	const share = "/run/kata-containers/shared/containers/"
	const point = "/run/kata-containers/sandbox/storage/MDIvMDE="
	return &agent.CreateContainerRequest{
		ContainerId: "c1", ExecId: "c1",
		Storages: []*agent.Storage{{Driver: "blk", Source: "02/01", Fstype: "ext4", MountPoint: point}},
		OCI: &agent.Spec{
			Process: &agent.Process{Args: []string{"sleep", "infinity"}, Cwd: "/", User: &agent.User{}, Capabilities: &agent.LinuxCapabilities{}},
			Root:    &agent.Root{Path: share + "c1/rootfs"},
			Mounts: []*agent.Mount{
				{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/data", Type: "bind", Source: point, Options: []string{"rbind", "rw"}},
			},
			Annotations: map[string]string{
				"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "app",
				"io.katacontainers.pkg.oci.container_type": "pod_container",
			},
			Linux: &agent.Linux{
				CgroupsPath: "/k8s.io/c1", Resources: &agent.LinuxResources{},
				Namespaces: []*agent.LinuxNamespace{{Type: "mount"}, {Type: "ipc"}, {Type: "uts"}},
			},
		},
	}
}

// withRealPolicies makes the gate load what the host brings as the guest does.
func withRealPolicies(c *Config) {
	c.Default = policy.Default()
	c.Load = func(ctx context.Context, text []byte) (Policy, error) { return policy.Load(ctx, text) }
}

func TestRealPolicyCarriesASealedContainerThrough(t *testing.T) {
	t.Parallel()
	h := start(t, withRealPolicies)
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: realPolicy})
	must(t, err)
	h.sandbox()
	_, err = h.host.CreateContainer(soon(t), sealedCreate())
	must(t, err)
	got := h.agent.last("CreateContainer").(*agent.CreateContainerRequest)
	if m := got.OCI.Mounts[1]; m.Source != "/run/sealvol/volumes/data" || len(got.Storages) != 0 {
		t.Errorf("the agent got %v and %v", m, got.Storages)
	}
	must(t, h.begin("c1"))
	_, err = h.host.ExecProcess(soon(t), &agent.ExecProcessRequest{ContainerId: "c1", ExecId: "e", Process: &agent.Process{Args: []string{"sh"}}})
	wants(t, err, codes.PermissionDenied, "sh")
	must(t, h.remove("c1"))
}

// Without a policy the container may run, but nothing is sealed for it.
func TestNoPolicyNoVolume(t *testing.T) {
	t.Parallel()
	h := start(t, withRealPolicies).sandbox()
	h.forget()
	_, err := h.host.CreateContainer(soon(t), sealedCreate())
	wants(t, err, codes.PermissionDenied)
	h.wantJournal()
}

func TestRealPolicyDeniesBeforeAnythingIsSealed(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*agent.CreateContainerRequest){
		"ephemeral storage with a block source": func(r *agent.CreateContainerRequest) { r.Storages[0].Driver = "ephemeral" },
		"a raw device":                          func(r *agent.CreateContainerRequest) { r.Devices = []*agent.Device{{Type: "blk", Id: "02/02"}} },
		"our own directory as a source": func(r *agent.CreateContainerRequest) {
			r.OCI.Mounts = append(r.OCI.Mounts, &agent.Mount{Destination: "/x", Type: "bind", Source: "/run/sealvol/volumes/data", Options: []string{"rbind"}})
		},
		"volume left out": func(r *agent.CreateContainerRequest) { r.OCI.Mounts, r.Storages = r.OCI.Mounts[:1], nil },
		"shared mounts":   func(r *agent.CreateContainerRequest) { r.SharedMounts = []*agent.SharedMount{{Name: "x"}} },
		"vsock streams":   func(r *agent.CreateContainerRequest) { r.StdinPort = 1027 },
		"guest's mount namespace": func(r *agent.CreateContainerRequest) {
			r.OCI.Linux.Namespaces = r.OCI.Linux.Namespaces[1:]
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t, withRealPolicies)
			_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: realPolicy})
			must(t, err)
			h.sandbox().forget()
			req := sealedCreate()
			change(req)
			_, err = h.host.CreateContainer(soon(t), req)
			wants(t, err, codes.PermissionDenied, "app")
			h.wantJournal()
		})
	}
}
