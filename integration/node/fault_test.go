//go:build node

package node

import (
	"syscall"
	"testing"
	"time"
)

func TestKillingThePluginLeavesRunningContainersRunning(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	pod := sealedPod("plugin-killed")
	id := s.pod(pod)
	container := s.start(id, pod, sealedContainer(device))
	if err := s.node.KillPlugin(); err != nil {
		t.Fatal(err)
	}
	s.exec(container, "sh", "-c", "echo alive > /mnt/encrypted/f && sync")

	_, err := s.node.RunContainer(s.ctx, id, pod, Container{Name: "late", Args: []string{"true"}})
	s.wantRefusal(err, "sealvol")

	if err := s.node.StartPlugin(s.ctx); err != nil {
		t.Fatal(err)
	}
	if got := s.exec(container, "cat", "/mnt/encrypted/f"); got != "alive" {
		t.Errorf("the volume must be as it was, got %q", got)
	}
}

func TestKillingContainerdLeavesRunningContainersRunning(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	pod := sealedPod("containerd-killed")
	container := s.start(s.pod(pod), pod, sealedContainer(device))
	s.exec(container, "sh", "-c", "echo alive > /mnt/encrypted/f && sync")
	if err := s.node.KillContainerd(); err != nil {
		t.Fatal(err)
	}
	if err := s.node.StartContainerd(s.ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.node.AwaitPlugin(s.ctx); err != nil {
		t.Fatal(err)
	}
	if got := s.exec(container, "cat", "/mnt/encrypted/f"); got != "alive" {
		t.Errorf("the volume must be as it was, got %q", got)
	}
}

// TestKillingAnyProcessOfAPodEndsThePod kills one process of a running pod.
// The pod's end must be what the stock shim's users know, without residue.
func TestKillingAnyProcessOfAPodEndsThePod(t *testing.T) {
	for _, victim := range []string{"containerd-shim-kata-sealvol-v2", "containerd-shim-kata-v2", "qemu-system-x86_64"} {
		t.Run(victim, func(t *testing.T) {
			s := newScene(t)
			_, device := s.disk(64 * mib)
			pod := sealedPod("killed")
			id := s.pod(pod)
			container := s.start(id, pod, sealedContainer(device))
			if killed := s.killAll(victim); killed == 0 {
				t.Fatalf("no process %s", victim)
			}
			if err := poll(s.ctx, "the container to be seen as ended", func() bool {
				state, err := s.node.Crictl(s.ctx, "inspect", "-o", "go-template", "--template", "{{.status.state}}", container)
				return err == nil && state == "CONTAINER_EXITED"
			}, time.Minute); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestKillingOurShimWhileAContainerIsCreatedLeavesNothing kills it at moments
// that lie before, in and after the hot-plug.
func TestKillingOurShimWhileAContainerIsCreatedLeavesNothing(t *testing.T) {
	for _, after := range []time.Duration{200 * time.Millisecond, 3 * time.Second} {
		t.Run(after.String(), func(t *testing.T) {
			s := newScene(t)
			_, device := s.disk(64 * mib)
			pod := sealedPod("killed-early")
			id := s.pod(pod)
			created := make(chan error, 1)
			go func() {
				_, err := s.node.RunContainer(s.ctx, id, pod, sealedContainer(device))
				created <- err
			}()
			time.Sleep(after)
			s.killAll("containerd-shim-kata-sealvol-v2")
			t.Logf("create ended with: %v", <-created)
		})
	}
}

// killAll kills every process that executes a program of that name.
func (s *scene) killAll(name string) int {
	s.Helper()
	all, err := Processes()
	if err != nil {
		s.Fatal(err)
	}
	killed := 0
	for _, p := range all {
		if p.Program != name {
			continue
		}
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
			s.Logf("killing %d: %v", p.PID, err)
			continue
		}
		killed++
	}
	return killed
}
