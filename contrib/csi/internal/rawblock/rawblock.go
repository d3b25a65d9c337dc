// Package rawblock gives files as block devices to kubelet: a loop device for a
// file that is staged, and the device's node bound on each target that kubelet
// publishes it at. It keeps no state but the kernel's, so that a driver that
// starts again finds what the one before it made. It imports shim/loop and no
// other package of the project.
package rawblock

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/loop"
)

// Host is the kernel that the driver runs on.
type Host struct{}

// Attach makes a loop device of a file, unless it has one of ours. Other than the
// shim's it stays until [Host.Detach], or until the machine stops. The device has
// an exclusive flock(2) of the file, as the shim's has, for as long as anybody uses
// it: a file that another device has is an errdefs.ErrFailedPrecondition.
func (h Host) Attach(path string) error {
	device, err := find(path)
	if err == nil {
		return device.Close()
	}
	if !errdefs.IsNotFound(err) {
		return err
	}
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close() // the loop device has its own reference, to the very open file that is locked
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%s is still that of a sandbox (%w): end its pod first: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	device, err = loop.Attach(file, 0)
	if err != nil {
		return err
	}
	return device.Close()
}

// Detach takes the loop device of a file away, if there is one. Its number stays
// in use until the last process has closed it.
func (h Host) Detach(path string) error {
	device, err := find(path)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer device.Close()
	if err := unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detach %s: %w", device.Name(), err)
	}
	return nil
}

// Bind puts the loop device of a file on a target, a file, unless it is there. A
// file that is not attached is an errdefs.ErrFailedPrecondition.
func (h Host) Bind(path, target string) error {
	device, err := find(path)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%s is not attached: stage the volume first: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return err
	}
	defer device.Close()
	if err := unix.Mount(device.Name(), target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", device.Name(), target, err)
	}
	return nil
}

// Unbind takes away whatever is mounted on a target.
func (h Host) Unbind(target string) error {
	for {
		mounted, err := mountinfo.Mounted(target)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !mounted {
			return nil
		}
		if err != nil {
			return err
		}
		if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
}

// State says whether a file has a loop device of ours, and the targets it is on.
func (h Host) State(path string) (attached bool, targets []string, err error) {
	device, err := find(path)
	if errdefs.IsNotFound(err) {
		return false, nil, nil
	}
	if err != nil {
		return false, nil, err
	}
	defer device.Close()
	var number unix.Stat_t
	if err := unix.Fstat(int(device.Fd()), &number); err != nil {
		return false, nil, err
	}
	// A bind of a node has the node's path on its file system for its root.
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return filepath.Base(m.Root) != filepath.Base(device.Name()), false
	})
	if err != nil {
		return false, nil, err
	}
	for _, m := range mounts {
		var on unix.Stat_t
		if unix.Stat(m.Mountpoint, &on) == nil && on.Mode&unix.S_IFMT == unix.S_IFBLK && on.Rdev == number.Rdev {
			targets = append(targets, m.Mountpoint)
		}
	}
	return true, targets, nil
}

// find opens the loop device that [Host.Attach] made of a file, also where the file
// has been deleted since and there is no other, or gives an errdefs.ErrNotFound. The
// shim may have another one of the same file; its own go away by themselves.
func find(path string) (*os.File, error) {
	var file unix.Stat_t
	err := unix.Lstat(path, &file)
	lost := errors.Is(err, fs.ErrNotExist)
	if err != nil && !lost {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	attached, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	for _, dir := range attached {
		device, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(dir)), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue // it went away, or another mount namespace's /dev has it
		}
		info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
		if err == nil && info.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 && (lost && hadFile(dir, path) || !lost && info.Device == file.Dev && info.Inode == file.Ino) {
			return device, nil
		}
		device.Close()
	}
	return nil, fmt.Errorf("no loop device has %s: %w", path, errdefs.ErrNotFound)
}

// hadFile says whether a loop device, by its folder in sysfs, is of a file that was
// deleted: that is the kernel's word for its path then.
func hadFile(dir, path string) bool {
	backing, err := os.ReadFile(filepath.Join(dir, "backing_file"))
	return err == nil && string(backing) == path+" (deleted)\n"
}
