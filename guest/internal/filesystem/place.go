package filesystem

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Place is a folder where mounts are attached. It is a private tmpfs: what is mounted below it is mounted in this mount namespace and
// in none that takes part in its propagation, and nothing of it reaches a disk.
type Place struct {
	dir string
}

// NewPlace makes the folder, if need be, and mounts the tmpfs on it. A place that a service left there when it was killed goes, with all that was
// attached to it.
func NewPlace(dir string) (*Place, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	if err := removeStale(dir); err != nil {
		return nil, err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("sealvol", dir, "tmpfs", flags, "mode=0700,size=1m"); err != nil {
		return nil, fmt.Errorf("mount tmpfs on %s: %w", dir, err)
	}
	p := &Place{dir: dir}
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("make %s private: %w", dir, err), p.Close())
	}
	return p, nil
}

// Close takes the tmpfs away. It fails while anything is attached.
func (p *Place) Close() error {
	if err := unix.Unmount(p.dir, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", p.dir, err)
	}
	return nil
}

// removeStale unmounts what is mounted on a folder, and everything below it.
func removeStale(dir string) error {
	for {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) {
			return nil // nothing is mounted there
		}
		if err != nil {
			return fmt.Errorf("unmount what is left on %s: %w", dir, err)
		}
	}
}
