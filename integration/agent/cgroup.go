package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2"
)

const cgroupRoot = "/sys/fs/cgroup"

func cgroupOf(pid int) (string, error) { return cgroup2.PidGroupPath(pid) }

// killCgroup ends every process in a container's cgroup and waits for that:
// runc leaves some alive when the container is not PID 1 of its namespace, and
// they would hold the container's mounts. An empty name means no cgroup yet.
func killCgroup(ctx context.Context, group string) error {
	if group == "" {
		return nil
	}
	dir := filepath.Join(cgroupRoot, group)
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill all processes: %w", err)
	}
	for {
		events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		if errors.Is(err, fs.ErrNotExist) || bytes.Contains(events, []byte("populated 0")) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes are still there after SIGKILL: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
