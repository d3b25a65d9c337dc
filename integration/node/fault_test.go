//go:build node

package node

import (
	"syscall"
	"testing"
)

func TestKillingThePluginOrContainerdLeavesRunningContainersRunning(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	pod := sealedPod("node-killed")
	id := s.pod(pod)
	container := s.start(id, pod, sealedContainer(device))
	s.exec(container, "sh", "-c", "echo alive > /mnt/encrypted/f && sync")
	wantAlive := func() {
		t.Helper()
		if got := s.exec(container, "cat", "/mnt/encrypted/f"); got != "alive" {
			t.Errorf("the volume must be as it was, got %q", got)
		}
	}

	if err := s.node.KillPlugin(); err != nil {
		t.Fatal(err)
	}
	wantAlive()
	_, err := s.node.RunContainer(s.ctx, id, pod, Container{Name: "late", Args: []string{"true"}})
	s.wantRefusal(err, "sealvol")
	if err := s.node.StartPlugin(s.ctx); err != nil {
		t.Fatal(err)
	}
	wantAlive()

	if err := s.node.KillContainerd(); err != nil {
		t.Fatal(err)
	}
	if err := s.node.StartContainerd(s.ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.node.AwaitPlugin(s.ctx); err != nil {
		t.Fatal(err)
	}
	wantAlive()
}

// killAll kills every process that executes a program of that name, and says how many there were.
func killAll(name string) (killed int, err error) {
	all, err := Processes()
	if err != nil {
		return 0, err
	}
	for _, p := range all {
		if p.Program != name {
			continue
		}
		// It may have ended meanwhile.
		if syscall.Kill(p.PID, syscall.SIGKILL) == nil {
			killed++
		}
	}
	return killed, nil
}
