package filesystem

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

const ext4MinBytes = 1 << 20

// ext4Config takes the place of /etc/mke2fs.conf: what a file system looks like must not depend on a file of the image. Inodes are as
// mke2fs makes them by default, one for 16 KiB: their tables take 1.6 % of the volume, and fewer would surprise whoever has small files.
// There is no journal, a volume that was not closed cleanly is not opened again; no reserved GDT blocks, it does not grow; nothing is
// reserved for root.
const ext4Config = `[defaults]
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

func makeExt4(ctx context.Context, mkfs string, size uint64) (*Image, error) {
	config, err := memoryFile("mke2fs.conf")
	if err != nil {
		return nil, err
	}
	defer config.Close()
	if _, err := config.WriteString(ext4Config); err != nil {
		return nil, fmt.Errorf("mkfs configuration: %w", err)
	}
	return makeImage(ctx, Ext4, size, command{
		path: mkfs,
		args: []string{
			"-F", "-q", // no questions, no progress
			"-t", "ext4", "-U", randomUUID(),
			// Inode tables stay unwritten: the kernel knows which part of them was never used and does not read it.
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
