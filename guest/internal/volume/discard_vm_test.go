//go:build vm

package volume

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A block that was discarded has no tag to tell its old bytes from others, so no layering gives space back (SECURITY.md says why none could):
// who asks for it, by FITRIM as fstrim does or by punching a hole, must hear so, or get a hole that stays in the file system.
func TestVMDiscardReachesNoDisk(t *testing.T) {
	m := newVM(t)
	seal(t, m, "v", 2, small)
	disk := host(t, 2)
	at(t, m, "v", func(dir string) {
		file := filepath.Join(dir, "f")
		write(t, file, content("v", 16))
		offset := where(t, file, 3)
		before := read(t, disk, offset, block)
		root, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		all := struct{ start, length, least uint64 }{length: ^uint64(0)} // struct fstrim_range
		const fitrim = 0xc0185879
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), fitrim, uintptr(unsafe.Pointer(&all))); !errors.Is(errno, unix.EOPNOTSUPP) {
			t.Errorf("FITRIM: %v", errno)
		}
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 3*block, block); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		dropCaches(t)
		if got := read(t, f, 3*block, block); string(got) != string(make([]byte, block)) {
			t.Error("a hole reads as something else than zeros")
		}
		if string(read(t, disk, offset, block)) != string(before) {
			t.Error("the hole reached the disk")
		}
	})
	release(t, m, "v")
}
