// Package mountns looks at the mount namespaces of containers from outside: which processes
// a container has, and what is mounted where for them. What it says is the kernel's word,
// not the agent's or the host's.
package mountns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount is a file system that a container must see.
type Mount struct {
	Path         string
	Major, Minor uint32
	// Options that the mount must have, among "ro", "rw", "nosuid", "nodev" and the like,
	// as /proc/PID/mountinfo spells them; "strictatime" is what it does not show.
	Options []string
}

// Processes finds the processes of containers below a proc file system.
type Processes struct {
	// Proc is where the proc file system of the guest is, "/proc".
	Proc string
	// Shared are the guest's folders of which containers may have something mounted.
	Shared []string
}

// Alive reports whether the container has a process.
func (p Processes) Alive(container string) (bool, error) {
	pids, err := p.find(container)
	return len(pids) > 0, err
}

// Check looks at each process of the container. It is errdefs.ErrPermissionDenied when there
// is none, when one lives in our own mount namespace, when a wanted mount is not what a path
// leads to, when anything else is mounted below a wanted one, or when the container has a
// mount that leads out of it: the guest's own folders, a device, kernel settings to write.
func (p Processes) Check(container string, want []Mount) error {
	ours, guest, err := look(filepath.Join(p.Proc, "self"))
	if err != nil {
		return fmt.Errorf("our mount namespace: %w", err)
	}
	pids, err := p.find(container)
	if err != nil {
		return err
	}
	checked := false
	for _, pid := range pids {
		dir := filepath.Join(p.Proc, strconv.Itoa(pid))
		theirs, mounts, err := look(dir)
		if gone(err) {
			continue
		} else if err != nil {
			return fmt.Errorf("mounts of process %d: %w", pid, err)
		}
		if theirs == ours {
			return fmt.Errorf("a process of it has no mount namespace of its own: %w", errdefs.ErrPermissionDenied)
		}
		if err := checkMounts(mounts, want); err != nil {
			return err
		}
		if err := p.checkOrigins(mounts, guest, want); err != nil {
			return err
		}
		checked = true
	}
	if !checked {
		return fmt.Errorf("no process is found in its cgroup, so its mounts cannot be checked: %w", errdefs.ErrPermissionDenied)
	}
	return nil
}

// Usage says how much of something there is.
type Usage struct{ Total, Used, Available uint64 }

// Usage is the space in bytes and the inodes of a mount, as a process of the container sees
// it. It is errdefs.ErrNotFound when no process of it has that mount.
func (p Processes) Usage(container string, at Mount) (space, inodes Usage, err error) {
	pids, err := p.find(container)
	if err != nil {
		return Usage{}, Usage{}, err
	}
	for _, pid := range pids {
		var fs unix.Statfs_t
		if err := statfs(filepath.Join(p.Proc, strconv.Itoa(pid), "root"), at, &fs); err != nil {
			continue
		}
		block := uint64(fs.Frsize)
		return Usage{Total: fs.Blocks * block, Used: (fs.Blocks - fs.Bfree) * block, Available: fs.Bavail * block},
			Usage{Total: fs.Files, Used: fs.Files - fs.Ffree, Available: fs.Ffree}, nil
	}
	return Usage{}, Usage{}, fmt.Errorf("no process of container %s has it at %s: %w", container, at.Path, errdefs.ErrNotFound)
}

func statfs(root string, at Mount, fs *unix.Statfs_t) error {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, at.Path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if unix.Major(st.Dev) != at.Major || unix.Minor(st.Dev) != at.Minor {
		return unix.ENODEV
	}
	return unix.Fstatfs(fd, fs)
}

func look(dir string) (namespace string, mounts []*mountinfo.Info, err error) {
	namespace, err = os.Readlink(filepath.Join(dir, "ns/mnt"))
	if err != nil {
		return "", nil, err
	}
	f, err := os.Open(filepath.Join(dir, "mountinfo"))
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	mounts, err = mountinfo.GetMountsFromReader(f, nil)
	return namespace, mounts, err
}

