package backing

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
)

// diskName is the file that holds the volume of an emptyDir, in its folder.
const diskName = "sealvol.img"

// openEmptyDir makes a sparse file in an emptyDir's folder and puts a loop
// device on it. Kubelet counts what the file takes as the emptyDir's, and
// removes it with the pod; the device removes it with the sandbox.
//
// What a container may have put into the folder earlier is nothing to follow:
// below kubelet's root no part of the path is a link, and the file is one that
// did not exist.
func openEmptyDir(e hotplug.EmptyDir, attach func(*os.File) (Device, error)) (Device, error) {
	dir, err := openFolder(e)
	if err != nil {
		return Device{}, err
	}
	file, err := makeDisk(dir, e.Size)
	if err != nil {
		return Device{}, errors.Join(err, dir.Close())
	}
	defer file.Close() // The loop device has its own reference.
	device, err := attach(file)
	if err != nil {
		return Device{}, errors.Join(err, madeDisk{dir}.Close())
	}
	// The name goes before the lock does: a next sandbox may take it at once.
	device.held = append(device.held, madeDisk{dir})
	return device, nil
}

// madeDisk is the file that was made in a folder.
type madeDisk struct{ dir *os.File }

// Close removes it, if kubelet has not yet.
func (m madeDisk) Close() error {
	err := unix.Unlinkat(int(m.dir.Fd()), diskName, 0)
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("remove %s: %w", filepath.Join(m.dir.Name(), diskName), err)
	}
	return errors.Join(err, m.dir.Close())
}

// openFolder opens the folder of an emptyDir. Only kubelet's root folder may be
// a link, or behind one.
func openFolder(e hotplug.EmptyDir) (*os.File, error) {
	top, folder := e.Split()
	root, err := os.OpenFile(top, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("emptyDir %s: %w: %w", e.Path, err, errdefs.ErrNotFound)
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), folder, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("emptyDir %s is not there: %w", e.Path, errdefs.ErrNotFound)
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("emptyDir %s is no folder, or a link is in the way: %w: %w", e.Path, err, errdefs.ErrInvalidArgument)
	case err != nil:
		return nil, fmt.Errorf("emptyDir %s: %w", e.Path, err)
	}
	return os.NewFile(uintptr(fd), e.Path), nil
}

// makeDisk makes the file in a folder, locked. One that an earlier sandbox of
// the pod has left behind, killed before it could remove it, is ciphertext of
// which nobody has the key: it gives way.
func makeDisk(dir *os.File, size uint64) (_ *os.File, err error) {
	path := filepath.Join(dir.Name(), diskName)
	file, err := createDisk(dir, path)
	if errors.Is(err, unix.EEXIST) {
		if err := removeLeftover(dir, path); err != nil {
			return nil, err
		}
		file, err = createDisk(dir, path)
	}
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, file.Close())
		}
	}()
	if err := lock(file, path); err != nil {
		return nil, err
	}
	// Another sandbox may have taken it for a leftover before it was locked.
	if err := sameFile(dir, file, path); err != nil {
		return nil, err
	}
	if err := unix.Ftruncate(int(file.Fd()), int64(size)); err != nil {
		return nil, errors.Join(fmt.Errorf("give %s a size of %d bytes: %w", path, size, err), unix.Unlinkat(int(dir.Fd()), diskName, 0))
	}
	return file, nil
}

func createDisk(dir *os.File, path string) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), diskName, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// removeLeftover removes a file of a sandbox that is gone. What is no file is
// not ours, and stays.
func removeLeftover(dir *os.File, path string) error {
	// O_NONBLOCK: a pipe in the file's place must not keep us waiting.
	fd, err := unix.Openat(int(dir.Fd()), diskName, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // Its sandbox has removed it.
	}
	if err != nil {
		return fmt.Errorf("%s is in the way, remove it: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no file and in the way, remove it: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err := lock(file, path); err != nil {
		return err
	}
	if err := sameFile(dir, file, path); err != nil {
		return err
	}
	if err := unix.Unlinkat(int(dir.Fd()), diskName, 0); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

// sameFile demands that a locked file is still the one in the folder.
func sameFile(dir, file *os.File, path string) error {
	var named, held unix.Stat_t
	err := errors.Join(unix.Fstatat(int(dir.Fd()), diskName, &named, unix.AT_SYMLINK_NOFOLLOW), unix.Fstat(int(file.Fd()), &held))
	if err == nil && (named.Dev != held.Dev || named.Ino != held.Ino) {
		err = errors.New("another one has its name")
	}
	if err != nil {
		return fmt.Errorf("%s was replaced meanwhile: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	return nil
}
