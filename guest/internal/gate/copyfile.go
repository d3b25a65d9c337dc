package gate

import (
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// copyFile passes files for the share of a sandbox that has no file system of the host
// there. Kata copies only then; and where the host serves the share it could put a link
// into the agent's way after any check.
func (g *Gate) copyFile(ctx context.Context, req *agent.CopyFileRequest) (proto.Message, error) {
	release, err := g.own(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if _, _, err := g.running(); err != nil {
		return nil, err
	}
	g.mu.Lock()
	shared := g.shared
	g.mu.Unlock()
	if shared {
		return nil, fmt.Errorf("files are not copied into a sandbox with a shared file system: %w", errdefs.ErrPermissionDenied)
	}
	if err := g.allow(ctx, "CopyFile", req); err != nil {
		return nil, err
	}
	if c := g.inhabitant(req.Path); c != nil {
		return nil, fmt.Errorf("copy to %.128q refused: container %s lives there, and could put a link into the way: %w", req.Path, c.id, errdefs.ErrPermissionDenied)
	}
	if err := checkCopy(g.Run, req); err != nil {
		return nil, fmt.Errorf("copy to %.128q refused: %w", req.Path, err)
	}
	return g.forward(ctx, "CopyFile", req)
}

// inhabitant is the container, alive or not yet known to be gone, whose folder in the share has the path; nil: none.
func (g *Gate) inhabitant(name string) *container {
	below := strings.TrimPrefix(name, path.Join(g.Run, shareDir)+"/")
	id, _, _ := strings.Cut(strings.TrimPrefix(below, "passthrough/"), "/")
	g.mu.Lock()
	defer g.mu.Unlock()
	if c := g.containers[id]; c != nil && c.state != gone {
		return c
	}
	return nil
}

// shareDir is where the share is below the agent's directory.
const shareDir = "shared/containers"

// checkCopy looks for links that the agent's do_copy_file would follow when it makes missing
// parents; then makes the directory or the link; or writes the file, at its path with the
// extension "tmp" in place of its own, and renames that once it has its size. run is the
// agent's directory.
func checkCopy(run string, req *agent.CopyFileRequest) error {
	if share := path.Join(run, shareDir); path.Clean(req.Path) != req.Path || !strings.HasPrefix(req.Path, share+"/") {
		return fmt.Errorf("the path is not a clean one below %s: %w", share, errdefs.ErrPermissionDenied)
	}
	if req.Offset < 0 || req.FileSize < 0 || req.Offset > req.FileSize {
		return fmt.Errorf("offset %d of %d bytes: %w", req.Offset, req.FileSize, errdefs.ErrInvalidArgument)
	}
	kind := req.FileMode & unix.S_IFMT
	switch kind {
	case unix.S_IFDIR:
	case unix.S_IFLNK:
		// What Kubernetes makes of secrets and config maps: key → ..data/key, ..data → ..2026_11_24.
		if target := string(req.Data); target != path.Clean(target) || !filepath.IsLocal(target) {
			return fmt.Errorf("the link leads out of its folder: %w", errdefs.ErrPermissionDenied)
		}
	case unix.S_IFREG:
		tmp := strings.TrimSuffix(req.Path, extension(path.Base(req.Path))) + ".tmp"
		if err := checkPath(run, tmp, kind); err != nil {
			return err
		}
	default:
		return fmt.Errorf("mode %#o is no file, folder or link: %w", req.FileMode, errdefs.ErrPermissionDenied)
	}
	return checkPath(run, req.Path, kind)
}

// extension is what Rust's Path::set_extension replaces: the last dot and what follows, but
// for a dot that begins the name.
func extension(base string) string {
	if i := strings.LastIndexByte(base, '.'); i > 0 {
		return base[i:]
	}
	return ""
}

// checkPath walks from run to name and refuses links and mount points on the way, and at
// the end anything but a file of the kind.
func checkPath(run, name string, kind uint32) error {
	root, err := unix.Open(run, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // nothing below it either
	} else if err != nil {
		return fmt.Errorf("open %s: %w", run, err)
	}
	defer unix.Close(root)
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(root, strings.TrimPrefix(name, run+"/"), &how)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("a link, a mount point or a file is on the way: %w", errdefs.ErrPermissionDenied)
	case err != nil:
		return fmt.Errorf("look at the path: %v: %w", err, errdefs.ErrPermissionDenied)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("look at the path: %w", err)
	}
	if st.Mode&unix.S_IFMT != kind {
		return fmt.Errorf("there is a file of another type: %w", errdefs.ErrPermissionDenied)
	}
	return nil
}
