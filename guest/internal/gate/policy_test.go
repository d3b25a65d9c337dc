package gate

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/policy"
)

const realPolicy = `package agent_policy

sealed_pod := {
  "version": 1,
  "containers": {"app": {"args": ["sleep", "infinity"], "rootfs": "host"}},
  "volumes": {"data": {
    "mode": "ephemeral", "layering": "memory-tags", "suites": ["aegis128-random"], "fs_type": "ext4",
    "options": ["nosuid", "nodev"], "size": {"min": 1073741824, "max": 1073741824},
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
				{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid"}},
				{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance"}},
				{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
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
		"volume left out": func(r *agent.CreateContainerRequest) {
			r.OCI.Mounts, r.Storages = slices.Delete(r.OCI.Mounts, 1, 2), nil
		},
		"shared mounts": func(r *agent.CreateContainerRequest) { r.SharedMounts = []*agent.SharedMount{{Name: "x"}} },
		"vsock streams": func(r *agent.CreateContainerRequest) { r.StdinPort = 1027 },
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

// Each look at a disk is a walk through sysfs, and a request has room for some hundred thousand storages.
func TestHostThatNamesManyDisksHasTheGuestLookAtNoMoreThanThereAreVolumes(t *testing.T) {
	t.Parallel()
	var looks atomic.Int32
	h := start(t, withRealPolicies, func(c *Config) {
		c.Disk = func(device.Address) (device.Disk, error) { looks.Add(1); return device.Disk{Bytes: 1 << 30}, nil }
	})
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: realPolicy})
	must(t, err)
	h.sandbox().forget()
	req := sealedCreate()
	for i := range 2000 {
		s := proto.CloneOf(req.Storages[0])
		s.Source, s.MountPoint = fmt.Sprintf("02/%02x/%02x", i>>5&0x1f, i&0x1f), fmt.Sprint(s.MountPoint, i)
		req.Storages = append(req.Storages, s)
	}
	_, err = h.host.CreateContainer(soon(t), req)
	wants(t, err, codes.PermissionDenied, "(rule storages)")
	if n := looks.Load(); n > 1 {
		t.Errorf("the guest looked at %d disks for a pod with one volume", n)
	}
	h.wantJournal()
}

// What the guest sees of the disk is part of the decision, so that a disk that does not fit is refused with the policy's words.
func TestDiskThatDoesNotFitIsDeniedBeforeAnythingIsSealed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		disk device.Disk
		err  error
		rule string
	}{
		"too small": {disk: device.Disk{Bytes: 1 << 20}, rule: "device_size"},
		"read-only": {disk: device.Disk{Bytes: 1 << 30, ReadOnly: true}, rule: "device_kind"},
		"no disk":   {err: fmt.Errorf("a network card: %w", errdefs.ErrFailedPrecondition), rule: "device_kind"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t, withRealPolicies, func(cfg *Config) {
				cfg.Disk = func(device.Address) (device.Disk, error) { return c.disk, c.err }
			})
			_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: realPolicy})
			must(t, err)
			h.sandbox().forget()
			_, err = h.host.CreateContainer(soon(t), sealedCreate())
			wants(t, err, codes.PermissionDenied, "app", c.rule, "02/01")
			h.wantJournal()
		})
	}
}

// What the policy takes for a disk's address is what the guest finds disks by: no more, or one disk could pass for two, and no less.
func TestGateAndPolicyReadTheSameAddresses(t *testing.T) {
	t.Parallel()
	p, err := policy.Load(t.Context(), []byte(realPolicy))
	must(t, err)
	sources := []string{
		"", "00", "1f", "1F", "20", "02/01", "2/1", "02/01/", "/02", "02//01", "02/../01", "20/00/02", "02/01\n", strings.Repeat("01/", 7) + "01", strings.Repeat("01/", 8) + "01",
		"0:0", "00:1", "0:01", "9:9", "99:99", "199:199", "249:249", "255:255", "256:0", "0:256", "1000:1", "0:0:0:1", "0:", ":1", "-1:0", "0:1\n", "٠:١",
		"/dev/vda", "/dev/vdzzz", "/dev/vdaaaa", "/dev/vd", "/dev/vda1", "/dev/sda", "/dev/VDA", "/dev//vda", "/dev/../dev/vda", "/dev/vda\n", "vda",
	}
	for _, driver := range []string{"blk", "scsi", "mmioblk", "BLK", "virtio-blk", "blk-ccw", "nvdimm", "ephemeral", ""} {
		for _, source := range sources {
			req := sealedCreate()
			req.Storages[0].Driver, req.Storages[0].Source = driver, source
			_, parseErr := device.Parse(driver, source)
			if _, err := p.Decide(t.Context(), "CreateContainer", req, policy.State{}); (err == nil) != (parseErr == nil) {
				t.Errorf("driver %q, source %q: the policy says %v, the gate %v", driver, source, err, parseErr)
			}
		}
	}
}

// Every method that the gate lets through is one that the policy's framework knows by its name, and no other is. SetPolicy brings the
// policy; what ends containers and sandbox is nobody's to forbid.
func TestGateAndPolicyKnowTheSameMethods(t *testing.T) {
	t.Parallel()
	p := policy.Default()
	for _, m := range methods() {
		if m.in == nil || m.end || m.name == "SetPolicy" {
			continue
		}
		_, err := p.Decide(t.Context(), m.name, m.in.New().Interface(), policy.State{})
		var denial *policy.Denial
		known := !errors.As(err, &denial) || !slices.Contains(denial.Rules, "known_request")
		if known != (m.verdict != never) {
			t.Errorf("%s: the gate lets it through: %t, the policy knows it: %t", m.name, m.verdict != never, known)
		}
	}
}

func TestMethodThatThePolicyDeniesDoesNotPass(t *testing.T) {
	t.Parallel()
	deny := map[string]error{}
	for _, name := range []string{"StatsContainer", "StartContainer", "UpdateContainer", "CopyFile", "GetVolumeStats", "RemoveStaleVirtiofsShareMounts"} {
		deny[name] = fmt.Errorf("%s is not for you: %w", name, errdefs.ErrPermissionDenied)
	}
	h := start(t, func(c *Config) { c.Default = fakePolicy{deny: deny} }).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	h.forget()
	_, err := h.host.StatsContainer(soon(t), &agent.StatsContainerRequest{ContainerId: "c1"})
	wants(t, err, codes.PermissionDenied, "StatsContainer is not for you")
	wants(t, h.begin("c1"), codes.PermissionDenied, "StartContainer is not for you")
	_, err = h.host.UpdateContainer(soon(t), &agent.UpdateContainerRequest{ContainerId: "c1"})
	wants(t, err, codes.PermissionDenied, "UpdateContainer is not for you")
	_, err = h.host.CopyFile(soon(t), copyTo(filepath.Join(h.run, shareDir, "x"), unix.S_IFREG))
	wants(t, err, codes.PermissionDenied, "CopyFile is not for you")
	_, err = h.host.GetVolumeStats(soon(t), &agent.VolumeStatsRequest{VolumeGuestPath: "/run/kata-containers/sandbox/storage/0"})
	wants(t, err, codes.PermissionDenied, "GetVolumeStats is not for you")
	_, err = h.host.RemoveStaleVirtiofsShareMounts(soon(t), &agent.RemoveStaleVirtiofsShareMountsRequest{})
	wants(t, err, codes.PermissionDenied, "RemoveStale")
	h.wantJournal()
	must(t, h.remove("c1")) // an end is nobody's to forbid
}
