package mountns

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
)

// checkOrigins refuses mounts that lead out of the container. The agent follows the links
// that it finds at the source of a mount, in the guest's own tree, and the host serves the
// share in which they lie: whatever a request says, a link can make of it the agent's socket,
// the guest's /proc or a device's mapping. What is mounted in the end tells.
func (p Processes) checkOrigins(mounts, guest []*mountinfo.Info, want []Mount) error {
	for _, m := range mounts {
		wanted := func(w Mount) bool {
			return m.Mountpoint == w.Path && m.Major == int(w.Major) && m.Minor == int(w.Minor) && m.Root == "/"
		}
		readOnly := slices.Contains(strings.Split(m.Options, ","), "ro")
		ok := false
		switch {
		case slices.ContainsFunc(want, wanted), p.shared(m, guest):
			ok = true
		case m.Major != 0: // a block device: a volume at another path, the guest's image
		case m.FSType == "9p", m.FSType == "virtiofs": // holds nothing but the host's files
			ok = true
		case m.FSType == "sysfs", m.FSType == "cgroup2", m.FSType == "cgroup":
			ok = readOnly // uevent_helper and release_agent name programs for the kernel to run
		case slices.ContainsFunc(guest, func(g *mountinfo.Info) bool { return same(m, g) }):
			ok = m.FSType == "mqueue"
		case m.FSType == "proc":
			ok = readOnly || sysIsReadOnly(m, mounts)
		case m.FSType == "tmpfs", m.FSType == "devpts", m.FSType == "mqueue":
			ok = true // made for the container
		}
		if !ok {
			return fmt.Errorf("the mount at %.128q (%s) leads out of the container: %w", m.Mountpoint, m.FSType, errdefs.ErrPermissionDenied)
		}
	}
	return nil
}

func same(a, b *mountinfo.Info) bool { return a.Major == b.Major && a.Minor == b.Minor }

// shared reports whether m is of one of the shared folders.
func (p Processes) shared(m *mountinfo.Info, guest []*mountinfo.Info) bool {
	for _, folder := range p.Shared {
		var at *mountinfo.Info // the mount in which folder is
		for _, g := range guest {
			if within(folder, g.Mountpoint) && (at == nil || len(g.Mountpoint) >= len(at.Mountpoint)) {
				at = g
			}
		}
		if at != nil && same(m, at) && within(m.Root, path.Join(at.Root, strings.TrimPrefix(folder, at.Mountpoint))) {
			return true
		}
	}
	return false
}

// within reports whether a clean path is dir or below it.
func within(name, dir string) bool {
	return name == dir || strings.HasPrefix(name, strings.TrimSuffix(dir, "/")+"/")
}

// sysIsReadOnly reports whether the kernel's settings below a proc file system are out of
// reach: core_pattern and modprobe name programs that the kernel runs outside of every
// container, and root may write them without any capability.
func sysIsReadOnly(proc *mountinfo.Info, mounts []*mountinfo.Info) bool {
	return proc.Root == "/" && slices.ContainsFunc(mounts, func(m *mountinfo.Info) bool {
		return m.Parent == proc.ID && m.Mountpoint == path.Join(proc.Mountpoint, "sys") && slices.Contains(strings.Split(m.Options, ","), "ro")
	})
}
