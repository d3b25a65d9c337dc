package author

import (
	"testing"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/sealvol/sealvol/policy"
)

// What the tool lets pass the guest must allow, and what it refuses the guest would: the lists of both are one.
func TestTheToolRefusesWhatTheGuestDoes(t *testing.T) {
	t.Parallel()
	p, request := talksPod(t)
	judge := func(change func(*agent.CreateContainerRequest)) error {
		req := message(t, "CreateContainer", request).(*agent.CreateContainerRequest)
		change(req)
		_, err := p.Decide(t.Context(), "CreateContainer", req, policy.State{})
		return err
	}
	capability := func(name string) error {
		return judge(func(r *agent.CreateContainerRequest) {
			r.OCI.Process.Capabilities.Bounding = append(r.OCI.Process.Capabilities.Bounding, "CAP_"+name)
		})
	}
	for _, name := range defaultCapabilities {
		if err := capability(name); err != nil {
			t.Errorf("the tool lets capability %s pass: %v", name, err)
		}
	}
	for _, name := range []string{
		"AUDIT_CONTROL", "AUDIT_READ", "BLOCK_SUSPEND", "BPF", "CHECKPOINT_RESTORE", "DAC_READ_SEARCH", "IPC_LOCK", "IPC_OWNER", "LEASE",
		"LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "NET_ADMIN", "NET_BROADCAST", "PERFMON", "SYSLOG", "SYS_ADMIN", "SYS_BOOT", "SYS_MODULE",
		"SYS_NICE", "SYS_PACCT", "SYS_PTRACE", "SYS_RAWIO", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "WAKE_ALARM",
	} {
		if err := capability(name); !errdefs.IsPermissionDenied(err) {
			t.Errorf("the tool refuses capability %s and the guest must, got %v", name, err)
		}
	}
	sysctl := func(name string) error {
		return judge(func(r *agent.CreateContainerRequest) { r.OCI.Linux.Sysctl = map[string]string{name: "1"} })
	}
	for _, name := range safeSysctls {
		if err := sysctl(name); err != nil {
			t.Errorf("the tool lets sysctl %s pass: %v", name, err)
		}
	}
	if err := sysctl("kernel.core_pattern"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("the tool refuses other sysctls and the guest must, got %v", err)
	}
	for what, change := range map[string]func(*agent.CreateContainerRequest){
		"a shared process namespace": func(r *agent.CreateContainerRequest) { r.SandboxPidns = true },
		"a user namespace": func(r *agent.CreateContainerRequest) {
			r.OCI.Linux.UIDMappings = []*agent.LinuxIDMapping{{HostID: 1 << 16, Size: 1 << 16}}
		},
		"a device": func(r *agent.CreateContainerRequest) {
			r.OCI.Linux.Devices = []*agent.LinuxDevice{{Path: "/dev/nvidia0", Type: "c", Major: 195}}
		},
		"a termination file elsewhere": func(r *agent.CreateContainerRequest) {
			for _, m := range r.OCI.Mounts {
				if m.Destination == "/dev/termination-log" {
					m.Destination = "/end"
				}
			}
		},
	} {
		if err := judge(change); !errdefs.IsPermissionDenied(err) {
			t.Errorf("the tool refuses %s and the guest must, got %v", what, err)
		}
	}
}
