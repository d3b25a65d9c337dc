package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Options says how a file system is mounted.
type Options struct {
	Attributes int      // of the mount: unix.MOUNT_ATTR_…
	Flags      []string // of the file system, without a value
}

// Mount is a mounted file system. Between Detach and Attach no path leads to it in any mount namespace, only the file descriptor
// that is held here. It is not safe for use by several goroutines at once.
type Mount struct {
	kind   Type
	device blockdev.Number
	node   string
	mount  int      // the mount, attached or not
	root   *os.File // the root folder, for syncfs; sees every error since the file system was mounted
	disk   *os.File // the device, for fsync; likewise
	dir    string   // where the mount is attached, else empty
}

// Open mounts the file system on a device. link is the name of the device that the mount table shows.
func (t Type) Open(ctx context.Context, link, node string, number blockdev.Number, options Options) (_ *Mount, err error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	m := &Mount{kind: t, device: number, node: node, mount: -1}
	defer func() {
		if err != nil {
			m.letGo()
		}
	}()
	if m.disk, err = blockdev.Open(node, number, os.O_RDONLY); err != nil {
		return nil, err
	}
	if m.mount, err = t.mountDetached(link, options); err != nil {
		return nil, err
	}
	root, err := unix.Openat(m.mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root of new mount: %w", err)
	}
	m.root = os.NewFile(uintptr(root), link)
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return nil, fmt.Errorf("stat root of new mount: %w", err)
	}
	if blockdev.FromDev(st.Dev) != number {
		return nil, fmt.Errorf("mounted %v for %v: %w", blockdev.FromDev(st.Dev), number, errdefs.ErrFailedPrecondition)
	}
	if t == XFS {
		if err := setXFSErrorPolicy(m.disk); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// ours are the options that every mount of a type has.
func (t Type) ours() ([]string, error) {
	switch t {
	case Ext4:
		return []string{
			// After damage the file system takes no more writes, where a container would build on it.
			"errors=remount-ro",
			// The kernel's thread that zeroes inode tables in the background would write, and make tags for, space that nobody uses.
			"noinit_itable",
		}, nil
	case XFS:
		// Every volume has an UUID of its own, so xfs may refuse to mount one twice ("nouuid" is not set).
		return []string{"noquota"}, nil
	default:
		return nil, t.unknown()
	}
}

func (t Type) mountDetached(link string, options Options) (int, error) {
	ours, err := t.ours()
	if err != nil {
		return -1, err
	}
	fs, err := unix.Fsopen(string(t), unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w: %w", t, errdefs.ErrFailedPrecondition, err)
	}
	defer unix.Close(fs)
	for _, option := range slices.Concat([]string{"source=" + link}, ours, options.Flags) {
		if err := set(fs, option); err != nil {
			return -1, fmt.Errorf("mount option %s: %w", option, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("mount: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, options.Attributes)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", err)
	}
	return mount, nil
}

// set gives an option to a file system that is not mounted yet.
func set(fs int, option string) error {
	if key, value, ok := strings.Cut(option, "="); ok {
		return unix.FsconfigSetString(fs, key, value)
	}
	return unix.FsconfigSetFlag(fs, option)
}

// Attach makes dir, which must not exist, and attaches the mount there. dir must be on a Place.
func (m *Mount) Attach(dir string) error {
	if m.dir != "" {
		return fmt.Errorf("mount is attached already: %w", errdefs.ErrFailedPrecondition)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := unix.MoveMount(m.mount, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return errors.Join(fmt.Errorf("attach mount: %w", err), os.Remove(dir))
	}
	m.dir = dir
	return nil
}

// Detach takes the mount from its path; what was bound from there stays. It does nothing when the mount is not attached.
//
// A mount that was attached once can be detached only by umount, which is its end. So a clone of it takes its place, made while it is
// still attached, since kernels before 6.15 clone no detached mount.
func (m *Mount) Detach() error {
	if m.dir == "" {
		return nil
	}
	clone, err := unix.OpenTree(m.mount, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("clone mount: %w", err)
	}
	err = m.leave()
	if m.dir != "" {
		unix.Close(clone)
		return err
	}
	unix.Close(m.mount)
	m.mount = clone
	return err
}

// leave ends the attached mount.
func (m *Mount) leave() error {
	// By descriptor, so that it is our mount that goes, and with it whatever was mounted over it, not what was mounted over it alone.
	if err := unix.Unmount(fmt.Sprintf("/proc/self/fd/%d", m.mount), unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach mount: %w", err)
	}
	dir := m.dir
	m.dir = ""
	// This fails when anything is still mounted here, and ends the copies that mount namespaces made meanwhile inherited.
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("detach mount: %w", err)
	}
	return nil
}

// Usage says how full the file system is.
func (m *Mount) Usage() (unix.Statfs_t, error) {
	var usage unix.Statfs_t
	if err := unix.Fstatfs(m.mount, &usage); err != nil {
		return unix.Statfs_t{}, fmt.Errorf("statfs of %s: %w", m.node, err)
	}
	return usage, nil
}

// Close writes everything back and ends the mount. When it returns without an error, all that was ever written to the file system is on
// the device and nobody has it mounted. The mount is gone in any case; a second call does nothing.
//
// The errors: whatever the device reported for any write since Open; errdefs.ErrDataLoss when the file system has found itself damaged;
// and errdefs.ErrUnavailable when ctx ends while another mount namespace still has the file system mounted, with the processes that have.
func (m *Mount) Close(ctx context.Context) error {
	if m.disk == nil {
		return nil
	}
	defer m.letGo()
	// The first error is the one to tell; what follows comes of it.
	var err error
	if m.dir != "" {
		err = m.leave()
	}
	if syncErr := unix.Syncfs(int(m.root.Fd())); syncErr != nil && err == nil {
		err = fmt.Errorf("write back file system: %w", syncErr)
	}
	if settleErr := m.settle(ctx); settleErr != nil && err == nil {
		err = settleErr
	}
	m.root.Close()
	unix.Close(m.mount)
	m.mount = -1
	// The file system writes its superblock when its last mount ends, and tells nobody whether it could. The device knows.
	if waitErr := blockdev.WaitUnused(ctx, m.node, m.device); waitErr != nil {
		if err == nil {
			err = fmt.Errorf("file system is still mounted%s: %w", mountedIn(m.device), waitErr)
		}
		return err
	}
	if syncErr := m.disk.Sync(); syncErr != nil && err == nil {
		err = fmt.Errorf("flush device: %w", syncErr)
	}
	return err
}

// settle finds out what the end of the mount tells nobody.
func (m *Mount) settle(ctx context.Context) error {
	if m.kind == XFS {
		return m.settleXFS(ctx)
	}
	return ext4Damage(m.disk)
}

func (m *Mount) letGo() {
	if m.mount >= 0 {
		unix.Close(m.mount)
		m.mount = -1
	}
	m.root.Close() // a nil file's Close does nothing
	m.disk.Close()
	m.root, m.disk = nil, nil
}

// mountedIn names the mount namespaces that have a file system, each by one process, for the message of an error: " by process 7, 8".
func mountedIn(device blockdev.Number) string {
	namespaces, _ := filepath.Glob("/proc/[0-9]*/ns/mnt")
	seen := map[string]bool{}
	var found []string
	for _, path := range namespaces {
		namespace, err := os.Readlink(path)
		if err != nil || seen[namespace] {
			continue
		}
		seen[namespace] = true
		process := filepath.Dir(filepath.Dir(path))
		table, _ := os.ReadFile(filepath.Join(process, "mountinfo"))
		// mountinfo(5): the third field of each line is the number.
		if strings.Contains(string(table), " "+device.String()+" ") {
			found = append(found, filepath.Base(process))
		}
	}
	if len(found) == 0 {
		return ""
	}
	return " by process " + strings.Join(found, ", ")
}
