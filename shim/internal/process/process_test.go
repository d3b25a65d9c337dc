package process

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAnIdentityIsOneProcess(t *testing.T) {
	t.Parallel()
	command := sleeper(t)
	id, err := Find(command.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !id.Alive() {
		t.Error("it is said to have ended")
	}
	// The same pid, in the state of before a reboot, or of an earlier process.
	for _, other := range []ID{{id.Pid, id.Start + 1, id.Boot}, {id.Pid, id.Start, "another boot"}} {
		if other.Alive() {
			t.Errorf("%v is taken for %v", id, other)
		}
		if err := other.Kill(); err != nil {
			t.Error(err)
		}
	}
	if !id.Alive() {
		t.Fatal("it was killed in the place of another")
	}
	if err := id.Kill(); err != nil {
		t.Fatal(err)
	}
	// Nobody has waited for it yet: a zombie is not alive.
	for deadline := time.Now().Add(5 * time.Second); id.Alive(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is still alive")
		}
	}
	_ = command.Wait()
	if err := id.Kill(); err != nil {
		t.Errorf("kill of one that has ended: %v", err)
	}
	if _, err := Find(id.Pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("find of one that has ended: %v", err)
	}
}

func TestANameCannotForgeTheRest(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a) Z 1 1 1")
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o700); err != nil {
		t.Fatal(err)
	}
	command := exec.Command(path, "3600")
	start(t, command)
	s, err := readStat(command.Process.Pid)
	if err != nil || s.parent != os.Getpid() || s.state == 'Z' {
		t.Errorf("got %+v, %v", s, err)
	}
}

func TestMarkedFindsTheWholeEntryAlone(t *testing.T) {
	t.Parallel()
	mark := "SEALVOL_TEST_MARK=" + t.TempDir()
	marked := sleeper(t, mark)
	sleeper(t, mark+"/more")
	sleeper(t, "X"+mark)
	sleeper(t, "X=Y "+mark)
	got, err := Marked(mark)
	if err != nil || len(got) != 1 || got[0].Pid != marked.Process.Pid {
		t.Errorf("got %v, %v, not %d alone", got, err, marked.Process.Pid)
	}
}

func TestEndWaitsUntilAllHaveEnded(t *testing.T) {
	t.Parallel()
	mark := "SEALVOL_TEST_MARK=" + t.TempDir()
	first, second := sleeper(t, mark), sleeper(t, mark)
	if err := End(t.Context(), func() ([]ID, error) { return Marked(mark) }); err != nil {
		t.Fatal(err)
	}
	for _, command := range []*exec.Cmd{first, second} {
		if err := command.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("it ended with %v", err)
		}
	}
}

// What a list names may have ended by then, and have started what the list had passed already.
func TestEndLooksAgainAfterAProcessThatHasEnded(t *testing.T) {
	t.Parallel()
	ended, child := sleeper(t), sleeper(t)
	var lists [][]ID
	for _, command := range []*exec.Cmd{ended, child} {
		id, err := Find(command.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		lists = append(lists, []ID{id})
	}
	ended.Process.Kill()
	ended.Wait()
	if err := End(t.Context(), func() ([]ID, error) {
		if len(lists) == 0 {
			return nil, nil
		}
		list := lists[0]
		lists = lists[1:]
		return list, nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := child.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("it ended with %v", err)
	}
}

func TestEndGivesUpWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	// There is always one more.
	err := End(ctx, func() ([]ID, error) {
		id, err := Find(sleeper(t).Process.Pid)
		return []ID{id}, err
	})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestReapLeavesThoseWhomSomebodyWaitsFor(t *testing.T) {
	// Not parallel: it takes every child that has ended.
	kept, taken := sleeper(t), sleeper(t)
	for _, command := range []*exec.Cmd{kept, taken} {
		if err := command.Process.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	ended := func(command *exec.Cmd) bool {
		s, err := readStat(command.Process.Pid)
		return err != nil || s.state == 'Z'
	}
	for !ended(kept) || !ended(taken) {
		time.Sleep(time.Millisecond)
	}
	if err := Reap(func(pid int) bool { return pid != taken.Process.Pid }); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(taken.Process.Pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was not collected: %v", err)
	}
	if err := Wait(kept.Process.Pid); err != nil {
		t.Errorf("the other one: %v", err)
	}
}

func TestChildrenAreOurs(t *testing.T) {
	t.Parallel()
	child := sleeper(t)
	got, err := Children()
	if err != nil || !slices.ContainsFunc(got, func(id ID) bool { return id.Pid == child.Process.Pid }) {
		t.Errorf("got %v, %v without %d", got, err, child.Process.Pid)
	}
}

// sleeper starts a process that sleeps, with that environment.
func sleeper(t *testing.T, env ...string) *exec.Cmd {
	t.Helper()
	command := exec.Command("sleep", "3600")
	command.Env = append(os.Environ(), env...)
	start(t, command)
	return command
}

func start(t *testing.T, command *exec.Cmd) {
	t.Helper()
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	})
}
