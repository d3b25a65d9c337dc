//go:build vm

package boot

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary play the init and its service, each by its name.
func TestMain(m *testing.M) {
	if os.Getenv("BOOT_TEST") == "reaper" {
		os.Exit(reaper())
	}
	os.Exit(m.Run())
}

// reaper is a subreaper with one service that leaves an orphan behind and ends with status 7.
func reaper() int {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	p, err := os.StartProcess("/bin/sh", []string{"sh", "-c", "(sleep 0.2 &) ; sleep 0.6; exit 7"}, &os.ProcAttr{Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		panic(err)
	}
	err = reap(p.Pid)
	if err == nil || !strings.Contains(err.Error(), "status 7") {
		panic(err)
	}
	// The orphan was reaped on the way: there is no child any more.
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
		panic(err)
	}
	return 0
}

func TestOrphansAreReapedAndTheServicesEndIsTold(t *testing.T) {
	start := time.Now()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"BOOT_TEST=reaper"}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if time.Since(start) < 500*time.Millisecond {
		t.Error("it ended with the orphan, not with the service")
	}
}

// Each step alone, since the machine that runs the test is up already.
func TestStepsOfPreparation(t *testing.T) {
	if err := loopbackUp(); err != nil {
		t.Error(err)
	}
	flags, err := os.ReadFile("/sys/class/net/lo/flags")
	if err != nil || strings.TrimSpace(string(flags)) != "0x9" {
		t.Errorf("lo: %s, %v", flags, err)
	}
	if err := delegate("/sys/fs/cgroup"); err != nil {
		t.Error(err)
	}
	for range 2 { // the second time everything is there already
		for _, m := range baseMounts() {
			m.target = t.TempDir()
			if err := m.mount(); err != nil {
				t.Error(err)
				continue
			}
			t.Cleanup(func() { unix.Unmount(m.target, 0) })
		}
	}
	if err := configfs("/sys/kernel/absent"); err != nil {
		t.Errorf("a kernel without configfs: %v", err)
	}
	if err := configfs("/sys/kernel/config"); err != nil {
		t.Errorf("configfs: %v", err)
	}
	if err := loadModule("/absent.ko"); !os.IsNotExist(err) {
		t.Error(err)
	}
}
