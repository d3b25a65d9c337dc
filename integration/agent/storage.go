package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// storages are the mounts that requests asked for. One that several containers
// name by the same mount point is mounted once.
type storages struct {
	mu    sync.Mutex
	users map[string]int // mount point → number of users
}

// add mounts the storages in order and returns their mount points; on an error
// it leaves none of them.
func (s *storages) add(ctx context.Context, list []*pb.Storage) (mounts []string, err error) {
	defer func() {
		if err != nil {
			err, mounts = errors.Join(err, s.release(mounts)), nil
		}
	}()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range list {
		p := filepath.Clean(st.MountPoint)
		if s.users[p] == 0 {
			if err := mountStorage(ctx, st); err != nil {
				return mounts, fmt.Errorf("storage %s at %s: %w", st.Driver, st.MountPoint, err)
			}
		}
		s.users[p]++
		mounts = append(mounts, p)
	}
	return mounts, nil
}

// release drops one user of each mount point and unmounts what has none left,
// in reverse order.
func (s *storages) release(mounts []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for i := len(mounts) - 1; i >= 0; i-- {
		p := mounts[i]
		if s.users[p]--; s.users[p] > 0 {
			continue
		}
		delete(s.users, p)
		if err := mount.Unmount(p, unix.MNT_DETACH); err != nil { // no error where nothing is mounted
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// mountStorage does for one storage what the real agent's handler of that
// driver does.
func mountStorage(ctx context.Context, st *pb.Storage) error {
	if st.FsGroup != nil {
		return fmt.Errorf("fs_group: %w", errdefs.ErrNotImplemented)
	}
	m := mount.Mount{Type: st.Fstype, Source: st.Source}
	gid, mode := -1, os.FileMode(0)
	for _, o := range st.Options {
		key, value, _ := strings.Cut(o, "=")
		var n uint64
		var err error
		switch {
		case key == "fsgid":
			n, err = strconv.ParseUint(value, 10, 31)
			gid = int(n)
		case key == "mode" && st.Driver == "local":
			n, err = strconv.ParseUint(value, 8, 12)
			mode = os.FileMode(n)
		default:
			m.Options = append(m.Options, o)
		}
		if err != nil {
			return fmt.Errorf("option %q: %w: %w", o, errdefs.ErrInvalidArgument, err)
		}
	}
	if err := os.MkdirAll(st.MountPoint, 0o755); err != nil {
		return err
	}
	switch st.Driver {
	case "blk":
		if !strings.HasPrefix(st.Source, "/dev/") {
			node, _, _, err := waitBlockDevice(ctx, st.Source)
			if err != nil {
				return err
			}
			m.Source = node
		}
		fallthrough
	case "9p", "virtio-fs", "ephemeral", "overlayfs", "bind":
		if err := m.Mount(st.MountPoint); err != nil {
			return err
		}
	case "local":
	default:
		return fmt.Errorf("driver: %w", errdefs.ErrNotImplemented)
	}
	if err := setMode(st.MountPoint, gid, mode); err != nil {
		if st.Driver != "local" {
			err = errors.Join(err, mount.Unmount(st.MountPoint, unix.MNT_DETACH))
		}
		return err
	}
	return nil
}

// setMode gives a memory-backed directory to the pod's fsGroup; -1 and 0
// change nothing.
func setMode(dir string, gid int, mode os.FileMode) error {
	if mode != 0 {
		if err := os.Chmod(dir, mode); err != nil {
			return err
		}
	}
	if gid < 0 {
		return nil
	}
	if err := os.Chown(dir, -1, gid); err != nil {
		return err
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	return os.Chmod(dir, fi.Mode()|os.ModeSetgid)
}

func (s *sandbox) UpdateEphemeralMounts(ctx context.Context, r *pb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	for _, st := range r.Storages {
		if st.Driver != "ephemeral" {
			return nil, fmt.Errorf("driver %q: %w", st.Driver, errdefs.ErrInvalidArgument)
		}
		if len(st.Options) == 0 {
			continue
		}
		if err := mountStorage(ctx, st); err != nil { // options say "remount"
			return nil, err
		}
	}
	return &emptypb.Empty{}, nil
}

// waitBlockDevice waits for the disk at a PCI path as Kata writes it: slots of
// the bridges, then of the device, in hex and separated by slashes.
func waitBlockDevice(ctx context.Context, pciPath string) (node string, major, minor int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		node, major, minor, err = findBlockDevice("/sys", pciPath)
		if !errors.Is(err, os.ErrNotExist) {
			return node, major, minor, err
		}
		select {
		case <-ctx.Done():
			return "", 0, 0, fmt.Errorf("no disk at PCI path %s: %w: %w", pciPath, errdefs.ErrUnavailable, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func findBlockDevice(sysfs, pciPath string) (node string, major, minor int64, err error) {
	dir, bus := filepath.Join(sysfs, "devices/pci0000:00"), "0000:00"
	for i, slot := range strings.Split(pciPath, "/") {
		if n, err := strconv.ParseUint(slot, 16, 8); err != nil || n > 31 {
			return "", 0, 0, fmt.Errorf("PCI path %q: %w", pciPath, errdefs.ErrInvalidArgument)
		}
		if i > 0 { // the bridge's secondary bus
			if bus, err = only(filepath.Join(dir, "pci_bus/*")); err != nil {
				return "", 0, 0, err
			}
			bus = filepath.Base(bus)
		}
		dir = filepath.Join(dir, bus+":"+slot+".0")
	}
	disk, err := only(filepath.Join(dir, "virtio*/block/*"))
	if err != nil {
		return "", 0, 0, err
	}
	b, err := os.ReadFile(filepath.Join(disk, "dev"))
	if err != nil {
		return "", 0, 0, err
	}
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		return "", 0, 0, err
	}
	node = filepath.Join("/dev", filepath.Base(disk))
	_, err = os.Stat(node) // devtmpfs may be later than sysfs
	return node, major, minor, err
}

// only returns the one path that matches, os.ErrNotExist when there is none.
func only(pattern string) (string, error) {
	found, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s: %w", pattern, os.ErrNotExist)
	}
	return found[0], nil
}
