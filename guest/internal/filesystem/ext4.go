package filesystem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	ext4MinBytes = 1 << 20

	// One inode for 16 KiB is what mke2fs makes by default, and does not surprise whoever has small files. But each one costs 256 bytes that
	// are written before the volume is ready, so that what is beyond ext4Dense adds few: 135168 in all for 10 GiB, 181248 for 100 GiB. An
	// xfs makes inodes as they are needed.
	ext4Dense       = 2 << 30
	ext4DenseRatio  = 16 << 10
	ext4SparseRatio = 2 << 20
	ext4MinInodes   = 128

	ext4InodeBytes = 256
)

// ext4Config takes the place of /etc/mke2fs.conf: what a file system looks like must not depend on a file of the image. There is no journal,
// a volume that was not closed cleanly is not opened again; no reserved GDT blocks, it does not grow; nothing is reserved for root.
const ext4Config = `[defaults]
	base_features = sparse_super,large_file,filetype,dir_index,ext_attr
	default_mntopts = acl,user_xattr
	enable_periodic_fsck = 0
	reserved_ratio = 0
[fs_types]
	ext4 = {
		features = extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
	}
	floppy = {
	}
	small = {
	}
	big = {
	}
	huge = {
	}
`

// ext4Inodes is how many inodes a volume gets.
func ext4Inodes(size uint64) uint64 {
	dense := min(size, ext4Dense)
	return max(dense/ext4DenseRatio+(size-dense)/ext4SparseRatio, ext4MinInodes)
}

func makeExt4(ctx context.Context, mkfs string, size uint64) (*Image, error) {
	config, err := memoryFile("mke2fs.conf")
	if err != nil {
		return nil, err
	}
	defer config.Close()
	if _, err := config.WriteString(ext4Config); err != nil {
		return nil, fmt.Errorf("mkfs configuration: %w", err)
	}
	image, err := makeImage(ctx, Ext4, size, command{
		path: mkfs,
		args: []string{
			"-F", "-q", // no questions, no progress
			"-t", "ext4", "-U", randomUUID(),
			"-b", fmt.Sprint(BlockBytes), "-I", fmt.Sprint(ext4InodeBytes), "-N", fmt.Sprint(ext4Inodes(size)),
			// The image's inode tables stay unwritten, they need no memory; CopyTo writes them.
			// No discard: the image has nothing to discard. The hash seed is as secret as the files' names.
			"-E", "lazy_itable_init=1,nodiscard,hash_seed=" + randomUUID(),
		},
		env: []string{
			"MKE2FS_CONFIG=" + childFile(firstExtra),
			// Zeros are written, not punched: a hole would not be copied, and read as an error.
			"UNIX_IO_NOZEROOUT=1",
		},
		extra: []*os.File{config},
	})
	if err != nil {
		return nil, err
	}
	// The kernel means not to read a block of an inode table in which no inode was ever used, but when two of its inodes are allocated at
	// once it does: for each of them the other one is in use (__ext4_get_inode_loc of its fs/ext4/inode.c).
	if image.zeros, err = inodeTables(image.file); err != nil {
		return nil, errors.Join(err, image.Close())
	}
	return image, nil
}

// inodeTables are the places of all inode tables of an ext4, in the order of their groups. The formats are those of struct ext4_super_block
// and struct ext4_group_desc of the kernel's fs/ext4/ext4.h.
func inodeTables(ext4 io.ReaderAt) ([]extent, error) {
	const (
		superAt   = 1024
		magic     = 0xef53
		descBytes = 64 // with the feature 64bit
	)
	super := make([]byte, 1024)
	if _, err := ext4.ReadAt(super, superAt); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	word := func(at int) int64 { return int64(binary.LittleEndian.Uint32(super[at:])) }
	half := func(at int) int64 { return int64(binary.LittleEndian.Uint16(super[at:])) }
	blocks, perGroup, inodes := word(0x4)|word(0x150)<<32, word(0x20), word(0x28)
	if half(0x38) != magic || 1<<(10+word(0x18)) != BlockBytes || half(0x58) != ext4InodeBytes || half(0xfe) != descBytes || perGroup == 0 {
		return nil, fmt.Errorf("mkfs.ext4 made something else: %w", errdefs.ErrFailedPrecondition)
	}
	groups := (blocks + perGroup - 1) / perGroup
	descriptors := make([]byte, groups*descBytes)
	if _, err := ext4.ReadAt(descriptors, BlockBytes); err != nil {
		return nil, fmt.Errorf("read group descriptors: %w", err)
	}
	var tables []extent
	for desc := range slices.Chunk(descriptors, descBytes) {
		start := BlockBytes * (int64(binary.LittleEndian.Uint32(desc[0x8:])) | int64(binary.LittleEndian.Uint32(desc[0x28:]))<<32)
		tables = append(tables, extent{start, start + inodes*ext4InodeBytes})
	}
	return tables, nil
}

// ext4Damage is an error when ext4 has found itself damaged since it was made. It took no more writes then, and what it was about is half
// done.
func ext4Damage(disk *os.File) error {
	count, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(disk.Name()), "errors_count"))
	if err != nil {
		return fmt.Errorf("what ext4 has found: %w", err)
	}
	if n := strings.TrimSpace(string(count)); n != "0" {
		return fmt.Errorf("ext4 has found damage %s times: %w", n, errdefs.ErrDataLoss)
	}
	return nil
}
