package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"regexp"
	"strings"
)

// cdh does what the Confidential Data Hub does with an empty block device when it is asked for integrity, with its command lines and
// in its order (confidential-containers/guest-components, confidential-data-hub/hub/src/storage):
//
//   - LUKS2 with a detached header in memory and a random passphrase of 4096 bytes, and so with cryptsetup's default key derivation.
//     "--integrity-no-journal" is an option of opening and has no effect when formatting: the volume runs with dm-integrity's journal.
//   - mkfs reads blocks that were never written, which fail. So mkfs is asked where it would put the superblock's copies, and those
//     blocks are zeroed, one dd for each.
//   - Newer versions also have mkfs write all inode tables (lazy_itable_init=0). This one leaves them, which is faster.
func cdh(ctx context.Context, v *volume, d disk) (string, error) {
	const headerBytes = 16 << 20
	name := "cdh_" + d.name
	header, err := v.scratch(name+".header", headerBytes)
	if err != nil {
		return "", err
	}
	passphrase := random(4096)
	if _, err := command(ctx, passphrase, "cryptsetup", "--batch-mode", "luksFormat", "--type", "luks2", "--cipher", "aes-xts-plain64",
		"--sector-size", "4096", "--header", header, "--integrity", "hmac-sha256", "--integrity-no-wipe", "--integrity-no-journal", d.node(), "-"); err != nil {
		return "", err
	}
	if _, err := command(ctx, passphrase, "cryptsetup", "luksOpen", "--header", header, "-d", "-", d.node(), name); err != nil {
		return "", err
	}
	v.onClose(closeMapping(name))
	node := "/dev/mapper/" + name
	plan, err := command(ctx, nil, "mkfs.ext4", "-F", "-n", node)
	if err != nil {
		return "", err
	}
	_, copies, found := strings.Cut(string(plan), "Superblock backups stored on blocks:")
	if !found {
		return "", fmt.Errorf("mkfs.ext4 -n says nothing of superblock backups: %q", plan)
	}
	for _, block := range append(regexp.MustCompile(`\d+`).FindAllString(copies, -1), "0") {
		if _, err := command(ctx, nil, "dd", "if=/dev/zero", "of="+node, "bs=4k", "count=1", "oflag=direct", "seek="+block); err != nil {
			return "", err
		}
	}
	_, err = command(ctx, nil, "mkfs.ext4", node, "-F")
	return node, err
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return b
}
