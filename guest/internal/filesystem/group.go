package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ChangePolicy says when SetGroup looks at more than the root folder. The names are those of Kubernetes' fsGroupChangePolicy.
type ChangePolicy string

const (
	// OnRootMismatch leaves a volume alone whose root folder is the group's already. The root folder is changed last, so it says that
	// everything else was.
	OnRootMismatch ChangePolicy = "OnRootMismatch"
	// Always looks at every file.
	Always ChangePolicy = "Always"
)

const (
	fileBits   = 0o660
	folderBits = 0o770 | unix.S_ISGID // what is made in the folder is the group's too

	// namesAtOnce bounds the memory that a folder's names take.
	namesAtOnce = 1024
	// lookBits open a file to look at it and to change its owner, whatever it is: nothing is followed, and no device's driver is asked.
	lookBits = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	readBits = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_CLOEXEC
)

// SetGroup gives the file system to a group, as kubelet does for fsGroup (SetVolumeOwnership of its pkg/volume): every file gets the group
// and is readable and writable for it, folders can be entered and are setgid. Of symbolic links the group alone is changed. What is as it
// should be is not written. A file that vanishes meanwhile is none; but it is for a volume that nobody uses yet.
//
// The first error ends it. After that the root folder is not the group's, so that OnRootMismatch begins anew.
func (m *Mount) SetGroup(ctx context.Context, gid uint32, policy ChangePolicy) error {
	if err := setGroup(ctx, m.root, gid, policy); err != nil {
		return fmt.Errorf("set group %d: %w", gid, err)
	}
	return nil
}

func setGroup(ctx context.Context, root *os.File, gid uint32, policy ChangePolicy) error {
	if gid == ^uint32(0) { // chown(2): leave it as it is
		return fmt.Errorf("there is no such group: %w", errdefs.ErrInvalidArgument)
	}
	if policy != OnRootMismatch && policy != Always {
		return fmt.Errorf("change policy %q: %w", string(policy), errdefs.ErrInvalidArgument)
	}
	top, err := look(int(root.Fd()))
	if err != nil {
		return err
	}
	if policy == OnRootMismatch && top.belongsTo(gid) {
		return nil
	}
	g := grouper{mount: int(root.Fd()), gid: gid}
	if err := g.walk(ctx); err != nil {
		return err
	}
	return g.change(int(root.Fd()), top)
}

// entry is what there is to know of a file.
type entry struct {
	mode uint32
	gid  uint32
}

// look describes an open file.
func look(fd int) (entry, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return entry{}, os.NewSyscallError("fstat", err)
	}
	return entry{mode: st.Mode, gid: st.Gid}, nil
}

func (e entry) isFolder() bool { return e.mode&unix.S_IFMT == unix.S_IFDIR }
func (e entry) isLink() bool   { return e.mode&unix.S_IFMT == unix.S_IFLNK }

// permissions are those that the file should have.
func (e entry) permissions() uint32 {
	switch has := e.mode & 0o7777; {
	case e.isLink():
		return has
	case e.isFolder():
		return has | folderBits
	default:
		return has | fileBits
	}
}

func (e entry) belongsTo(gid uint32) bool {
	return e.gid == gid && e.permissions() == e.mode&0o7777
}

// grouper gives the files of a mount to a group. It keeps folders that are still to be looked at as handles: those have no path whose length
// could end it, hold no file open, and lead to the same folder wherever that is moved.
type grouper struct {
	mount   int // the root folder
	gid     uint32
	pending []unix.FileHandle
}

// walk changes everything but the root folder.
func (g *grouper) walk(ctx context.Context) error {
	root, err := unix.Openat(g.mount, ".", readBits, 0)
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	if err := g.read(ctx, root); err != nil {
		return err
	}
	for len(g.pending) > 0 {
		last := len(g.pending) - 1
		handle := g.pending[last]
		g.pending = g.pending[:last]
		folder, err := unix.OpenByHandleAt(g.mount, handle, readBits)
		if errors.Is(err, unix.ESTALE) {
			continue // it vanished
		}
		if err != nil {
			return os.NewSyscallError("open_by_handle_at", err)
		}
		if err := g.read(ctx, folder); err != nil {
			return err
		}
	}
	return nil
}

// read changes what is in a folder, and closes it.
func (g *grouper) read(ctx context.Context, fd int) error {
	folder := os.NewFile(uintptr(fd), "folder")
	defer folder.Close()
	for {
		names, err := folder.Readdirnames(namesAtOnce)
		for _, name := range names {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := g.visit(fd, name); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ENOENT) { // the folder vanished
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// visit changes one file of a folder. If it is a folder too, what is in it is left for later.
func (g *grouper) visit(folder int, name string) error {
	fd, err := openBeneath(folder, name)
	if errors.Is(err, unix.ENOENT) {
		return nil // it vanished
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	e, err := look(fd)
	if err != nil {
		return err
	}
	if e.isFolder() {
		handle, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
		if err != nil {
			return os.NewSyscallError("name_to_handle_at", err)
		}
		g.pending = append(g.pending, handle)
	}
	return g.change(fd, e)
}

// openBeneath opens a file of a folder, to be looked at. It is the file itself if that is a link, and never one of another file system.
func openBeneath(folder int, name string) (int, error) {
	for {
		fd, err := unix.Openat2(folder, name, &unix.OpenHow{
			Flags:   lookBits,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		})
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue // something was renamed meanwhile
		case err != nil:
			return -1, os.NewSyscallError("openat2", err)
		}
		return fd, nil
	}
}

// change changes an open file. The group comes first: changing it takes setuid and setgid away, and kubelet leaves those as they were.
func (g *grouper) change(fd int, e entry) error {
	if e.belongsTo(g.gid) {
		return nil
	}
	if e.gid != g.gid {
		if err := unix.Fchownat(fd, "", -1, int(g.gid), unix.AT_EMPTY_PATH); err != nil {
			return os.NewSyscallError("fchownat", err)
		}
	}
	if e.isLink() {
		return nil
	}
	// fchmod(2) does not take a file that was opened with O_PATH, and the system call that does is new in Linux 6.6.
	return os.NewSyscallError("chmod", unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), e.permissions()))
}
