package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// xfsMinBytes is room for four allocation groups of the least size that xfs has, 16 MiB.
	xfsMinBytes = 64 << 20
	// xfsMinLogBytes is the smallest log that mkfs.xfs ever made by itself.
	xfsMinLogBytes = 10 << 20
	// xfsMaxLogBytes is what mkfs.xfs takes for "realistic": a bigger log gains nothing.
	xfsMaxLogBytes = 64 << 20
)

// xfsLogBytes is the size of the log.
func xfsLogBytes(size uint64) uint64 {
	log := min(max(size/64, xfsMinLogBytes), xfsMaxLogBytes)
	return log - log%BlockBytes
}

// makeXFS: mkfs.xfs reads no configuration file unless it is told to by -c, and of the environment nothing that is passed on here.
func makeXFS(ctx context.Context, mkfs string, size uint64) (*Image, error) {
	return makeImage(ctx, XFS, size, command{
		path: mkfs,
		args: []string{
			"-f", "-q", // no questions, no report
			"-K", // no discard: the image has nothing to discard
			// Small volumes and small logs are called so. The kernel has a least size of its own, which mkfs.xfs keeps.
			"--unsupported",
			"-b", fmt.Sprintf("size=%d", BlockBytes),
			// A write below the volume's block would have to read the rest of it.
			"-s", fmt.Sprintf("size=%d", BlockBytes),
			"-m", "crc=1,finobt=1,inobtcount=1,bigtime=1,reflink=1,rmapbt=0,uuid=" + randomUUID(),
			"-i", "size=512,sparse=1",
			"-l", fmt.Sprintf("internal,version=2,size=%d", xfsLogBytes(size)),
		},
	})
}

// xfsErrorPolicy are files below /sys/fs/xfs/DISK/error and what is written to them: xfs tries a metadata write that fails again for ever
// unless it is told how often. Now the second failure shuts the file system down, so that who uses it and who unmounts it get an error.
func xfsErrorPolicy() map[string]string {
	return map[string]string{
		"fail_at_unmount":              "1",
		"metadata/default/max_retries": "0",
		"metadata/EIO/max_retries":     "0",
		"metadata/ENOSPC/max_retries":  "0",
		"metadata/ENODEV/max_retries":  "0",
	}
}

func setXFSErrorPolicy(disk *os.File) error {
	for name, value := range xfsErrorPolicy() {
		if err := os.WriteFile(filepath.Join("/sys/fs/xfs", filepath.Base(disk.Name()), "error", name), []byte(value), 0); err != nil {
			return fmt.Errorf("error policy of xfs: %w", err)
		}
	}
	return nil
}

// settleXFS has the log and all that it describes written while the outcome can still be seen. xfs does not write by the device's page
// cache, so that the device does not know of its errors, as it does of ext4's.
func (m *Mount) settleXFS(ctx context.Context) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := m.makeReadOnly()
		if err == nil {
			break
		}
		// Somebody has a file open for writing, in another mount namespace.
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("write back xfs: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("file system is still mounted%s: %w: %w", mountedIn(m.device), ctx.Err(), errdefs.ErrUnavailable)
		case <-time.After(pause):
		}
	}
	// A file system that xfs has shut down because a write failed answers nothing.
	var st unix.Stat_t
	if err := unix.Fstat(int(m.root.Fd()), &st); err != nil {
		return fmt.Errorf("write back xfs: %w", err)
	}
	return nil
}

func (m *Mount) makeReadOnly() error {
	fs, err := unix.Fspick(m.mount, "", unix.FSPICK_CLOEXEC|unix.FSPICK_EMPTY_PATH)
	if err != nil {
		return os.NewSyscallError("fspick", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return os.NewSyscallError("fsconfig", err)
	}
	return os.NewSyscallError("fsconfig", unix.FsconfigReconfigure(fs))
}
