//go:build vm

package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/loop"
	"github.com/sealvol/sealvol/guest/internal/tagstore"
)

// logErr is the kernel's level of errors; kernel messages have the facility 0, and so no other bits.
const logErr = 3

// undo gives a cleanup time that the test's end does not take away.
func undo(t *testing.T, do func(context.Context) error) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := do(ctx); err != nil {
			t.Error(err)
		}
	})
}

// volume is a sealed volume and the disk that it is on, a file in the machine's memory.
type volume struct {
	devmapper.Device
	disk *os.File
}

// noMoreWrites makes every write to the disk fail from now on, as a host may.
func (v volume) noMoreWrites(t *testing.T) {
	t.Helper()
	if _, err := unix.FcntlInt(v.disk.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != nil {
		t.Fatal(err)
	}
}

// damage changes every byte that was ever written to the disk.
func (v volume) damage(t *testing.T) {
	t.Helper()
	for written, err := range (&Image{file: v.disk}).extents() {
		if err != nil {
			t.Fatal(err)
		}
		garbage := make([]byte, written.end-written.start)
		if _, err := v.disk.WriteAt(garbage, written.start); err != nil {
			t.Fatal(err)
		}
	}
}

// sparseDisk is a disk of any size, as long as little of it is written, and its file.
func sparseDisk(t *testing.T, size uint64) (*loop.Device, *os.File) {
	t.Helper()
	fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "disk")
	undo(t, func(context.Context) error { return file.Close() })
	if err := file.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	disk, err := loop.Attach(t.Context(), file, BlockBytes)
	if err != nil {
		t.Fatal(err)
	}
	undo(t, func(context.Context) error { return disk.Close() })
	return disk, file
}

// mapping makes a mapping that lives as long as the test.
func mapping(t *testing.T, control *devmapper.Control, name string, size uint64, target devmapper.Target) devmapper.Device {
	t.Helper()
	device, err := control.Create(t.Context(), name, "", size, target)
	if err != nil {
		t.Fatal(err)
	}
	undo(t, func(ctx context.Context) error { return control.Remove(ctx, name) })
	return device
}

// sealed is a new sealed volume of which nothing was ever written, as package volume makes it. A read of such a block is an error.
func sealed(t *testing.T, size uint64) volume {
	t.Helper()
	control, err := devmapper.Open()
	if err != nil {
		t.Fatal(err)
	}
	undo(t, func(context.Context) error { return control.Close() })
	disk, file := sparseDisk(t, size)
	tags, err := tagstore.New(t.Context(), size)
	if err != nil {
		t.Fatal(err)
	}
	undo(t, func(context.Context) error { return tags.Close() })
	key, err := keyring.New(16)
	if err != nil {
		t.Fatal(err)
	}
	undo(t, func(context.Context) error { return key.Destroy() })
	integrity := mapping(t, control, "fs_dif", size, devmapper.Integrity{
		Data: disk.Number, Meta: tags.Number(), TagBytes: tagstore.TagBytes, BlockBytes: tagstore.BlockBytes, JournalSectors: 64, BufferSectors: 8,
	})
	var crypt devmapper.Device
	const description = "sealvol:fs"
	if err := key.Lend(description, func() error {
		crypt = mapping(t, control, "fs_crypt", size, devmapper.Crypt{
			Cipher: "capi:aegis128-random", KeyBytes: 16, Description: description, Device: integrity.Number,
			TagBytes: tagstore.TagBytes, BlockBytes: tagstore.BlockBytes,
		})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return volume{Device: crypt, disk: file}
}

// format makes a file system on a device.
func format(t *testing.T, kind Type, device volume) {
	t.Helper()
	start := time.Now()
	image := newImage(t, kind, device.Bytes)
	made := time.Now()
	if err := image.CopyTo(t.Context(), device.Node()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s of %d MiB: made in %v, %d KiB copied in %v", kind, device.Bytes>>20, made.Sub(start), written(t, image)>>10, time.Since(made))
}

// open mounts a device until the test's end.
func open(t *testing.T, kind Type, device volume) *Mount {
	t.Helper()
	start := time.Now()
	m, err := kind.Open(t.Context(), device.Link(), device.Node(), device.Number, Options{Attributes: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("mounted in %v", time.Since(start))
	undo(t, m.Close)
	return m
}

// dir is a path to a mount's root folder, which has none.
func dir(m *Mount) string { return fmt.Sprintf("/proc/self/fd/%d", m.root.Fd()) }

// closed closes a mount and says what that gave.
func closed(t *testing.T, m *Mount) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	start := time.Now()
	err := m.Close(ctx)
	t.Logf("closed in %v: %v", time.Since(start), err)
	return err
}

// dropCaches makes the kernel read everything from the disk again.
func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// complaints are the errors that the kernel logs while do runs: dm-crypt's of every block that does not authenticate, read ahead or asked
// for, the block layer's and the file systems'. (The tracepoint of failed I/O would tell more, but an emulated machine with two processors
// may die of patching its code.)
func complaints(t *testing.T, do func()) (lines []string) {
	t.Helper()
	log, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(log)
	if _, err := unix.Seek(log, 0, unix.SEEK_END); err != nil {
		t.Fatal(err)
	}
	do()
	record := make([]byte, 8192)
	for {
		n, err := unix.Read(log, record)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return lines
		case errors.Is(err, unix.EPIPE):
			continue // messages were lost; the next ones follow
		case err != nil:
			t.Fatal(err)
		}
		// "priority,sequence,time,flags;text" (the kernel's Documentation/ABI/testing/dev-kmsg)
		head, text, _ := strings.Cut(string(record[:n]), ";")
		priority, _, _ := strings.Cut(head, ",")
		level, err := strconv.Atoi(priority)
		if err != nil {
			t.Fatal(err)
		}
		if level <= logErr {
			text, _, _ = strings.Cut(text, "\n")
			lines = append(lines, text)
		}
	}
}

// ioctl makes an ioctl with a pointer to its argument.
func ioctl[T any](f *os.File, request uintptr, argument *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(argument))); errno != 0 {
		return errno
	}
	return nil
}
