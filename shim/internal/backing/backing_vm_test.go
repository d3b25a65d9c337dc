//go:build vm

package backing

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
)

// holdFile makes this test binary hold a backing open until it is killed.
const holdFile = "TEST_HOLD_FILE"

func TestMain(m *testing.M) {
	if path := os.Getenv(holdFile); path != "" {
		device, err := Open(hotplug.File(path))
		if err != nil {
			panic(err)
		}
		os.Stdout.WriteString(device.Path() + "\n")
		time.Sleep(time.Hour)
	}
	os.Exit(m.Run())
}

func TestAFileIsAttachedWhileItIsOpen(t *testing.T) {
	path := disk(t, 8<<20)
	device, err := Open(hotplug.File(path))
	if err != nil {
		t.Fatal(err)
	}
	if got := attached(t, device.Path()); got != path {
		t.Errorf("%s is on %q, not on %q", device.Path(), got, path)
	}
	want := bytes.Repeat([]byte("sealvol!"), 512)
	node, err := os.OpenFile(device.Path(), os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.WriteAt(want, 1<<20); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(want))
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file does not hold what was written to the device (%v)", err)
	}

	// Another user, the hypervisor say, keeps the device alive a little longer.
	if err := device.Close(); err != nil {
		t.Error(err)
	}
	if attached(t, device.Path()) != path {
		t.Error("the device went away under its user")
	}
	if err := node.Close(); err != nil {
		t.Error(err)
	}
	wantDetached(t, device.Path())
}

func TestAFileIsDetachedWhenItsHolderIsKilled(t *testing.T) {
	path := disk(t, 8<<20)
	holder := exec.Command("/proc/self/exe")
	holder.Env = append(os.Environ(), holdFile+"="+path)
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, err := stdout.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	node := strings.TrimSpace(string(line[:n]))
	if attached(t, node) != path {
		t.Errorf("%s is not on %s", node, path)
	}
	if _, err := Open(hotplug.File(path)); !errdefs.IsUnavailable(err) {
		t.Errorf("another process' file was opened: %v", err)
	}
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait()
	wantDetached(t, node)
	device, err := Open(hotplug.File(path))
	if err != nil {
		t.Fatalf("the lock has outlived its holder: %v", err)
	}
	device.Close()
}

// TestNoTwoHaveABackingAtOnce opens one backing by all its names.
func TestNoTwoHaveABackingAtOnce(t *testing.T) {
	path := disk(t, 1<<20)
	other := path + "-2"
	if err := os.Link(path, other); err != nil {
		t.Fatal(err)
	}
	first, err := Open(hotplug.File(path))
	if err != nil {
		t.Fatal(err)
	}
	wantTaken := func(b hotplug.Backing) {
		t.Helper()
		d, err := Open(b)
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), b.String()+" is that of another pod, which must be removed first") {
			t.Errorf("%v: got %v", b, err)
		}
		if err == nil {
			d.Close()
		}
	}
	wantTaken(hotplug.File(path))
	wantTaken(hotplug.File(other))

	// A device by its number, as kubelet lends it.
	number := numberOf(t, first.Path())
	device, err := Open(number)
	if err != nil {
		t.Fatal(err)
	}
	wantTaken(number)
	if err := device.Close(); err != nil {
		t.Error(err)
	}
	if device, err = Open(number); err != nil {
		t.Errorf("a device that was given back is still taken: %v", err)
	} else if err := device.Close(); err != nil {
		t.Error(err)
	}

	// The hypervisor keeps the disk for a while after its shim is gone.
	node, err := os.Open(first.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	wantTaken(hotplug.File(path))
	if err := node.Close(); err != nil {
		t.Error(err)
	}
	wantDetached(t, first.Path())
	again, err := Open(hotplug.File(other))
	if err != nil {
		t.Fatalf("a file that was given back is still taken: %v", err)
	}
	again.Close()
}

// TestAnEmptyDirHoldsADiskWhileItIsOpen makes one disk after the other in a folder.
func TestAnEmptyDirHoldsADiskWhileItIsOpen(t *testing.T) {
	path := folder(t)
	emptyDir := hotplug.EmptyDir{Path: path, Size: 64 << 20}
	for range 2 {
		device, err := Open(emptyDir)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(path, diskName)
		if got := attached(t, device.Path()); got != file {
			t.Errorf("%s is on %q, not on %q", device.Path(), got, file)
		}
		size, err := os.ReadFile("/sys/block/" + filepath.Base(device.Path()) + "/size")
		if err != nil || strings.TrimSpace(string(size)) != "131072" {
			t.Errorf("the device has %s sectors (%v)", size, err)
		}
		if _, err := Open(emptyDir); !errdefs.IsUnavailable(err) {
			t.Errorf("another sandbox gets it too: %v", err)
		}
		if err := device.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("its file is left behind (%v)", err)
		}
		wantDetached(t, device.Path())
	}
	// Kubelet may be the first to remove it.
	device, err := Open(emptyDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := device.Close(); err != nil {
		t.Error(err)
	}
	wantDetached(t, device.Path())
}

func TestManyFilesAtOnceGetDevicesOfTheirOwn(t *testing.T) {
	var opens sync.WaitGroup
	var mu sync.Mutex
	paths := map[string]bool{}
	for range 16 {
		path := disk(t, 1<<20)
		opens.Go(func() {
			device, err := Open(hotplug.File(path))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if paths[device.Path()] {
				t.Errorf("%s was given twice", device.Path())
			}
			paths[device.Path()] = true
			t.Cleanup(func() { device.Close() })
		})
	}
	opens.Wait()
}

func TestADeviceIsFoundByItsNumber(t *testing.T) {
	loop, err := Open(hotplug.File(disk(t, 1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	number := numberOf(t, loop.Path())
	device, err := Open(number)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	if device.Path() != loop.Path() {
		t.Errorf("%v is %s, not %s", number, device.Path(), loop.Path())
	}
	// A node that is the block device of another number.
	if _, err := openNode(loop.Path(), hotplug.Device{Major: number.Major, Minor: number.Minor + 1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}

func numberOf(t *testing.T, node string) hotplug.Device {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Stat(node, &stat); err != nil {
		t.Fatal(err)
	}
	return hotplug.Device{Major: unix.Major(stat.Rdev), Minor: unix.Minor(stat.Rdev)}
}

// disk makes a file that can be attached.
func disk(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// attached gives the file behind a loop device, "" without one.
func attached(t *testing.T, node string) string {
	t.Helper()
	data, err := os.ReadFile("/sys/block/" + filepath.Base(node) + "/loop/backing_file")
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func wantDetached(t *testing.T, node string) {
	t.Helper()
	for range 500 {
		if attached(t, node) == "" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%s is still on %s", node, attached(t, node))
}
