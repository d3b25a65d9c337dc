package filesystem

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/output"
)

const (
	// copyBytes is the largest write while an image is copied.
	copyBytes = 512 << 10
	// copyWorkers write at once: the kernel encrypts each write on one processor.
	copyWorkers = 8
)

// Image is a new file system in memory: a sparse file that has only the blocks that were written.
type Image struct {
	file  *os.File
	zeros []extent // what the kernel reads beside that, as zeros
}

// command is a mkfs without the name of the file that it writes to, which is its last argument.
type command struct {
	path  string
	args  []string
	env   []string   // all of it
	extra []*os.File // the first is the child's firstExtra
}

const (
	imageFile  = 3 // the image, among the child's open files
	firstExtra = 4
)

// childFile is what the child calls one of its open files.
func childFile(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func makeImage(ctx context.Context, t Type, size uint64, mkfs command) (*Image, error) {
	file, err := memoryFile(string(t))
	if err != nil {
		return nil, err
	}
	if err := mkfs.run(ctx, file, size); err != nil {
		file.Close()
		return nil, fmt.Errorf("mkfs.%s: %w", t, err)
	}
	return &Image{file: file}, nil
}

func (c command) run(ctx context.Context, image *os.File, size uint64) error {
	if err := image.Truncate(int64(size)); err != nil {
		return fmt.Errorf("grow image: %w", err)
	}
	said, err := output.New()
	if err != nil {
		return err
	}
	defer said.Close()
	cmd := exec.CommandContext(ctx, c.path, append(c.args[:len(c.args):len(c.args)], childFile(imageFile))...)
	cmd.ExtraFiles = append([]*os.File{image}, c.extra...)
	cmd.Env = append([]string{"LC_ALL=C"}, c.env...)
	cmd.Stdout, cmd.Stderr = said, said
	err = cmd.Run()
	switch {
	case err == nil:
		return ctx.Err()
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
	default:
		return fmt.Errorf("%w: %q", err, output.Text(said))
	}
}

func memoryFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory for %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// randomUUID is a UUID of version 4 (RFC 9562).
func randomUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Close frees the image.
func (i *Image) Close() error { return i.file.Close() }

// CopyTo writes the blocks that the image has to the device behind a node, past the page cache.
func (i *Image) CopyTo(ctx context.Context, node string) error {
	device, err := os.OpenFile(node, os.O_WRONLY|unix.O_DIRECT|unix.O_EXCL, 0)
	if err != nil {
		return fmt.Errorf("copy file system: %w", err)
	}
	err = i.copyTo(ctx, device)
	if closeErr := blockdev.CloseExclusive(device); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("copy file system: %w", err)
	}
	return nil
}

func (i *Image) copyTo(ctx context.Context, device io.WriterAt) error {
	group, ctx := errgroup.WithContext(ctx)
	parts := make(chan extent)
	group.Go(func() error {
		defer close(parts)
		return i.split(ctx, parts)
	})
	for range copyWorkers {
		group.Go(func() error { return i.copyParts(ctx, device, parts) })
	}
	return group.Wait()
}

// split sends what has to be copied in parts of copyBytes at most.
func (i *Image) split(ctx context.Context, parts chan<- extent) error {
	for written, err := range i.extents() {
		if err != nil {
			return err
		}
		for at := written.start; at < written.end; at += copyBytes {
			select {
			case parts <- extent{at, min(at+copyBytes, written.end)}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

func (i *Image) copyParts(ctx context.Context, device io.WriterAt, parts <-chan extent) error {
	// Mapped memory is aligned to pages, as O_DIRECT wants it.
	buffer, err := unix.Mmap(-1, 0, copyBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(buffer)
	for part := range parts {
		if err := ctx.Err(); err != nil {
			return err
		}
		block := buffer[:part.end-part.start]
		if _, err := i.file.ReadAt(block, part.start); err != nil {
			return err
		}
		if _, err := device.WriteAt(block, part.start); err != nil {
			return err
		}
	}
	return nil
}

type extent struct{ start, end int64 }

// extents yields the parts of the image that have to be on the device, in whole blocks, in order and without overlaps.
func (i *Image) extents() iter.Seq2[extent, error] {
	return func(yield func(extent, error) bool) {
		all := slices.Clone(i.zeros)
		for e, err := range i.written() {
			if err != nil {
				yield(extent{}, err)
				return
			}
			all = append(all, e)
		}
		slices.SortFunc(all, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
		for len(all) > 0 {
			e, n := all[0], 1
			for ; n < len(all) && all[n].start <= e.end; n++ {
				e.end = max(e.end, all[n].end)
			}
			all = all[n:]
			if !yield(e, nil) {
				return
			}
		}
	}
}

// written yields the parts of the image that have been written, in whole blocks.
func (i *Image) written() iter.Seq2[extent, error] {
	return func(yield func(extent, error) bool) {
		fd := int(i.file.Fd())
		for at := int64(0); ; {
			start, err := unix.Seek(fd, at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return // nothing but a hole up to the end
			}
			if err != nil {
				yield(extent{}, os.NewSyscallError("lseek", err))
				return
			}
			end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
			if err != nil {
				yield(extent{}, os.NewSyscallError("lseek", err))
				return
			}
			start -= start % BlockBytes
			end += (BlockBytes - end%BlockBytes) % BlockBytes
			if !yield(extent{start, end}, nil) {
				return
			}
			at = end
		}
	}
}
