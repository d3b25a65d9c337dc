//go:build node

package node

import (
	"context"
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

func TestGuestRefusesWhatThePolicyDoesNotSay(t *testing.T) {
	tests := map[string]struct {
		policy  func(string) string
		pod     func(*Pod)
		change  func(*Container)
		reasons []string
	}{
		"no policy": {
			policy:  func(string) string { return "" },
			reasons: []string{"policy"},
		},
		"a policy that names another container": {
			policy:  func(p string) string { return strings.ReplaceAll(p, "my-container", "her-container") },
			reasons: []string{"my-container"},
		},
		"a policy that names another path": {
			policy:  func(p string) string { return strings.ReplaceAll(p, "/mnt/encrypted", "/mnt/elsewhere") },
			reasons: []string{"/mnt/"},
		},
		"a policy that names other arguments": {
			policy:  func(p string) string { return strings.Replace(p, `"infinity"`, `"1"`, 1) },
			reasons: []string{"args"},
		},
		"an undeclared container": {
			change:  func(c *Container) { c.Name = "stranger" },
			reasons: []string{"stranger"},
		},
		"a declared volume left out": {
			pod:     func(p *Pod) { p.Annotations = nil },
			change:  func(c *Container) { c.Devices = nil },
			reasons: []string{"encrypted"},
		},
		"a raw block device that no volume names": {
			pod:     func(p *Pod) { p.Annotations = nil },
			reasons: []string{"device"},
		},
		"a container with a capability that opens devices": {
			change:  func(c *Container) { c.Capabilities = []string{"SYS_ADMIN"} },
			reasons: []string{"SYS_ADMIN"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			_, device := s.disk(64 * mib)
			pod := sealedPod("refused")
			if test.policy != nil {
				pod.Policy = test.policy(pod.Policy)
			}
			if test.pod != nil {
				test.pod(&pod)
			}
			container := sealedContainer(device)
			if test.change != nil {
				test.change(&container)
			}
			id := s.pod(pod)
			_, err := s.node.RunContainer(s.ctx, id, pod, container)
			s.wantRefusal(err, test.reasons...)
			s.wantNothingSealed(id)
		})
	}
}

func TestGuestRefusesADirectVolumeThatThePolicyDoesNotName(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	const source = "/run/sealvol-node/offered"
	if err := os.MkdirAll(source, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := volume.Add(source, `{"volume-type":"block","device":"`+device+`","fstype":"ext4","metadata":{},"options":[]}`); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := volume.Remove(source); err != nil {
			t.Error(err)
		}
	})
	for name, pod := range map[string]Pod{"sealed": sealedPod("offered-1"), "without a policy": {Name: "offered-2"}} {
		pod.Annotations = nil
		id := s.pod(pod)
		_, err := s.node.RunContainer(s.ctx, id, pod, Container{
			Name: "my-container", Args: []string{"sleep", "infinity"},
			Mounts: []Mount{{HostPath: source, ContainerPath: "/mnt/offered"}},
		})
		if err == nil {
			t.Errorf("%s: a block storage reached a container though no policy names it", name)
			continue
		}
		s.wantRefusal(err, "storage")
		s.wantNothingSealed(id)
	}
}

func TestGuestRefusesAVolumeThatALaterMountShadows(t *testing.T) {
	for _, path := range []string{"/mnt/encrypted", "/mnt", "/mnt/encrypted/inner"} {
		t.Run(strings.ReplaceAll(path, "/", "_"), func(t *testing.T) {
			s := newScene(t)
			_, device := s.disk(64 * mib)
			pod := sealedPod("shadowed")
			id := s.pod(pod)
			s.hostilePlugin(func(a *nri.ContainerAdjustment) {
				a.AddMount(&nri.Mount{Destination: path, Type: "tmpfs", Source: "tmpfs", Options: []string{"rw"}})
			})
			_, err := s.node.RunContainer(s.ctx, id, pod, sealedContainer(device))
			s.wantRefusal(err, path)
			s.wantNothingSealed(id)
		})
	}
}

func TestGuestRefusesWhatOnlyAHostileRuntimeSends(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	pod := sealedPod("hostile")
	id := s.pod(pod)
	s.start(id, pod, sealedContainer(device))
	agent := s.dialGate(id)

	spec := &kata.Spec{
		Version: "1.0.2",
		Root:    &kata.Root{Path: "/run/kata-containers/shared/containers/x/rootfs"},
		Process: &kata.Process{Args: []string{"sleep", "infinity"}, Cwd: "/"},
		Linux:   &kata.Linux{CgroupsPath: "/sealvol/x", Namespaces: []*kata.LinuxNamespace{{Type: "mount"}}},
		Annotations: map[string]string{
			"io.kubernetes.cri.container-type": "container",
			"io.kubernetes.cri.container-name": "my-container",
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
			reasons: []string{"my-container"},
		},
		"a second policy": {
			call: func(ctx context.Context) error {
				_, err := agent.SetPolicy(ctx, &kata.SetPolicyRequest{Policy: "package agent_policy"})
				return err
			},
			reasons: []string{"policy"},
		},
		"a second sandbox": {
			call: func(ctx context.Context) error {
				_, err := agent.CreateSandbox(ctx, &kata.CreateSandboxRequest{SandboxId: "again"})
				return err
			},
			reasons: []string{"sandbox"},
		},
		"swap on a host device": {
			call: func(ctx context.Context) error {
				_, err := agent.AddSwap(ctx, &kata.AddSwapRequest{PCIPath: []uint32{2, 1}})
				return err
			},
			reasons: []string{"AddSwap"},
		},
		"a file copied out of the share": {
			call: func(ctx context.Context) error {
				_, err := agent.CopyFile(ctx, &kata.CopyFileRequest{Path: "/run/sealvol/volumes/x", FileMode: 0o100644})
				return err
			},
			reasons: []string{"CopyFile"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inner := &scene{T: t, ctx: s.ctx, node: s.node}
			inner.wantRefusal(test.call(s.ctx), test.reasons...)
		})
	}
}

func TestExecRunsOnlyWhatThePolicyLists(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	pod := sealedPod("exec")
	container := s.start(s.pod(pod), pod, sealedContainer(device))
	s.exec(container, "df", "-h", "/mnt/encrypted")
	_, err := s.node.Exec(s.ctx, container, "ls", "/mnt/encrypted")
	s.wantRefusal(err, "ls")
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

func TestContainerCannotReachTheGateOverVsock(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	pod := sealedPod("dialer")
	container := s.start(s.pod(pod), pod, sealedContainer(device))
	for _, cid := range []string{"1", "local"} {
		for _, port := range []string{"1024", "1040"} {
			if out, err := s.node.Exec(s.ctx, container, "vsockdial", cid, port); err == nil {
				t.Errorf("a container talked to port %s of CID %s: %s", port, cid, out)
			}
		}
	}
}

// hostilePlugin puts an NRI plugin behind ours for the rest of the test: it
// changes every container after sealvol's plugin has.
func (s *scene) hostilePlugin(change func(*nri.ContainerAdjustment)) {
	s.Helper()
	stop, err := startHostilePlugin(s.ctx, filepath.Join(s.node.dir, "nri.sock"), change)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(stop)
}
