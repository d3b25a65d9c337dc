package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// failing is the target of a mapping that was killed: each read and write is an EIO.
//
//	0 SECTORS error
type failing struct{}

func (failing) kind() string { return "error" }

func (failing) params() string { return "" }

// Kill ends a mapping, also one that cannot be removed because somebody holds it open: then every read and write fails from now on, what
// stood behind it is let go, its key overwritten, and the mapping goes with its last user. One that is not there is no error.
// held says that it has users still.
//
// The kernel waits for I/O that is under way, which a disk that does not answer never ends. When ctx is over the error is
// errdefs.ErrUnavailable, and Kill goes on by itself: what its users ask for has to wait, and fails as soon as the disk has answered.
//
// No end of a context helps where nobody holds an Integrity mapping and its disk does not answer, for the removal waits for it. Kill
// what is below first.
func (c *Control) Kill(ctx context.Context, name string) (held bool, err error) {
	if held, err = c.letGo(name); err != nil || !held {
		return false, err
	}
	if err := c.fail(ctx, name); errors.Is(err, unix.ENXIO) {
		return false, nil // its last user went meanwhile
	} else if err != nil {
		return true, err
	}
	return true, nil
}

// letGo removes a mapping and its link. Where somebody holds it open, the kernel will remove it as soon as nobody does.
func (c *Control) letGo(name string) (held bool, err error) {
	remove := newMessage(name)
	remove.Flags |= unix.DM_DEFERRED_REMOVE
	remove.Event_nr = udevFlags
	if _, err := c.send(unix.DM_DEV_REMOVE, remove, nil); err != nil && !errors.Is(err, unix.ENXIO) {
		return false, fmt.Errorf("remove mapping %s: %w", name, err)
	} else if err == nil {
		// The kernel leaves the flag where it had to put the removal off.
		held = remove.Flags&unix.DM_DEFERRED_REMOVE != 0
	}
	if err := os.Remove(filepath.Join(c.dev, "mapper", name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return held, err
	}
	return held, nil
}

// fail makes a mapping fail. It goes on when ctx is over, once for each mapping, for nothing would end the system call: Linux 6.12
// restarts one that a signal interrupts.
func (c *Control) fail(ctx context.Context, name string) error {
	failed := c.failing.DoChan(name, func() (any, error) { return nil, c.replace(name, failing{}) })
	select {
	case result := <-failed:
		return result.Err
	case <-ctx.Done():
		return fmt.Errorf("stop mapping %s: I/O under way does not end: %w: %w", name, ctx.Err(), errdefs.ErrUnavailable)
	}
}

// replace puts a target in the place of a mapping's. Nothing is written back first.
func (c *Control) replace(name string, target Target) error {
	spec, _, err := c.target(name, unix.DM_STATUS_TABLE_FLAG)
	if errdefs.IsNotFound(err) {
		return nil // without a table it fails already
	}
	if err != nil {
		return err
	}
	load := newMessage(name)
	load.Target_count = 1
	if _, err := c.send(unix.DM_TABLE_LOAD, load, encodeTarget(spec.Length, target)); err != nil {
		return fmt.Errorf("load %s table of mapping %s: %w", target.kind(), name, err)
	}
	for {
		suspend := newMessage(name)
		suspend.Flags |= unix.DM_SUSPEND_FLAG | unix.DM_NOFLUSH_FLAG | unix.DM_SKIP_LOCKFS_FLAG
		_, err := c.send(unix.DM_DEV_SUSPEND, suspend, nil)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("stop mapping %s: %w", name, err)
		}
	}
	resume := newMessage(name)
	resume.Event_nr = udevFlags
	if _, err := c.send(unix.DM_DEV_SUSPEND, resume, nil); err != nil {
		return fmt.Errorf("start %s table of mapping %s: %w", target.kind(), name, err)
	}
	return nil
}