// gone says that a process ended while we looked.
func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}

// find lists the processes whose cgroup is the container's: its last element is the id
// (cgroupfs), or a scope whose name ends with it (systemd).
func (p Processes) find(container string) ([]int, error) {
	entries, err := os.ReadDir(p.Proc)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cgroups, err := os.ReadFile(filepath.Join(p.Proc, e.Name(), "cgroup"))
		if gone(err) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("cgroup of process %d: %w", pid, err)
		}
		if belongs(string(cgroups), container) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// belongs reads the lines "hierarchy:controllers:path" of /proc/PID/cgroup.
func belongs(cgroups, container string) bool {
	for line := range strings.Lines(cgroups) {
		last := strings.TrimSuffix(line[strings.LastIndexByte(line, '/')+1:], "\n")
		if last == container || strings.HasSuffix(last, "-"+container+".scope") {
			return true
		}
	}
	return false
}

func checkMounts(mounts []*mountinfo.Info, want []Mount) error {
	for _, w := range want {
		m, err := resolve(mounts, w.Path)
		if err != nil {
			return err
		}
		switch {
		case m.Mountpoint != w.Path:
			return fmt.Errorf("nothing is mounted at %s, or it is hidden: %w", w.Path, errdefs.ErrPermissionDenied)
		case m.Major != int(w.Major) || m.Minor != int(w.Minor) || m.Root != "/":
			return fmt.Errorf("what is mounted at %s is not its volume: %w", w.Path, errdefs.ErrPermissionDenied)
		}
		has := strings.Split(m.Options, ",")
		for _, o := range w.Options {
			if o != "strictatime" && !slices.Contains(has, o) {
				return fmt.Errorf("the mount at %s is not %s: %w", w.Path, o, errdefs.ErrPermissionDenied)
			}
		}
	}
	for _, m := range mounts {
		below := func(w Mount) bool { return strings.HasPrefix(m.Mountpoint, w.Path+"/") }
		wanted := func(w Mount) bool { return m.Mountpoint == w.Path }
		if slices.ContainsFunc(want, below) && !slices.ContainsFunc(want, wanted) {
			return fmt.Errorf("something is mounted at %s, inside a volume: %w", m.Mountpoint, errdefs.ErrPermissionDenied)
		}
	}
	return nil
}

// resolve walks down from the root mount as a path look-up does, onto whatever is mounted
// at each element, and returns the mount in which path ends.
func resolve(mounts []*mountinfo.Info, path string) (*mountinfo.Info, error) {
	ids := map[int]bool{}
	for _, m := range mounts {
		ids[m.ID] = true
	}
	var at *mountinfo.Info
	for _, m := range mounts {
		if m.Mountpoint == "/" && !ids[m.Parent] {
			if at != nil {
				return nil, fmt.Errorf("two root mounts: %w", errdefs.ErrPermissionDenied)
			}
			at = m
		}
	}
	if at == nil {
		return nil, fmt.Errorf("no root mount: %w", errdefs.ErrPermissionDenied)
	}
	point := "/"
	for _, element := range append([]string{""}, strings.Split(strings.Trim(path, "/"), "/")...) {
		point = filepath.Join(point, element)
		// A mount over the mount over the mount: each is a child of the one before, so
		// there are no more steps than mounts.
		for range mounts {
			over, err := child(mounts, at, point)
			if err != nil {
				return nil, err
			}
			if over == nil {
				break
			}
			at = over
		}
	}
	return at, nil
}

// child finds what is mounted on parent at point, nil if nothing is.
func child(mounts []*mountinfo.Info, parent *mountinfo.Info, point string) (*mountinfo.Info, error) {
	var found *mountinfo.Info
	for _, m := range mounts {
		if m.Parent != parent.ID || m == parent || m.Mountpoint != point {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("two mounts at %s on one parent: %w", point, errdefs.ErrPermissionDenied)
		}
		found = m
	}
	return found, nil
}
