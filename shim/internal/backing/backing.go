// Package backing opens what holds a volume's bytes on the host: a block
// device by its number, or a file behind a loop device that it makes. The file
// may be one that it makes too, in kubelet's folder of an emptyDir.
package backing

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/loop"
)

// Device is a block device that is held open and locked: as long as it is, its
// number stays with it, and [Open] gives it to nobody else. Kata tells devices
// apart by their numbers, so that another disk under a number that was used
// before would not be plugged in.
//
// The lock on a file lasts until the hypervisor too has let go of its loop
// device, the one on a device's number only as long as its holder lives. Neither
// knows two names for the same bytes, a partition and its disk say.
type Device struct {
	path string
	// held is what is let go of with the device, the last first.
	held []io.Closer
}

// Path is the device's node.
func (d Device) Path() string { return d.path }

// Close lets go of the device. A loop device that [Open] made goes away when
// nobody else has it open, and with it the lock on its file; a file that Open
// made is removed.
func (d Device) Close() error {
	var errs []error
	for _, h := range slices.Backward(d.held) {
		errs = append(errs, h.Close())
	}
	return errors.Join(errs...)
}

// Open opens a backing and locks it. One that is not there is an
// errdefs.ErrNotFound, one of another kind an errdefs.ErrInvalidArgument, one
// that another sandbox has an errdefs.ErrUnavailable.
func Open(b hotplug.Backing) (Device, error) {
	switch b := b.(type) {
	case hotplug.Device:
		return openNumber(b)
	case hotplug.File:
		return openFile(string(b))
	case hotplug.EmptyDir:
		return openEmptyDir(b, attach)
	default:
		return Device{}, fmt.Errorf("backing %v: %w", b, errdefs.ErrInvalidArgument)
	}
}

// lock takes the lock of a backing, for as long as this open file lives. It
// ends with its last holder, also when that is killed.
func lock(file *os.File, backing string) error {
	err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s is that of another pod, which must be removed first; or give this pod one of its own: %w", backing, errdefs.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", backing, err)
	}
	return nil
}

func openNumber(number hotplug.Device) (Device, error) {
	sysfs := fmt.Sprintf("/sys/dev/block/%s", number)
	uevent, err := os.ReadFile(sysfs + "/uevent")
	if errors.Is(err, fs.ErrNotExist) {
		return Device{}, fmt.Errorf("no block device %s on this node: %w", number, errdefs.ErrNotFound)
	}
	if err != nil {
		return Device{}, err
	}
	for line := range strings.Lines(string(uevent)) {
		name, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "DEVNAME=")
		if !ok {
			continue
		}
		device, err := openNode("/dev/"+name, number)
		if err != nil {
			return Device{}, err
		}
		// Of the node in /dev udev would wait for the lock, and who waits for udev
		// would wait too (systemd, "Locking Block Device Access").
		file, err := os.Open(sysfs + "/dev")
		if err != nil {
			return Device{}, errors.Join(err, device.Close())
		}
		device.held = append(device.held, file)
		if err := lock(file, "block device "+number.String()); err != nil {
			return Device{}, errors.Join(err, device.Close())
		}
		return device, nil
	}
	return Device{}, fmt.Errorf("block device %s has no name: %w", number, errdefs.ErrNotFound)
}

// openNode opens a node that must be the block device with that number.
func openNode(path string, number hotplug.Device) (Device, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return Device{}, fmt.Errorf("block device %s: %w", number, err)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		return Device{}, errors.Join(fmt.Errorf("stat %s: %w", path, err), file.Close())
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFBLK || stat.Rdev != unix.Mkdev(number.Major, number.Minor) {
		return Device{}, errors.Join(fmt.Errorf("%s is not block device %s: %w", path, number, errdefs.ErrInvalidArgument), file.Close())
	}
	return Device{path, []io.Closer{file}}, nil
}

func openFile(path string) (Device, error) {
	// O_NONBLOCK: a pipe in the file's place must not keep us waiting.
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return Device{}, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return Device{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer file.Close() // The loop device has its own reference.
	info, err := file.Stat()
	if err != nil {
		return Device{}, err
	}
	if !info.Mode().IsRegular() {
		return Device{}, fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	if err := lock(file, path); err != nil {
		return Device{}, err
	}
	return attach(file)
}

// attach puts a loop device on a file. The kernel removes it with its last
// user, also when we are killed (LO_FLAGS_AUTOCLEAR, loop(4)). It refers to the
// very open file, so that its lock stays until then too: a hypervisor that has
// outlived us keeps others away.
func attach(file *os.File) (Device, error) {
	device, err := loop.Attach(file, unix.LO_FLAGS_AUTOCLEAR)
	if err != nil {
		return Device{}, err
	}
	return Device{device.Name(), []io.Closer{device}}, nil
}
