//go:build vm

package volume

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/gate"
	"github.com/sealvol/sealvol/guest/internal/mountns"
	"github.com/sealvol/sealvol/policy"
)

// upstreamPolicy is for a pod with one emptyDir that two containers share.
const upstreamPolicy = `package agent_policy

sealed_pod := {
  "version": 1,
  "containers": {"writer": {"rootfs": "host"}, "reader": {"rootfs": "host"}},
  "volumes": {"scratch": {
    "mode": "ephemeral", "layering": "memory-tags", "suites": ["aegis128-random"], "fs_type": "ext4", "options": ["nosuid", "nodev"],
    "size": {"min": 4194304, "max": 4194304}, "fs_group": {"gid": 2000, "change_policy": "Always"},
    "mounts": [
      {"container": "writer", "path": "/scratch", "read_only": false},
      {"container": "reader", "path": "/scratch", "read_only": true}
    ]
  }}
}
`

// upstreamCreate is what Kata 4.1 sends for such a container with emptydir_mode = "block-encrypted" and its default driver, virtio-scsi
// (handleBlkOCIMounts and handleDeviceBlockVolume in virtcontainers/kata_agent.go). Storage.shared is a field that the types here do not have.
func upstreamCreate(id, name string) *agent.CreateContainerRequest {
	const point = "/run/kata-containers/sandbox/storage/MDow" // "0:0" in base64
	storage := &agent.Storage{
		Driver: "scsi", Source: "0:0", DriverOptions: []string{"encryption_key=ephemeral", "create_filesystem"},
		Fstype: "ext4", MountPoint: point, FsGroup: &agent.FSGroup{GroupId: 2000},
	}
	storage.ProtoReflect().SetUnknown([]byte("\x40\x01"))
	return &agent.CreateContainerRequest{
		ContainerId: id, ExecId: id, Storages: []*agent.Storage{storage},
		OCI: &agent.Spec{
			Process: &agent.Process{Args: []string{"sleep", "infinity"}, Cwd: "/", User: &agent.User{}, Capabilities: &agent.LinuxCapabilities{}},
			Root:    &agent.Root{Path: "/run/kata-containers/shared/containers/" + id + "/rootfs"},
			Mounts: []*agent.Mount{
				{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/scratch", Type: "bind", Source: point, Options: []string{"rbind", "rprivate", "rw"}},
				{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid"}},
				{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance"}},
				{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			},
			Annotations: map[string]string{
				"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": name,
				"io.katacontainers.pkg.oci.container_type": "pod_container",
			},
			Linux: &agent.Linux{
				CgroupsPath: "/k8s.io/" + id, Resources: &agent.LinuxResources{},
				Namespaces: []*agent.LinuxNamespace{{Type: "mount"}, {Type: "ipc"}, {Type: "uts"}},
			},
		},
	}
}

// boundAgent does of what the agent does for a container only the mount of the volume: it binds it to a folder of the container's id.
// Options of the mount are not its affair.
type boundAgent struct {
	agent.AgentServiceService // the methods that nobody calls here
	dir                       string
}

func (boundAgent) SetPolicy(context.Context, *agent.SetPolicyRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (boundAgent) CreateSandbox(context.Context, *agent.CreateSandboxRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (a boundAgent) CreateContainer(_ context.Context, r *agent.CreateContainerRequest) (*emptypb.Empty, error) {
	if len(r.Storages) != 0 {
		return nil, fmt.Errorf("the agent would mount %v", r.Storages)
	}
	to := filepath.Join(a.dir, r.ContainerId)
	if err := os.Mkdir(to, 0o755); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, unix.Mount(r.OCI.Mounts[1].Source, to, "", unix.MS_BIND|unix.MS_REC, "")
}

func (a boundAgent) RemoveContainer(_ context.Context, r *agent.RemoveContainerRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, unix.Unmount(filepath.Join(a.dir, r.ContainerId), 0)
}

// noProcesses are the containers of that agent.
type noProcesses struct{}

func (noProcesses) Alive(string) (bool, error)          { return false, nil }
func (noProcesses) Check(string, []mountns.Mount) error { return nil }
func (noProcesses) Usage(string, mountns.Mount) (space, inodes mountns.Usage, err error) {
	return space, inodes, nil
}

// A cluster that uses Kata's own switch changes its guest image and nothing else: its requests reach the real gate, policy and sealing,
// on a disk of Kata's default driver.
func TestVMUpstreamsEncryptedEmptyDirIsSealed(t *testing.T) {
	m := newVM(t)
	bound := boundAgent{dir: t.TempDir()}
	call := upstreamGate(t, m, bound)
	ctx := timeout(t, time.Minute)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := call.SetPolicy(ctx, &agent.SetPolicyRequest{Policy: upstreamPolicy})
	do(err)
	_, err = call.CreateSandbox(ctx, &agent.CreateSandboxRequest{SandboxId: "sandbox"})
	do(err)
	create := func(id, name string) {
		t.Helper()
		_, err := call.CreateContainer(ctx, upstreamCreate(id, name))
		do(err)
	}
	remove := func(id string) {
		t.Helper()
		_, err := call.RemoveContainer(ctx, &agent.RemoveContainerRequest{ContainerId: id})
		do(err)
	}
	in := func(id string) string { return filepath.Join(bound.dir, id, "needle.py") }
	want := content("needle", 128)

	create("w1", "writer")
	write(t, in("w1"), want)
	if group, err := os.Stat(filepath.Dir(in("w1"))); err != nil || group.Sys().(*syscall.Stat_t).Gid != 2000 {
		t.Errorf("the volume's root: %v, %v; want the pod's fsGroup", group, err)
	}
	create("r1", "reader")
	if got, err := os.ReadFile(in("r1")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the second container of the pod does not see what the first wrote: %v", err)
	}
	remove("w1")
	remove("r1")
	create("w2", "writer")
	dropCaches(t)
	if failed := verify(t, in("w2"), want); failed != nil {
		t.Errorf("blocks %v are lost after the containers' restart", failed)
	}
	remove("w2")

	disk := read(t, host(t, onSCSI), 0, smallBytes)
	for _, plain := range []string{"plaintext of", "needle", "lost+found", "LUKS"} {
		if bytes.Contains(disk, []byte(plain)) {
			t.Errorf("the host's file shows %q", plain)
		}
	}
	if status := m.Status()[0]; status.Suite != "aegis128-random" || status.Layering != "memory-tags" {
		t.Errorf("sealed by %s, %s; the policy decides that", status.Layering, status.Suite)
	}
}

// upstreamGate is a gate between the host, whose client it returns, and that agent, with the real policy and the real volumes.
func upstreamGate(t *testing.T, volumes *Manager, service agent.AgentServiceService) agent.AgentServiceService {
	t.Helper()
	dir := t.TempDir()
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	agent.RegisterAgentServiceService(server, service)
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	toAgent, toGate := listen("agent"), listen("gate")
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 2)
	go func() { served <- server.Serve(ctx, toAgent) }()
	g, err := gate.New(ctx, gate.Config{
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "agent"))
		},
		Load:       func(ctx context.Context, text []byte) (gate.Policy, error) { return policy.Load(ctx, text) },
		Default:    policy.Default(),
		Origin:     gate.Origin{Source: gate.FromImage},
		Volumes:    volumes,
		Namespaces: noProcesses{},
		Disk:       func(address device.Address) (device.Disk, error) { return device.Find("/sys", address) },
		Inspect:    func() error { return nil },
		Run:        filepath.Join(dir, "run"),
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() { served <- g.Serve(ctx, toGate) }()
	conn, err := net.Dial("unix", filepath.Join(dir, "gate"))
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() {
		client.Close()
		cancel()
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		server.Close()
		<-served
		<-served
	})
	return agent.NewAgentServiceClient(client)
}
