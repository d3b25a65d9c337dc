//go:build vm

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// vmrun builds the program as the Makefile does, so that it finds the RAM disk that is already there.
func vmrun(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "vmrun")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}

type invocation struct {
	*exec.Cmd
	stdout, stderr bytes.Buffer
	tmp            string // where it keeps its scratch files
}

func command(t *testing.T, program string, args ...string) *invocation {
	t.Helper()
	build, err := filepath.Abs("../../build")
	if err != nil {
		t.Fatal(err)
	}
	r := &invocation{tmp: t.TempDir()}
	r.Cmd = exec.Command(program, append([]string{"-build", build}, args...)...)
	r.Env = append(os.Environ(), "TMPDIR="+r.tmp)
	r.Stdout, r.Stderr = &r.stdout, &r.stderr
	return r
}

// end waits for the command, checks its exit status and that nothing of it is left.
func (r *invocation) end(t *testing.T, want int) {
	t.Helper()
	err := r.Wait()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	}
	if got := r.ProcessState.ExitCode(); got != want {
		t.Errorf("exit status %d, want %d\nstdout: %s\nstderr: %s", got, want, &r.stdout, &r.stderr)
	}
	if n := r.machines(t); n != 0 {
		t.Errorf("%d QEMU processes left", n)
	}
	if left, _ := filepath.Glob(filepath.Join(r.tmp, "*")); len(left) != 0 && want >= 0 {
		t.Errorf("left behind: %v", left)
	}
}

// machines counts the QEMU processes of this run: they name its scratch folder.
func (r *invocation) machines(t *testing.T) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, file := range files {
		line, _ := os.ReadFile(file) // the process may have ended
		if bytes.HasPrefix(line, []byte("qemu-system-x86_64\x00")) && bytes.Contains(line, []byte(r.tmp)) {
			n++
		}
	}
	return n
}

func TestRunsTheCommandAsItWouldRunHere(t *testing.T) {
	t.Parallel()
	dir, share := t.TempDir(), t.TempDir()
	r := command(t, vmrun(t), "-share", share, "-env", "COLOUR=blue", "-disk", "64M", "-disk", "1M", "sh", "-ec", `
		id -u; pwd; echo "$COLOUR $SEALVOL_TEST $HIDDEN"
		for arg; do echo "<$arg>"; done
		echo loud >&2
		echo gone >written
		echo kept >"`+share+`/written"
		blockdev --getsize64 /dev/vda /dev/vdb
		basename "$(dirname "$(dirname "$(dirname "$(realpath /sys/block/vdb)")")")"
		printf seen | dd of=/run/vmrun/disks/1 conv=notrunc status=none
		head -c 4 /dev/vdb
		sleep 1000 & # does not hold up the end
		exit 7`, "sh", "a b", "", `"$x`)
	r.Dir = dir
	r.Env = append(r.Env, "SEALVOL_TEST=1", "HIDDEN=1")
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	r.end(t, 7)
	want := "0\n" + dir + "\nblue 1 \n<a b>\n<>\n<\"$x>\n67108864\n1048576\n0000:01:02.0\nseen"
	if got := r.stdout.String(); got != want {
		t.Errorf("stdout:\n%s\nwant:\n%s", got, want)
	}
	if got := r.stderr.String(); !strings.HasSuffix(got, "loud\n") {
		t.Errorf("stderr: %s", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "written")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what the command wrote outside a shared folder: %v", err)
	}
	if got, err := os.ReadFile(filepath.Join(share, "written")); err != nil || string(got) != "kept\n" {
		t.Errorf("in the shared folder: %q, %v", got, err)
	}
}

func TestTheDisksThatDoNotFitOnABridgeAreOnTheNext(t *testing.T) {
	t.Parallel()
	var args []string
	for range 33 {
		args = append(args, "-disk", "1M")
	}
	r := command(t, vmrun(t), append(args, "sh", "-ec", `
		for place in 02/01 02/1f 03/01 03/02; do
			disk=$(basename /sys/devices/pci0000:00/0000:00:${place%/*}.0/0000:*:${place#*/}.0/virtio*/block/vd*)
			cat /sys/block/$disk/serial
			echo " $place"
		done
		basename "$VMRUN_DISKS"`)...)
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	r.end(t, 0)
	if got, want := r.stdout.String(), "disk0 02/01\ndisk30 02/1f\ndisk31 03/01\ndisk32 03/02\ndisks\n"; got != want {
		t.Errorf("stdout:\n%s\nwant:\n%s", got, want)
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	program := vmrun(t)
	memo := t.TempDir()
	for name, test := range map[string]struct {
		args   []string
		want   int
		stderr string
	}{
		"success":           {[]string{"true"}, 0, ""},
		"ended by a signal": {[]string{"sh", "-c", "kill -9 $$"}, 128 + 9, ""},
		"no such program":   {[]string{"no-such-program"}, statusFailure, "no-such-program"},
		"no command":        {nil, statusFailure, "no command"},
		"time limit":        {[]string{"-timeout", "2s", "sleep", "1000"}, statusTimeout, "the time limit of 2s is over"},
		"the kernel panics": {[]string{"sh", "-c", "echo c >/proc/sysrq-trigger"}, statusFailure, "the machine ended before the command"},
		"the second machine lives": {[]string{"-tries", "2", "-share", memo, "sh", "-c",
			"cd " + memo + "; test -e first || { touch first; sync; echo c >/proc/sysrq-trigger; }"}, 0, "starting machine 2 of 2"},
		"no kernel where it looks": {[]string{"-build", t.TempDir(), "true"}, statusFailure, "make build/kernel/vmlinux"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := command(t, program, test.args...)
			if err := r.Start(); err != nil {
				t.Fatal(err)
			}
			r.end(t, test.want)
			if !strings.Contains(r.stderr.String(), test.stderr) {
				t.Errorf("stderr lacks %q: %s", test.stderr, &r.stderr)
			}
		})
	}
}

func TestLeavesNothingBehindWhenItIsEnded(t *testing.T) {
	t.Parallel()
	program := vmrun(t)
	for _, test := range []struct {
		signal syscall.Signal
		want   int
	}{
		{syscall.SIGTERM, 128 + 15},
		{syscall.SIGQUIT, 128 + 3}, // go test's, when its time is up
		{syscall.SIGKILL, -1},      // cannot remove its files, but QEMU must go
	} {
		t.Run(test.signal.String(), func(t *testing.T) {
			t.Parallel()
			r := command(t, program, "sleep", "1000")
			if err := r.Start(); err != nil {
				t.Fatal(err)
			}
			for range 1000 {
				if r.machines(t) > 0 {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			if err := r.Process.Signal(test.signal); err != nil {
				t.Fatal(err)
			}
			if test.signal == syscall.SIGKILL {
				time.Sleep(100 * time.Millisecond) // the kernel kills QEMU after its parent
			}
			r.end(t, test.want)
		})
	}
}
