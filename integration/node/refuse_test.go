//go:build node

package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	nri "github.com/containerd/nri/pkg/api"
	volume "github.com/kata-containers/kata-containers/src/runtime/pkg/direct-volume"
	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// wantRefusal says that an attempt was refused, and that the person at
// crictl is told why.
func (s *scene) wantRefusal(err error, reasons ...string) {
	s.Helper()
	if err == nil {
		s.Fatal("the guest must refuse this, but it went through")
	}
	for _, reason := range reasons {
		if !strings.Contains(err.Error(), reason) {
			s.Errorf("the refusal must say %q, it says: %v", reason, err)
		}
	}
}

// wantNothingSealed says that a refusal left no volume open in the guest.
func (s *scene) wantNothingSealed(pod string) {
	s.Helper()
	out, err := s.node.Inspect(s.ctx, pod, "-o", "json")
	if err != nil {
		s.Fatal(err)
	}
	if strings.Contains(out, "encrypted_disk_") {
		s.Errorf("a refused container left a mapping in the guest:\n%s", out)
	}
}

// attempt is something that a pod's author or the host tries in a pod that
// runs, and what the refusal must say.
type attempt struct {
	change  func(*Container)
	hostile func(*nri.ContainerAdjustment)
	reasons []string
}

// wantAllRefused makes each attempt in the same pod: a refusal must leave the
// way free for the next.
func (s *scene) wantAllRefused(pod Pod, attempts map[string]attempt) {
	s.Helper()
	_, device := s.disk(64 * mib)
	id := s.pod(pod)
	for name, a := range attempts {
		s.Run(name, func(t *testing.T) {
			s := &scene{T: t, ctx: s.ctx, node: s.node}
			container := sealedContainer(device)
			if a.change != nil {
				a.change(&container)
			}
			if a.hostile != nil {
				s.hostilePlugin(a.hostile)
			}
			_, err := s.node.RunContainer(s.ctx, id, pod, container)
			s.wantRefusal(err, a.reasons...)
			s.wantNothingSealed(id)
		})
	}
}

func TestGuestSealsNothingForAPodThatHasNoPolicy(t *testing.T) {
	s := newScene(t)
	pod := sealedPod("no-policy")
	pod.Policy = ""
	attempts := s.undeclared()
	attempts["the volume that its annotation asks for"] = attempt{reasons: []string{"policy"}}
	s.wantAllRefused(pod, attempts)
}

func TestGuestRefusesAContainerThatIsNotAsDeclared(t *testing.T) {
	s := newScene(t)
	attempts := s.undeclared()
	attempts["an undeclared container"] = attempt{
		change:  func(c *Container) { c.Name = "stranger" },
		reasons: []string{"stranger"},
	}
	attempts["a capability that opens devices"] = attempt{
		change:  func(c *Container) { c.Capabilities = []string{"SYS_ADMIN"} },
		reasons: []string{"SYS_ADMIN"},
	}
	attempts["a declared volume left out"] = attempt{
		change:  func(c *Container) { c.Devices = nil },
		reasons: []string{"volume_missing", "encrypted"},
	}
	for _, path := range []string{"/mnt/encrypted", "/mnt", "/mnt/encrypted/inner"} {
		attempts["the volume shadowed by a mount at "+path] = attempt{
			hostile: func(a *nri.ContainerAdjustment) {
				a.AddMount(&nri.Mount{Destination: path, Type: "tmpfs", Source: "tmpfs", Options: []string{"rw"}})
			},
			reasons: []string{path},
		}
	}
	s.wantAllRefused(sealedPod("not-as-declared"), attempts)
}

// undeclared are ways to lend a disk that no volume of a policy stands for.
func (s *scene) undeclared() map[string]attempt {
	s.Helper()
	_, device := s.disk(64 * mib)
	offered := s.directVolume(device)
	return map[string]attempt{
		"a raw device": {
			change:  func(c *Container) { c.Devices[0].ContainerPath = "/dev/raw" },
			reasons: []string{"device"},
		},
		"a direct volume": {
			change: func(c *Container) {
				c.Devices, c.Mounts = nil, []Mount{{HostPath: offered, ContainerPath: "/mnt/offered"}}
			},
			reasons: []string{"policy denies"},
		},
	}
}

// directVolume records a device as Kata's direct volumes are, as a host's CSI
// driver would, and gives the source of the bind mount that uses it.
func (s *scene) directVolume(device string) (source string) {
	s.Helper()
	source = filepath.Join(s.node.dir, fmt.Sprintf("offered-%d", s.node.files.Add(1)))
	if err := os.Mkdir(source, 0o700); err != nil {
		s.Fatal(err)
	}
	if err := volume.Add(source, fmt.Sprintf(`{"volume-type":"block","device":%q,"fstype":"ext4","metadata":{},"options":[]}`, device)); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		if err := volume.Remove(source); err != nil {
			s.Error(err)
		}
	})
	return source
}

