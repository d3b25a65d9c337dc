// Package backing opens what holds a volume's bytes on the host: a block
// device by its number, or a file behind a loop device that it makes.
package backing

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/loop"
)

// Device is a block device that is held open: as long as it is, its number
// stays with it. Kata tells devices apart by their numbers, so that another
// disk under a number that was used before would not be plugged in.
type Device struct {
	path string
	file *os.File
}

// Path is the device's node.
func (d Device) Path() string { return d.path }

// Close lets go of the device. A loop device that [Open] made goes away when
// nobody else has it open.
func (d Device) Close() error { return d.file.Close() }

// Open opens a backing. One that is not there is an errdefs.ErrNotFound, one
// of another kind an errdefs.ErrInvalidArgument.
func Open(b hotplug.Backing) (Device, error) {
	switch b := b.(type) {
	case hotplug.Device:
		return openNumber(b)
	case hotplug.File:
		return openFile(string(b))
	default:
		return Device{}, fmt.Errorf("backing %v: %w", b, errdefs.ErrInvalidArgument)
	}
}

func openNumber(number hotplug.Device) (Device, error) {
	uevent, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%s/uevent", number))
	if errors.Is(err, fs.ErrNotExist) {
		return Device{}, fmt.Errorf("no block device %s on this node: %w", number, errdefs.ErrNotFound)
	}
	if err != nil {
		return Device{}, err
	}
	for line := range strings.Lines(string(uevent)) {
		if name, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "DEVNAME="); ok {
			return openNode("/dev/"+name, number)
		}
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
	return Device{path, file}, nil
}

// openFile puts a loop device on a file. The kernel removes it with its last
// user, also when we are killed (LO_FLAGS_AUTOCLEAR, loop(4)).
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
	device, err := loop.Attach(file, unix.LO_FLAGS_AUTOCLEAR)
	if err != nil {
		return Device{}, err
	}
	return Device{device.Name(), device}, nil
}
