package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// mapDevice stages a raw block volume and publishes it (SetUpDevice, MapPodDevice). Then kubelet binds the device once more, links to it in
// the pod's folder, and keeps it open by a loop device of its own (MapBlockVolume).
func (k *kubelet) mapDevice(ctx context.Context, v *volume) error {
	if err := v.save(k.pod, k.node); err != nil {
		return err
	}
	if err := k.stage(ctx, v); err != nil {
		return err
	}
	if err := k.publish(ctx, v); err != nil {
		return err
	}
	target, global, link := v.target(k.pod), v.globalMap(k.pod), v.device(k.pod)
	for _, dir := range []string{filepath.Dir(global), filepath.Dir(link)} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return err
		}
	}
	// A kubelet that was started again finds what the one before it made.
	info, err := os.Stat(global)
	if errors.Is(err, os.ErrNotExist) {
		err = os.WriteFile(global, nil, 0o750)
	}
	if err != nil {
		return err
	}
	if info == nil || info.Mode()&os.ModeDevice == 0 {
		if err := unix.Mount(target, global, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s on %s: %w", target, global, err)
		}
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, link); err != nil {
		return err
	}
	if device, err := loopOf(global); err != nil || device != "" {
		return err
	}
	return losetup("-f", global)
}

// unmapDevice is UnmapBlockVolume, UnmapPodDevice and TearDownDevice.
func (k *kubelet) unmapDevice(ctx context.Context, v *volume) error {
	global := v.globalMap(k.pod)
	device, err := loopOf(global)
	if err != nil {
		return err
	}
	if device != "" {
		if err := losetup("-d", device); err != nil {
			return err
		}
	}
	if err := os.Remove(v.device(k.pod)); err != nil {
		return err
	}
	if err := unix.Unmount(global, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", global, err)
	}
	if err := os.Remove(global); err != nil {
		return err
	}
	if err := k.unpublish(ctx, v); err != nil {
		return err
	}
	if err := k.unstage(ctx, v); err != nil {
		return err
	}
	// kubelet only logs what of this fails: then a driver has left something.
	for _, path := range []string{v.staging(), filepath.Dir(v.target(k.pod))} {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return os.RemoveAll(filepath.Join(deviceDir, v.spec))
}

// loopOf finds the loop device that has a path for its backing file. Without one it is empty.
func loopOf(path string) (string, error) {
	attached, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", err
	}
	for _, file := range attached {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == path {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(file))), nil
		}
	}
	return "", nil
}

func losetup(args ...string) error {
	if out, err := exec.Command("losetup", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("losetup %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
