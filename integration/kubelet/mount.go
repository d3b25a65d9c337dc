package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// mount stages a volume with a file system (MountDevice) and publishes it (SetUpAt). One of the pod's manifest is not staged.
func (k *kubelet) mount(ctx context.Context, v *volume) error {
	if !v.inline {
		if err := saveData(filepath.Dir(v.staging()), map[string]string{"volumeHandle": v.handle, "driverName": driverName}); err != nil {
			return err
		}
		if err := k.stage(ctx, v); err != nil {
			return err
		}
	}
	if err := v.save(k.pod, k.node); err != nil {
		return err
	}
	return k.publish(ctx, v)
}

// unmount is TearDownAt and UnmountDevice.
func (k *kubelet) unmount(ctx context.Context, v *volume) error {
	if err := k.unpublish(ctx, v); err != nil {
		return err
	}
	if err := removeMount(v.target(k.pod)); err != nil || v.inline {
		return err
	}
	if err := k.unstage(ctx, v); err != nil {
		return err
	}
	return removeMount(v.staging())
}

// removeMount removes what kubelet made for a mount, and the mount's folder if the driver left it: each must be empty.
func removeMount(folder string) error {
	dir := filepath.Dir(folder)
	for _, path := range []string{folder, filepath.Join(dir, dataName), dir} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
