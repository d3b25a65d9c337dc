// Package filesystem makes the file system of a volume, holds it mounted where no path leads, and gives it to a group.
//
// On a new sealed volume a block that was never written cannot be read: its tag does not fit. Every mkfs reads such blocks, so the
// file system is made on a sparse file in memory, and what mkfs wrote is copied, with what the kernel reads beside that as zeros.
package filesystem

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// BlockBytes is the file system's block and the smallest write to the volume.
const BlockBytes = 4096

// Type is a kind of file system. The constants are all there are.
type Type string

const (
	// Ext4 has no journal: a volume that was not closed cleanly is not opened again.
	Ext4 Type = "ext4"
	// XFS always has a journal, which costs space, and time when it is made: all of it must be written before the kernel reads it.
	XFS Type = "xfs"
)

// Tools are the paths of the programs that make file systems.
type Tools struct {
	Ext4 string // mkfs.ext4 of e2fsprogs
	XFS  string // mkfs.xfs of xfsprogs 5.19 or newer
}

// MinBytes is the smallest volume that the file system is made on. Of a smaller one little more than metadata would fit.
func (t Type) MinBytes() uint64 {
	if t == XFS {
		return xfsMinBytes
	}
	return ext4MinBytes
}

// Make makes a file system of the given size in bytes, a multiple of BlockBytes. A size below MinBytes, and a tool that is not there, are
// errdefs.ErrFailedPrecondition.
func (t Type) Make(ctx context.Context, tools Tools, size uint64) (*Image, error) {
	if size < t.MinBytes() {
		return nil, fmt.Errorf("%d bytes are too few for %s, which needs %d: %w", size, t, t.MinBytes(), errdefs.ErrFailedPrecondition)
	}
	switch t {
	case Ext4:
		return makeExt4(ctx, tools.Ext4, size)
	case XFS:
		return makeXFS(ctx, tools.XFS, size)
	default:
		return nil, t.unknown()
	}
}

func (t Type) unknown() error {
	return fmt.Errorf("file system %q is not supported: %w", string(t), errdefs.ErrFailedPrecondition)
}
