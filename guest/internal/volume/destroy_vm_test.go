//go:build vm

package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A container that is still there when its sandbox ends keeps a mount; it must not keep the key in the kernel, nor read on.
func TestVMTheEndOfTheSandboxEndsAVolumeThatIsInUse(t *testing.T) {
	m := newVM(t)
	seal(t, m, "v", 2, small)
	container := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(container, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(container, "f")
	at(t, m, "v", func(dir string) {
		if err := unix.Mount(dir, container, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		write(t, file, content("v", 64))
	})
	open, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	name := m.volumes["v"].crypt.Name
	control := m.kernel.mapper
	if err := m.Destroy(timeout(t, time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(open.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	_, err = open.ReadAt(make([]byte, block), 0)
	if !errors.Is(err, unix.EIO) {
		t.Errorf("the container reads on after the end: %v", err)
	}
	open.Close()
	if err := unix.Unmount(container, 0); err != nil {
		t.Fatal(err)
	}
	// The last user is gone, and the mapping goes with it.
	for deadline := time.Now().Add(time.Minute); len(leftOver(t)) > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := control.Table(name); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("mapping %s is still there: %v", name, err)
	}
}
