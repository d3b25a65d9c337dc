package gate

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

func hostileCapabilities() *agent.LinuxCapabilities {
	set := func() []string { return []string{"CAP_CHOWN", "CAP_MKNOD", "MKNOD"} }
	return &agent.LinuxCapabilities{Bounding: set(), Effective: set(), Inheritable: set(), Permitted: set(), Ambient: set()}
}

func wantNoMknod(t *testing.T, c *agent.LinuxCapabilities) {
	t.Helper()
	for _, set := range [][]string{c.Bounding, c.Effective, c.Inheritable, c.Permitted, c.Ambient} {
		if !slices.Equal(set, []string{"CAP_CHOWN"}) {
			t.Errorf("capabilities %v", c)
		}
	}
}

func TestContainerThatWouldWriteKernelSettingsMayNot(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	req := request("c1", "app", "02/01")
	req.OCI.Linux = &agent.Linux{MaskedPaths: []string{"/proc/own"}, ReadonlyPaths: []string{"/proc/sys"}}
	_, err := h.host.CreateContainer(soon(t), req)
	must(t, err)
	got := h.agent.last("CreateContainer").(*agent.CreateContainerRequest).OCI.Linux
	if d := cmp.Diff([]string{"/proc/sys", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"}, got.ReadonlyPaths); d != "" {
		t.Error(d)
	}
	if got.MaskedPaths[0] != "/proc/own" || !slices.Contains(got.MaskedPaths, "/proc/kcore") {
		t.Errorf("masked: %v", got.MaskedPaths)
	}
}

func TestContainerThatWouldMakeANodeOfAVolumesMappingMayNot(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	req := request("c1", "app", "02/01")
	req.OCI.Process = &agent.Process{Capabilities: hostileCapabilities()}
	_, err := h.host.CreateContainer(soon(t), req)
	must(t, err)
	wantNoMknod(t, h.agent.last("CreateContainer").(*agent.CreateContainerRequest).OCI.Process.Capabilities)
	must(t, h.begin("c1"))
	_, err = h.host.ExecProcess(soon(t), &agent.ExecProcessRequest{ContainerId: "c1", ExecId: "e1", Process: &agent.Process{Capabilities: hostileCapabilities()}})
	must(t, err)
	wantNoMknod(t, h.agent.last("ExecProcess").(*agent.ExecProcessRequest).Process.Capabilities)
}

func TestNodeOfAVolumesMappingInTheShareIsNoDevice(t *testing.T) {
	t.Parallel()
	h := start(t)
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s", Storages: []*agent.Storage{
		{Driver: "virtio-fs", Source: shareTag}, {Driver: "ephemeral", Source: "shm"},
	}})
	must(t, err)
	storages := h.agent.last("CreateSandbox").(*agent.CreateSandboxRequest).Storages
	if !slices.Equal(storages[0].Options, []string{"nodev"}) || storages[1].Options != nil {
		t.Errorf("storages %v", storages)
	}
	req := request("c1", "app")
	req.OCI.Mounts = []*agent.Mount{
		{Destination: "/etc/hosts", Type: "bind", Options: []string{"rbind", "ro"}},
		{Destination: "/dev", Type: "tmpfs", Options: []string{"nosuid"}},
	}
	_, err = h.host.CreateContainer(soon(t), req)
	must(t, err)
	mounts := h.agent.last("CreateContainer").(*agent.CreateContainerRequest).OCI.Mounts
	if !slices.Equal(mounts[0].Options, []string{"rbind", "ro", "nodev"}) || !slices.Equal(mounts[1].Options, []string{"nosuid"}) {
		t.Errorf("mounts %v", mounts)
	}
}

func TestPodThatIsNotSealedIsNotNarrowed(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config) { c.Default = openPolicy{} }).sandbox()
	req := request("c1", "app")
	req.OCI.Linux = &agent.Linux{}
	req.OCI.Process = &agent.Process{Capabilities: hostileCapabilities()}
	_, err := h.host.CreateContainer(soon(t), req)
	must(t, err)
	got := h.agent.last("CreateContainer").(*agent.CreateContainerRequest).OCI
	if got.Linux.ReadonlyPaths != nil || len(got.Process.Capabilities.Bounding) != 3 {
		t.Errorf("%v", got)
	}
}

type openPolicy struct{ fakePolicy }

func (openPolicy) Sealed() bool { return false }
