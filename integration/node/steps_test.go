//go:build node

package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The processes that a pod with a sealed volume depends on. Those of the node are started again by systemd when they end.
const (
	shim       = "containerd-shim-kata-sealvol-v2"
	stockShim  = "containerd-shim-kata-v2"
	hypervisor = "qemu-system-x86_64"
	containerd = "containerd"
	plugin     = "sealvol-nri"
)

var victims = []string{shim, stockShim, hypervisor, containerd, plugin}

// step is a moment in the life of a pod: somebody says something for the nth time.
type step struct {
	says string
	nth  int
}

func (s step) String() string { return fmt.Sprintf("%s, %d", s.says, s.nth) }

// said are the lines of the system log that are steps: the calls of containerd that reach the stock shim and change something, what that
// does to the machine and its disks, and what our shim does.
var said = regexp.MustCompile(`msg="(` +
	`(?:Create|Start|Kill|Delete|Shutdown)\(\) (?:start|end)` +
	`|Starting VM|VM started|Agent started in the sandbox|Attach devices|Unplugging block device|Stopping sandbox in the VM|Stopping VM` +
	`|the sandbox has started|a volume is plugged in|the last container was deleted|the stock shim has ended` +
	`)"`)

// watch calls seen for each step that follows, until the context ends.
func (s *scene) watch(ctx context.Context, seen func(step)) error {
	log, err := os.Open(filepath.Join(s.node.dir, "syslog.txt"))
	if err != nil {
		return err
	}
	defer log.Close()
	if _, err := log.Seek(0, 2); err != nil {
		return err
	}
	times, rest := map[string]int{}, ""
	buffer := make([]byte, 64<<10)
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		n, _ := log.Read(buffer) // At its end: 0.
		lines := strings.SplitAfter(rest+string(buffer[:n]), "\n")
		rest = lines[len(lines)-1]
		for _, line := range lines[:len(lines)-1] {
			if match := said.FindStringSubmatch(line); match != nil {
				times[match[1]]++
				seen(step{match[1], times[match[1]]})
			}
		}
		if n > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// live is the life of a pod with a sealed volume, from its creation to its removal. When something fails it ends early, and leaves the pod.
func (s *scene) live(device string) error {
	pod := sealedPod("fault")
	id, err := s.node.RunPod(s.ctx, pod)
	if err != nil {
		return err
	}
	container, err := s.node.RunContainer(s.ctx, id, pod, sealedContainer(device))
	if err != nil {
		return err
	}
	got, err := s.node.Exec(s.ctx, container, "sh", "-c", "echo alive > /mnt/encrypted/f && sync && cat /mnt/encrypted/f")
	if err != nil || got != "alive" {
		return errors.Join(err, fmt.Errorf("the volume holds %q", got))
	}
	for _, command := range [][]string{{"stop", "-t", "0", container}, {"rm", container}, {"stopp", id}, {"rmp", id}} {
		if _, err := s.node.Crictl(s.ctx, command...); err != nil {
			return err
		}
	}
	return nil
}

// fault is a process that is killed at a step.
type fault struct {
	victim string
	at     step
}

// rehearse plays a pod's life without a fault, and gives all faults that it has room for: each process at each step at which it runs.
func (s *scene) rehearse(device string) []fault {
	s.Helper()
	s.Cleanup(s.removePods)
	var faults []fault
	s.watched(func() {
		if err := s.live(device); err != nil {
			s.Errorf("without a fault a pod must live: %v", err)
		}
	}, func(at step) {
		running, err := Processes()
		if err != nil {
			s.Error(err)
		}
		for _, victim := range victims {
			if slices.ContainsFunc(running, func(p Process) bool { return p.Program == victim }) {
				faults = append(faults, fault{victim, at})
			}
		}
	})
	return faults
}

// watched runs something while its steps are watched.
func (s *scene) watched(act func(), seen func(step)) {
	s.Helper()
	ctx, cancel := context.WithCancel(s.ctx)
	ended := make(chan error, 1)
	go func() { ended <- s.watch(ctx, seen) }()
	act()
	cancel()
	if err := <-ended; err != nil {
		s.Error(err)
	}
}

// strike plays a pod's life, kills the process at the step, and removes what is left of the pod.
func (s *scene) strike(f fault, device string) {
	s.Helper()
	killed := 0
	s.watched(func() {
		s.Logf("the life of the pod ended with: %v", s.live(device))
	}, func(at step) {
		if at == f.at {
			n, err := killAll(f.victim)
			if err != nil {
				s.Error(err)
			}
			killed += n
		}
	})
	s.Logf("%d processes were killed", killed)
	switch {
	case killed == 0:
	case f.victim == shim, f.victim == stockShim, f.victim == hypervisor:
		s.awaitAllEnded()
	case f.victim == containerd:
		if err := errors.Join(s.node.StartContainerd(s.ctx), s.node.AwaitPlugin(s.ctx)); err != nil {
			s.Fatal(err)
		}
	case f.victim == plugin:
		if err := s.node.StartPlugin(s.ctx); err != nil {
			s.Fatal(err)
		}
	}
	s.removePods()
}

// awaitAllEnded waits until containerd has seen that no container of a pod runs any more, as it sees the end of a stock shim. A pod that is
// removed while containerd itself cleans up after a dead shim may leave its bundle.
func (s *scene) awaitAllEnded(pods ...string) {
	s.Helper()
	args := []string{"ps", "-q", "--state", "Running"}
	for _, id := range pods {
		args = append(args, "--pod", id)
	}
	if err := poll(s.ctx, "all containers to be seen as ended", func() bool {
		running, err := s.node.Crictl(s.ctx, args...)
		return err == nil && running == ""
	}, time.Minute); err != nil {
		s.Error(err)
	}
}

// removePods removes all pods of the node, as kubelet does with those that it does not know.
func (s *scene) removePods() {
	s.Helper()
	pods, err := s.node.Crictl(s.ctx, "pods", "-q")
	if err != nil {
		s.Error(err)
	}
	for _, id := range strings.Fields(pods) {
		if err := s.node.RemovePod(s.ctx, id); err != nil {
			s.Errorf("removing what is left of a pod: %v", err)
		}
	}
}

// wantFree demands that nobody has a lock on a file any more.
func (s *scene) wantFree(path string) {
	s.Helper()
	f, err := os.Open(path)
	if err != nil {
		s.Fatal(err)
	}
	defer f.Close()
	if err := poll(s.ctx, path+" to be free", func() bool {
		return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	}, 20*time.Second); err != nil {
		s.Errorf("no pod is left, but somebody has locked %s: %v", path, err)
	}
}

// sample thins out a table: one fault of our shim's and one of the hypervisor's, each at another part of the pod's life. A test of its own
// kills containerd and the plugin.
func sample(faults []fault) []fault {
	if every {
		return faults
	}
	var few []fault
	for i, victim := range []string{shim, hypervisor} {
		its := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return f.victim != victim })
		if len(its) > 0 {
			few = append(few, its[len(its)*(4*i+1)/8])
		}
	}
	return few
}

