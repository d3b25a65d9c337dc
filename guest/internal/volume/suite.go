package volume

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/policy"
)

// suite is a cipher as dm-crypt wants it. Every suite keeps IV and tag together in the tagstore.TagBytes of a block.
type suite struct {
	name     policy.Suite
	cipher   string
	keyBytes int
}

var suites = map[policy.Suite]suite{
	// The nonce is 16 random bytes for each write. With a nonce that repeats, as plain64 has it, AEGIS is broken.
	policy.AEGIS128Random: {policy.AEGIS128Random, "capi:aegis128-random", 16},
	// 32 bytes for HMAC and twice 32 for XTS; 16 bytes of IV leave 16 for the tag.
	policy.AESXTSRandomHMACSHA256: {policy.AESXTSRandomHMACSHA256, "capi:authenc(hmac(sha256),xts(aes))-random", 96},
	// The sector's number is the IV, so that all 32 bytes are tag.
	policy.AESXTSPlain64HMACSHA256: {policy.AESXTSPlain64HMACSHA256, "capi:authenc(hmac(sha256),xts(aes))-plain64", 96},
}

// plan is a volume's policy as this package carries it out.
type plan struct {
	layering layering
	suites   []suite // best first
	fs       filesystem.Type
	options  filesystem.Options
	min      uint64 // bytes
	max      uint64 // bytes
}

// layering is what lies between what the policy wants of a disk and the file system. What it sets up goes into the volume's layers, and into
// kept what outlives a close.
type layering interface {
	// length is how many bytes the file system has of so many of the disk; 0 where that is known when create has been called, and not before.
	length(disk uint64) uint64
	// create makes it new, with the first suite that the kernel has and a key of its own.
	create(ctx context.Context, m *Manager, v *volume) error
	// open sets up again what create made and a clean close took down.
	open(ctx context.Context, m *Manager, v *volume) error
}

var layerings = map[policy.Layering]layering{
	policy.MemoryTags: memoryTags{},
	policy.LUKS2:      diskTags{},
}

// newPlan refuses what the policy may say and this version cannot do.
func newPlan(spec policy.Volume) (plan, error) {
	if spec.Mode != policy.Ephemeral {
		return plan{}, fmt.Errorf("mode %q is not supported yet: %w", spec.Mode, errdefs.ErrFailedPrecondition)
	}
	layering, ok := layerings[spec.Layering]
	if !ok {
		return plan{}, fmt.Errorf("layering %q is not supported yet: %w", spec.Layering, errdefs.ErrFailedPrecondition)
	}
	fs, ok := fileSystemTypes[spec.FSType]
	if !ok {
		return plan{}, fmt.Errorf("file system %q is not supported: %w", spec.FSType, errdefs.ErrFailedPrecondition)
	}
	p := plan{layering: layering, fs: fs, min: spec.Size.Min, max: spec.Size.Max}
	for _, name := range spec.Suites {
		s, ok := suites[name]
		if !ok {
			return plan{}, fmt.Errorf("suite %q is not supported yet: %w", name, errdefs.ErrFailedPrecondition)
		}
		p.suites = append(p.suites, s)
	}
	if len(p.suites) == 0 {
		return plan{}, fmt.Errorf("no suite: %w", errdefs.ErrInvalidArgument)
	}
	for _, option := range spec.Options {
		attribute, isAttribute := attributes[option]
		flag, isFlag := flags[option]
		switch {
		case isAttribute:
			p.options.Attributes |= attribute
		case isFlag:
			p.options.Flags = append(p.options.Flags, flag)
		default:
			return plan{}, fmt.Errorf("mount option %q is not supported: %w", option, errdefs.ErrFailedPrecondition)
		}
	}
	return p, nil
}

// length is how much of a disk the volume uses, in bytes.
func (p plan) length(disk uint64) (uint64, error) {
	if disk < p.min {
		return 0, fmt.Errorf("the disk has %d bytes, the policy wants at least %d: %w", disk, p.min, errdefs.ErrFailedPrecondition)
	}
	length := min(disk, p.max)
	length -= length % policy.BlockSize
	if least := p.fs.MinBytes(); length < least {
		return 0, fmt.Errorf("%d bytes are too few for %v, which needs %d: %w", length, p.fs, least, errdefs.ErrFailedPrecondition)
	}
	return length, nil
}

var fileSystemTypes = map[policy.FSType]filesystem.Type{policy.Ext4: filesystem.Ext4, policy.XFS: filesystem.XFS}

var attributes = map[policy.Option]int{
	policy.NoSUID:      unix.MOUNT_ATTR_NOSUID,
	policy.NoDev:       unix.MOUNT_ATTR_NODEV,
	policy.NoExec:      unix.MOUNT_ATTR_NOEXEC,
	policy.NoATime:     unix.MOUNT_ATTR_NOATIME,
	policy.RelATime:    unix.MOUNT_ATTR_RELATIME,
	policy.StrictATime: unix.MOUNT_ATTR_STRICTATIME,
	policy.NoDirATime:  unix.MOUNT_ATTR_NODIRATIME,
}

var flags = map[policy.Option]string{
	policy.LazyTime: "lazytime",
	policy.Sync:     "sync",
	policy.DirSync:  "dirsync",
}
