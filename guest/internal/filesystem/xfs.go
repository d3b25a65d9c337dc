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
	// xfsLog is the size of the log where it fits. All of it is written when the file system is made, so that what mkfs.xfs takes by itself,
	// 64 MiB and more, would be most of the time until a volume is ready. A log bounds the metadata that may wait to be written: with
	// sixteen workers on trees of files, 10, 16, 32 and 64 MiB could not be told apart on an emulated machine. The kernel wants 5 to 10 MiB,
	// the more the larger the volume.
	xfsLog = 16 << 20
	// xfsMinLog is for volumes whose allocation groups are too small for xfsLog. mkfs.xfs never made a smaller one by itself.
	xfsMinLog = 10 << 20
)

// xfsLogBytes is the size of the log of a volume.
func xfsLogBytes(size uint64) uint64 {
	log := min(max(size/8, xfsMinLog), xfsLog)
	return log - log%BlockBytes
}

// makeXFS: mkfs.xfs reads no configuration file unless it is told to by -c, and of the environment nothing that is passed on here.
func makeXFS(ctx context.Context, mkfs string, size uint64) (*Image, error) {
	return makeImage(ctx, XFS, size, command{
		path: mkfs,
		args: []string{
			"-f", "-q", // no questions, no report
			"-K", // no discard: the image has nothing to discard
			// What mkfs.xfs calls so is a volume below 300 MiB and a log below 64 MiB. The least log that the kernel takes is checked all the same.
			"--unsupported",
			"-b", fmt.Sprintf("size=%d", BlockBytes),
			// A write below the volume's block would have to read the rest of it.
			"-s", fmt.Sprintf("size=%d", BlockBytes),
			// Containers may use reflinks, as on any xfs; they cost 0.7 % of the space. What owns a block is of use for a repair only, which there
			// is none of, and would make every write dearer (rmapbt). Times go beyond 2038 (bigtime), free inodes are found without a search
			// (finobt), and mounting does not count them (inobtcount).
			"-m", "crc=1,reflink=1,rmapbt=0,bigtime=1,finobt=1,inobtcount=1,uuid=" + randomUUID(),
			// The least inode with checksums is twice that of ext4; inodes are made when there are files for them, also in small gaps.
			"-i", "size=512,sparse=1",
			"-l", fmt.Sprintf("internal,version=2,size=%d", xfsLogBytes(size)),
		},
	})
}

// setXFSErrorPolicy ends what xfs does by default, which is to try a metadata write that fails again for ever. Now the second failure shuts
// the file system down, so that who uses it and who unmounts it get an error.
func setXFSErrorPolicy(disk *os.File) error {
	for name, value := range map[string]string{
		"fail_at_unmount":              "1",
		"metadata/default/max_retries": "0",
		"metadata/EIO/max_retries":     "0",
		"metadata/ENOSPC/max_retries":  "0",
		"metadata/ENODEV/max_retries":  "0",
	} {
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
