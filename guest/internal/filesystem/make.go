// Package filesystem makes the file system of a volume and holds it mounted where no path leads.
//
// On a new sealed volume a block that was never written cannot be read: its tag does not fit. Every mkfs reads such blocks, so the
// file system is made on a sparse file in memory and only what mkfs wrote is copied. The kernel's ext4 reads nothing else.
package filesystem

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// BlockBytes is the file system's block and the smallest write to the volume.
	BlockBytes = 4096
	// MinBytes is the smallest volume that a file system is made on.
	MinBytes = 1 << 20
	// copyBytes is the largest write while an image is copied.
	copyBytes = 1 << 20
)

// mkfsConfig takes the place of /etc/mke2fs.conf: what a file system looks like must not depend on a file of the image. Inodes are as
// mke2fs makes them by default. There is no journal, a volume that was not closed cleanly is not opened again; no reserved GDT
// blocks, it does not grow; nothing is reserved for root.
const mkfsConfig = `[defaults]
	base_features = sparse_super,large_file,filetype,dir_index,ext_attr
	default_mntopts = acl,user_xattr
	enable_periodic_fsck = 0
	blocksize = 4096
	inode_size = 256
	inode_ratio = 16384
	reserved_ratio = 0
[fs_types]
	ext4 = {
		features = extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
	}
	floppy = {
		inode_ratio = 8192
	}
	small = {
		inode_ratio = 16384
	}
	big = {
		inode_ratio = 32768
	}
	huge = {
		inode_ratio = 65536
	}
`

// Image is a new file system in memory: a sparse file that has only the blocks that were written.
type Image struct {
	file *os.File
}

// Make makes an ext4 of the given size in bytes, a multiple of BlockBytes, with the mkfs.ext4 at a path.
func Make(ctx context.Context, mkfs string, size uint64) (*Image, error) {
	config, err := memoryFile("mke2fs.conf")
	if err != nil {
		return nil, err
	}
	defer config.Close()
	if _, err := config.WriteString(mkfsConfig); err != nil {
		return nil, fmt.Errorf("mkfs configuration: %w", err)
	}
	image, err := memoryFile("ext4")
	if err != nil {
		return nil, err
	}
	if err := run(ctx, mkfs, config, image, size); err != nil {
		image.Close()
		return nil, err
	}
	return &Image{file: image}, nil
}

func run(ctx context.Context, mkfs string, config, image *os.File, size uint64) error {
	if err := image.Truncate(int64(size)); err != nil {
		return fmt.Errorf("grow file system image: %w", err)
	}
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, mkfs,
		"-F", "-q", // no questions, no progress
		"-t", "ext4", "-U", randomUUID(),
		// Inode tables stay unwritten: the kernel knows which part of them was never used and does not read it.
		// No discard: the image has nothing to discard. The hash seed is as secret as the files' names.
		"-E", "lazy_itable_init=1,nodiscard,hash_seed="+randomUUID(),
		"/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{image, config}
	cmd.Env = []string{
		"MKE2FS_CONFIG=/proc/self/fd/4",
		// Zeros are written, not punched: a hole would not be copied, and read as an error.
		"UNIX_IO_NOZEROOUT=1",
		"LC_ALL=C",
	}
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("mkfs.ext4: %w", ctx.Err())
	}
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("mkfs.ext4: %w: %w", errdefs.ErrFailedPrecondition, err)
	}
	if err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %q", err, bytes.TrimSpace(output.Bytes()))
	}
	return nil
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
	if closeErr := device.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("copy file system: %w", err)
	}
	return nil
}

func (i *Image) copyTo(ctx context.Context, device io.WriterAt) error {
	// Mapped memory is aligned to pages, as O_DIRECT wants it.
	buffer, err := unix.Mmap(-1, 0, copyBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(buffer)
	for written, err := range i.extents() {
		if err != nil {
			return err
		}
		for at := written.start; at < written.end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			part := buffer[:min(copyBytes, written.end-at)]
			if _, err := i.file.ReadAt(part, at); err != nil {
				return err
			}
			if _, err := device.WriteAt(part, at); err != nil {
				return err
			}
			at += int64(len(part))
		}
	}
	return nil
}

type extent struct{ start, end int64 }

// extents yields the parts of the image that have been written, in whole blocks.
func (i *Image) extents() iter.Seq2[extent, error] {
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
