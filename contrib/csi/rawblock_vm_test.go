//go:build vm

package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/contrib/csi/internal/rawblock"
	"github.com/sealvol/sealvol/shim/loop"
)

// file makes a file that can be attached, and a target for its device.
func file(t *testing.T) (path, target string) {
	t.Helper()
	dir := t.TempDir()
	path, target = filepath.Join(dir, "disk.img"), filepath.Join(dir, "target with a space")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 4<<20), os.WriteFile(target, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(rawblock.Host{}.Unbind(target), rawblock.Host{}.Detach(path)); err != nil {
			t.Error(err)
		}
	})
	return path, target
}

func wantState(t *testing.T, path string, wantAttached bool, wantTargets ...string) {
	t.Helper()
	attached, targets, err := rawblock.Host{}.State(path)
	slices.Sort(targets)
	if err != nil || attached != wantAttached || !slices.Equal(targets, wantTargets) {
		t.Errorf("attached is %v and on %q (%v), not %v and on %q", attached, targets, err, wantAttached, wantTargets)
	}
}

// devicesOf are the loop devices that have a file.
func devicesOf(t *testing.T, path string) (nodes []string) {
	t.Helper()
	for _, backing := range loops(t) {
		text, err := os.ReadFile(backing)
		if err == nil && strings.TrimSpace(string(text)) == path {
			nodes = append(nodes, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(backing))))
		}
	}
	return nodes
}

func TestVMADeviceIsBoundAndFoundAgain(t *testing.T) {
	h := rawblock.Host{}
	path, target := file(t)
	wantState(t, path, false)
	if err := h.Bind(path, target); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a file without a device is bound (%v)", err)
	}
	for range 2 { // as after a start of the driver
		if err := h.Attach(path); err != nil {
			t.Fatal(err)
		}
		wantState(t, path, true)
	}
	if err := h.Bind(path, target); err != nil {
		t.Fatal(err)
	}
	wantState(t, path, true, target)

	// What is written at the target is in the file.
	device, err := os.OpenFile(target, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 4096)
	copy(want, "written to the device")
	if _, err := device.WriteAt(want, 1<<20); err != nil {
		t.Error(err)
	}
	if size, err := device.Seek(0, 2); err != nil || size != 4<<20 {
		t.Errorf("the device has %d bytes (%v)", size, err)
	}
	if err := device.Close(); err != nil {
		t.Error(err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data[1<<20:][:21]) != "written to the device" {
		t.Errorf("the file does not have it (%v)", err)
	}

	for range 2 {
		if err := h.Unbind(target); err != nil {
			t.Error(err)
		}
		wantState(t, path, true)
	}
	for range 2 {
		if err := h.Detach(path); err != nil {
			t.Error(err)
		}
		wantState(t, path, false)
	}
}

// The shim's loop device of the same file is its sandbox's: it is neither taken
// for ours nor taken away.
func TestVMTheShimsDeviceIsNotOurs(t *testing.T) {
	h := rawblock.Host{}
	path, _ := file(t)
	disk, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	shims, err := loop.Attach(disk, unix.LO_FLAGS_AUTOCLEAR)
	if err != nil {
		t.Fatal(err)
	}
	defer shims.Close()
	wantState(t, path, false)
	if err := h.Detach(path); err != nil {
		t.Error(err)
	}
	if _, err := unix.IoctlLoopGetStatus64(int(shims.Fd())); err != nil {
		t.Errorf("the shim's device is gone: %v", err)
	}
}

// Kata knows a device by its number, so a number that a sandbox has open must not
// become another disk's.
func TestVMANumberInUseIsNotGivenAgain(t *testing.T) {
	h := rawblock.Host{}
	path, _ := file(t)
	if err := h.Attach(path); err != nil {
		t.Fatal(err)
	}
	device := devicesOf(t, path)[0]
	held, err := os.Open(device) // a sandbox
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := h.Detach(path); err != nil {
		t.Error(err)
	}
	other, _ := file(t)
	if err := h.Attach(other); err != nil {
		t.Fatal(err)
	}
	if fresh := devicesOf(t, other); slices.Contains(fresh, device) {
		t.Errorf("%s is another disk now, while its sandbox lives", device)
	}
}

// A sandbox may outlive the unstaging of its device. Until it ends, nobody gets
// the same file on a second device: two guests would write one disk.
func TestVMAttackAFileIsLentASecondTime(t *testing.T) {
	h := rawblock.Host{}
	path, _ := file(t)
	if err := h.Attach(path); err != nil {
		t.Fatal(err)
	}
	wantLocked := func(when string) {
		t.Helper()
		other, err := os.Open(path) // the shim for another pod, or the store for Delete and Expand
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			t.Errorf("%s its file can be locked (%v)", when, err)
		}
	}
	wantLocked("while it is staged")
	sandbox, err := os.Open(devicesOf(t, path)[0])
	if err != nil {
		t.Fatal(err)
	}
	defer sandbox.Close()
	if err := h.Detach(path); err != nil {
		t.Error(err)
	}
	wantLocked("while its sandbox lives")
	if err := h.Attach(path); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("staged once more: %v", err)
	}
	if devices := devicesOf(t, path); len(devices) != 1 {
		t.Errorf("one file is on %q", devices)
	}
	sandbox.Close()
	if err := h.Attach(path); err != nil {
		t.Errorf("when its sandbox is gone: %v", err)
	}
}

func TestVMADeviceWhoseFileIsDeletedIsFound(t *testing.T) {
	h := rawblock.Host{}
	path, target := file(t)
	if err := errors.Join(h.Attach(path), h.Bind(path, target), os.Remove(path)); err != nil {
		t.Fatal(err)
	}
	wantState(t, path, true, target)
	if err := errors.Join(h.Unbind(target), h.Detach(path)); err != nil {
		t.Error(err)
	}
	wantState(t, path, false)
}

func TestVMManyFilesAtOnceGetDevicesOfTheirOwn(t *testing.T) {
	var attaches sync.WaitGroup
	paths := make([]string, 8)
	for i := range paths {
		paths[i], _ = file(t)
		attaches.Go(func() {
			if err := (rawblock.Host{}).Attach(paths[i]); err != nil {
				t.Error(err)
			}
		})
	}
	attaches.Wait()
	seen := map[string]string{}
	for _, path := range paths {
		devices := devicesOf(t, path)
		if len(devices) != 1 {
			t.Fatalf("%s is on %q", path, devices)
		}
		if other, taken := seen[devices[0]]; taken {
			t.Errorf("%s and %s are both on %s", path, other, devices[0])
		}
		seen[devices[0]] = path
	}
}
