// Package tagstore keeps a volume's integrity tags in guest memory, as a block device that dm-integrity can use.
//
// The tags are what makes a replayed block fail, so nothing outside the guest may see or change them, swap included: they are in a
// file of package noswap. The file is as large as the tags of the whole volume can become, and memory is used as they are written. It
// never runs into its limit: a tag store that is full would fail writes that the application was promised.
package tagstore

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/loop"
	"github.com/sealvol/sealvol/guest/internal/noswap"
)

const (
	// TagBytes is what is kept for each block of BlockBytes.
	TagBytes   = 32
	BlockBytes = 4096
	// overhead is room for dm-integrity's superblock and journal and for the rounding of both.
	overhead = 16 << 20
	// superblockAndJournal is what dm-integrity really has in front of the tags, rounded up.
	superblockAndJournal = 1 << 20
)

// MaxBytes is the most that the tags of a data device of a size can take, in bytes: 1/128.
func MaxBytes(dataBytes uint64) uint64 { return (dataBytes + BlockBytes - 1) / BlockBytes * TagBytes }

// Store is the tag store of one volume.
type Store struct {
	file *os.File
	loop *loop.Device
}

// New makes an empty store for a data device of the given size in bytes. The error is errdefs.ErrFailedPrecondition when the
// kernel's tmpfs cannot keep its pages from being swapped out (before Linux 6.4).
func New(ctx context.Context, dataBytes uint64) (*Store, error) {
	size := MaxBytes(dataBytes) + overhead
	file, err := noswap.File("tags", size)
	if err != nil {
		return nil, fmt.Errorf("memory for integrity tags: %w", err)
	}
	device, err := loop.Attach(ctx, file, BlockBytes)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("memory for integrity tags: %w", err)
	}
	return &Store{file: file, loop: device}, nil
}

// Preallocate takes all the memory that the tags of the data device can need, so that no write can want for it later. The error is
// errdefs.ErrFailedPrecondition when the guest has less than that to spare.
func (s *Store) Preallocate(dataBytes uint64) error {
	// The kernel would end processes, us perhaps, before it refused.
	available, err := availableMemory("/proc/meminfo")
	if err != nil {
		return fmt.Errorf("memory for integrity tags: %w", err)
	}
	need := MaxBytes(dataBytes) + superblockAndJournal
	if need > available {
		return fmt.Errorf("its integrity tags need %d bytes of memory beforehand, the guest has %d: %w", need, available, errdefs.ErrFailedPrecondition)
	}
	if err := unix.Fallocate(int(s.file.Fd()), 0, 0, int64(need)); err != nil {
		return fmt.Errorf("memory for integrity tags: fallocate %d bytes: %w", need, err)
	}
	return nil
}

// availableMemory is what the kernel can give without swapping, in bytes. file is /proc/meminfo.
func availableMemory(file string) (uint64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib uint64
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("%s has no MemAvailable: %w", file, errdefs.ErrFailedPrecondition)
}

// Number is the device number of the store.
func (s *Store) Number() blockdev.Number { return s.loop.Number }

// Allocated is the memory that the tags take, in bytes.
func (s *Store) Allocated() (uint64, error) {
	bytes, err := noswap.Allocated(s.file)
	if err != nil {
		return 0, fmt.Errorf("stat integrity tags: %w", err)
	}
	return bytes, nil
}

// Close frees the tags, unless a mapping still uses them: then they are freed with it.
func (s *Store) Close() error {
	loopErr := s.loop.Close()
	if err := s.file.Close(); err != nil {
		return err
	}
	return loopErr
}
