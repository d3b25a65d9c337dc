// Package noswap makes files in memory that is never swapped out.
//
// A memfd would not do: its pages can be, in plaintext, to a disk that the host lends. The files are in a tmpfs that is mounted
// "noswap" and attached nowhere, one for each file: it has no path, only open files, and its memory is freed with the last of them.
package noswap

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// File makes a file of the given size in bytes that takes memory as it is written; the name is for messages only. The error is
// errdefs.ErrFailedPrecondition when the kernel's tmpfs cannot keep its pages from being swapped out (before Linux 6.4).
func File(name string, size uint64) (*os.File, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen tmpfs: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetFlag(fs, "noswap"); err != nil {
		return nil, fmt.Errorf("tmpfs option noswap: %w: %w", errdefs.ErrFailedPrecondition, err)
	}
	// Twice the file: the limit is there against a mistake of ours, not to be reached.
	for _, option := range [][2]string{{"mode", "0700"}, {"size", fmt.Sprint(2 * size)}, {"nr_inodes", "16"}} {
		if err := unix.FsconfigSetString(fs, option[0], option[1]); err != nil {
			return nil, fmt.Errorf("tmpfs option %s: %w", option[0], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("create tmpfs: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsmount tmpfs: %w", err)
	}
	// The file keeps the file system alive.
	defer unix.Close(mount)
	fd, err := unix.Openat(mount, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create file: %w", err)
	}
	file := os.NewFile(uintptr(fd), name)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		file.Close()
		return nil, fmt.Errorf("grow file: %w", err)
	}
	return file, nil
}

// Allocated is the memory that a file takes, in bytes.
func Allocated(file *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return 0, err
	}
	return uint64(st.Blocks) * 512, nil
}
