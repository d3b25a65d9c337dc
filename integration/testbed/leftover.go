package testbed

import (
	"os"
	"path/filepath"
	"strings"
)

// LeftOver lists what volumes are made of in the kernel: mappings, loop devices, mounts, keys. An open volume has all of them, a closed
// one its loop device; a testbed that has not ended has the mount below which volumes are attached.
func LeftOver() (left []string, err error) {
	for _, pattern := range []string{"/sys/block/dm-*", "/sys/block/loop*/loop/backing_file", "/dev/mapper/encrypted*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		left = append(left, found...)
	}
	for _, file := range []string{"/proc/self/mountinfo", "/proc/keys"} {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, "encrypted_disk") || strings.Contains(line, "sealvol") {
				left = append(left, strings.TrimSpace(line))
			}
		}
	}
	return left, nil
}