// TestKillingAnyProcessAtAnyStepLeavesNothing kills each process that a pod depends on at each step of the pod's life, and removes the pod.
// Nothing of it may be left on the host, and each pod has the disk of the one before. With KINDS=all a hundred pods live and end afterwards.
func TestKillingAnyProcessAtAnyStepLeavesNothing(t *testing.T) {
	file, device, undo, err := theNode.Disk(t.Context(), "faults", 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := undo(); err != nil {
			t.Error(err)
		}
	})
	var faults []fault
	if !t.Run("none", func(t *testing.T) { faults = newScene(t).rehearse(device) }) {
		t.FailNow()
	}
	t.Logf("a pod's life has room for %d faults", len(faults))
	for _, f := range sample(faults) {
		t.Run(f.victim+" at "+f.at.String(), func(t *testing.T) {
			s := newScene(t)
			s.strike(f, device)
			s.wantFree(device)
			s.wantFree(file)
		})
	}
	if every {
		t.Run("none, a hundred times", func(t *testing.T) { newScene(t).outlive(100, device) })
	}
}

// outlive plays the lives of pods, one after the other, after each of which the host must look as before.
func (s *scene) outlive(pods int, device string) {
	s.Helper()
	s.Cleanup(s.removePods)
	before, err := s.node.Residue(s.ctx)
	if err != nil {
		s.Fatal(err)
	}
	for n := range pods {
		if err := s.live(device); err != nil {
			s.Fatalf("after all faults a pod must live, but pod %d does not: %v", n+1, err)
		}
		s.wantResidue(before)
	}
}
