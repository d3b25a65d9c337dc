// Package blockdev opens block devices by what they are, not by what they are called.
//
// A name under /dev is only a name: the host can unplug a disk and plug another one that gets the same name and even the same
// number. So a device is opened together with the number that is expected behind the name, and a disk also with its sequence
// number, which the kernel gives once and never again.
package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Number is a device number. It is written "major:minor", as sysfs and device-mapper tables do.
type Number struct {
	Major, Minor uint32
}

// ParseNumber reads "major:minor" in decimal.
func ParseNumber(s string) (Number, error) {
	major, minor, ok := strings.Cut(s, ":")
	a, errMajor := strconv.ParseUint(major, 10, 32)
	b, errMinor := strconv.ParseUint(minor, 10, 32)
	if !ok || errMajor != nil || errMinor != nil {
		return Number{}, fmt.Errorf("device number %q is not major:minor: %w", s, errdefs.ErrInvalidArgument)
	}
	return Number{Major: uint32(a), Minor: uint32(b)}, nil
}

// FromDev takes a device number apart, as stat gives it.
func FromDev(dev uint64) Number {
	return Number{Major: unix.Major(dev), Minor: unix.Minor(dev)}
}

func (n Number) String() string {
	return fmt.Sprintf("%d:%d", n.Major, n.Minor)
}

// Open opens a block device with the flags of open(2) and fails with errdefs.ErrUnavailable when another one than n is behind the path.
func Open(path string, n Number, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || FromDev(st.Rdev) != n {
		f.Close()
		return nil, fmt.Errorf("%s is not block device %v: %w", path, n, errdefs.ErrUnavailable)
	}
	return f, nil
}

// WaitUnused returns when nobody holds the device exclusively: no file system that is mounted from it, no mapping over it.
// When ctx ends first the error is errdefs.ErrUnavailable.
func WaitUnused(ctx context.Context, path string, n Number) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		f, err := Open(path, n, unix.O_RDONLY|unix.O_EXCL)
		if err == nil {
			return CloseExclusive(f)
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("device %v is still in use: %w: %w", n, ctx.Err(), errdefs.ErrUnavailable)
		case <-time.After(pause):
		}
	}
}

// CloseExclusive closes a device that was opened with O_EXCL, so that nobody has it exclusively afterwards. A plain Close does not do that: a
// child that is started at that moment, another volume's mkfs say, has every descriptor until it executes its program, and whoever
// wants the device next would find it busy.
func CloseExclusive(f *os.File) error {
	// Held by who starts a child until the child has executed its program.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return f.Close()
}

// Size is the device's size in bytes.
func Size(f *os.File) (uint64, error) {
	return get(f, unix.BLKGETSIZE64)
}

// Sequence is the disk's sequence number: unique among all disks since the kernel started, also when a number is used again.
func Sequence(f *os.File) (uint64, error) {
	return get(f, unix.BLKGETDISKSEQ)
}

func get(f *os.File, request uintptr) (uint64, error) {
	var value uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&value))); errno != 0 {
		return 0, &os.PathError{Op: "ioctl", Path: f.Name(), Err: errno}
	}
	return value, nil
}