func TestGateHoldsAgainstTheHostAndTheContainer(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	pod := sealedPod("hostile")
	id := s.pod(pod)
	container := s.start(id, pod, sealedContainer(device))

	t.Run("an exec that the policy does not list", func(t *testing.T) {
		s := &scene{T: t, ctx: s.ctx, node: s.node}
		s.exec(container, "df", "-h", "/mnt/encrypted")
		_, err := s.node.Exec(s.ctx, container, "ls", "/mnt/encrypted")
		s.wantRefusal(err, "ls")
	})
	for _, address := range []string{"1 1024", "1 1040", "local 1024", "local 1040"} {
		t.Run("a container that dials vsock "+address, func(t *testing.T) {
			s := &scene{T: t, ctx: s.ctx, node: s.node}
			out, err := s.node.Exec(s.ctx, container, append([]string{"vsockdial"}, strings.Fields(address)...)...)
			if err == nil {
				t.Errorf("the container must not talk to the gate: %s", out)
			}
		})
	}
	s.wantCallsRefused(id)
	s.exec(container, "df", "-h", "/mnt/encrypted")
}

// wantCallsRefused makes calls that no runtime makes, as any program of the
// host can.
func (s *scene) wantCallsRefused(sandbox string) {
	s.Helper()
	agent := s.dialGate(sandbox)
	spec := &kata.Spec{
		Version: "1.0.2",
		Root:    &kata.Root{Path: "/run/kata-containers/shared/containers/x/rootfs"},
		Process: &kata.Process{Args: []string{"sleep", "infinity"}, Cwd: "/", Capabilities: &kata.LinuxCapabilities{}},
		Linux: &kata.Linux{
			CgroupsPath: "/sealvol/x", Namespaces: []*kata.LinuxNamespace{{Type: "mount"}},
			Resources: &kata.LinuxResources{},
		},
		Annotations: map[string]string{
			"io.kubernetes.cri.container-type":         "container",
			"io.kubernetes.cri.container-name":         "my-container",
			"io.katacontainers.pkg.oci.container_type": "pod_container",
		},
	}
	tests := map[string]struct {
		call    func(ctx context.Context) error
		reasons []string
	}{
		"an ephemeral storage with a block source": {
			call: func(ctx context.Context) error {
				_, err := agent.CreateContainer(ctx, &kata.CreateContainerRequest{
					ContainerId: "x", ExecId: "x", OCI: spec,
					Storages: []*kata.Storage{{Driver: "ephemeral", Source: "/dev/vda", Fstype: "ext4", MountPoint: "/run/kata-containers/sandbox/ephemeral/x"}},
				})
				return err
			},
			reasons: []string{"my-container", "policy denies"},
		},
		"a second policy": {
			call: func(ctx context.Context) error {
				_, err := agent.SetPolicy(ctx, &kata.SetPolicyRequest{Policy: "package agent_policy"})
				return err
			},
			reasons: []string{"SetPolicy"},
		},
		"a second sandbox": {
			call: func(ctx context.Context) error {
				_, err := agent.CreateSandbox(ctx, &kata.CreateSandboxRequest{SandboxId: "again"})
				return err
			},
			reasons: []string{"a second CreateSandbox"},
		},
		"swap on a host device": {
			call: func(ctx context.Context) error {
				_, err := agent.AddSwap(ctx, &kata.AddSwapRequest{PCIPath: []uint32{2, 1}})
				return err
			},
			reasons: []string{"AddSwap"},
		},
		"a file copied over the volumes": {
			call: func(ctx context.Context) error {
				_, err := agent.CopyFile(ctx, &kata.CopyFileRequest{Path: "/run/sealvol/volumes/x", FileMode: 0o100644})
				return err
			},
			reasons: []string{"files are not copied"},
		},
	}
	for name, test := range tests {
		s.Run(name, func(t *testing.T) {
			s := &scene{T: t, ctx: s.ctx, node: s.node}
			s.wantRefusal(test.call(s.ctx), test.reasons...)
		})
	}
}

func TestGuestRefusesAKernelCommandLineThatOpensTheAgent(t *testing.T) {
	for _, parameter := range []string{"agent.debug_console", "agent.server_addr=vsock://-1:2024"} {
		t.Run(parameter, func(t *testing.T) {
			s := newScene(t)
			pod := sealedPod("cmdline")
			pod.Annotations["io.katacontainers.config.hypervisor.kernel_params"] = parameter
			id, err := s.node.RunPod(s.ctx, pod)
			if err == nil {
				_ = s.node.RemovePod(s.ctx, id)
			}
			key, _, _ := strings.Cut(parameter, "=")
			s.wantRefusal(err, key)
		})
	}
}

// hostilePlugin puts an NRI plugin behind ours for the rest of the test: it
// changes every container after sealvol's plugin has.
func (s *scene) hostilePlugin(change func(*nri.ContainerAdjustment)) {
	s.Helper()
	stop, err := startHostilePlugin(s.ctx, s.node.NRI(), change)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(stop)
}
