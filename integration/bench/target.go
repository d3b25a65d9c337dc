package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// target is one way to make a volume of a disk.
type target struct {
	name string
	// start does what does not count as making the volume. What it and what it returns have done is in the volume, also when they fail.
	start func(ctx context.Context, v *volume) (open, error)
}

// open makes a volume of a disk, from the plugged disk to the mounted file system, and gives the time that it took.
type open func(ctx context.Context, d disk) (time.Duration, error)

// volume is a mounted file system.
type volume struct {
	dir    string
	before float64                                    // bytes of memory that were available before it was made
	tags   func(ctx context.Context) (float64, error) // bytes of guest memory for integrity tags; nil where there are none
	undo   []func(ctx context.Context) error
}

func (v *volume) onClose(undo func(ctx context.Context) error) { v.undo = append(v.undo, undo) }

func (v *volume) close(ctx context.Context) error {
	var errs []error
	for len(v.undo) > 0 {
		last := len(v.undo) - 1
		errs = append(errs, v.undo[last](ctx))
		v.undo = v.undo[:last]
	}
	return errors.Join(errs...)
}

// plain is a target for which nothing has to be started. format gives the block device that has the file system.
func plain(name string, format func(ctx context.Context, v *volume, d disk) (node string, err error)) target {
	return target{name, func(_ context.Context, v *volume) (open, error) {
		return func(ctx context.Context, d disk) (time.Duration, error) {
			began := time.Now()
			node, err := format(ctx, v, d)
			if err != nil {
				return 0, err
			}
			err = v.mount(node)
			return time.Since(began), err
		}, nil
	}}
}

// mount mounts the file system. The kernel's thread that zeroes inode tables later would write during the measurements, and on some
// targets twice; it is off everywhere.
func (v *volume) mount(node string) error {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	v.onClose(func(context.Context) error { return os.Remove(dir) })
	if err := unix.Mount(node, dir, "ext4", unix.MS_NOATIME, "noinit_itable"); err != nil {
		return fmt.Errorf("mount %s: %w", node, err)
	}
	v.onClose(func(context.Context) error { return os.NewSyscallError("umount", unix.Unmount(dir, 0)) })
	v.dir = dir
	return nil
}

// raw is the disk as it is.
func raw(ctx context.Context, _ *volume, d disk) (string, error) {
	return d.node(), mkfs(ctx, d.node())
}

// dmCrypt encrypts and does no more: what is changed or replayed decrypts to something else, or to something old.
func dmCrypt(ctx context.Context, v *volume, d disk) (string, error) {
	const keyBytes = 64 // two keys of AES-256, as cryptsetup's LUKS2 has for xts
	name := "bench_" + d.name
	if _, err := command(ctx, random(keyBytes), "cryptsetup", "open", "--batch-mode", "--type", "plain", "--cipher", "aes-xts-plain64",
		"--key-size", fmt.Sprint(8*keyBytes), "--sector-size", "4096", "--key-file", "-", d.node(), name); err != nil {
		return "", err
	}
	v.onClose(closeMapping(name))
	node := "/dev/mapper/" + name
	return node, mkfs(ctx, node)
}

func mkfs(ctx context.Context, node string) error {
	_, err := command(ctx, nil, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", node)
	return err
}

func closeMapping(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := command(ctx, nil, "cryptsetup", "close", name)
		return err
	}
}

// scratch makes an empty file in memory of the given size.
func (v *volume) scratch(name string, size int64) (string, error) {
	file := filepath.Join("/run", name)
	f, err := os.Create(file)
	if err != nil {
		return "", err
	}
	v.onClose(func(context.Context) error { return os.Remove(file) })
	return file, errors.Join(f.Truncate(size), f.Close())
}

// command runs a program and gives what it wrote on standard output.
func command(ctx context.Context, stdin []byte, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	return output(cmd)
}

// output is cmd.Output with what the command said on standard error in the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
