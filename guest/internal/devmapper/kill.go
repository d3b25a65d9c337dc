package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// failing is the target of a mapping that was killed: each read and write is an EIO.
//
//	0 SECTORS error
type failing struct{}

func (failing) kind() string { return "error" }

func (failing) params() string { return "" }

// Kill ends a mapping, also one that cannot be removed because somebody holds it open: then every read and write fails from now on, what stood
// behind it is let go, its key overwritten, and the mapping goes with its last user. One that is not there is no error. held
// says that it has users still.
//
// The kernel waits for I/O that is under way, which a disk that does not answer never ends. When ctx is over the error is
// errdefs.ErrUnavailable: the mapping is as before, but still goes with its last user. No end of a context helps where an Integrity target
// lies on such a disk, because the kernel then waits for it in a way that nothing interrupts. Kill what is below it first.
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

// fail puts a failing target in the place of a mapping's.
func (c *Control) fail(ctx context.Context, name string) error {
	spec, _, err := c.target(name, unix.DM_STATUS_TABLE_FLAG)
	if errdefs.IsNotFound(err) {
		return nil // without a table it fails already
	}
	if err != nil {
		return err
	}
	load := newMessage(name)
	load.Target_count = 1
	if _, err := c.send(unix.DM_TABLE_LOAD, load, encodeTarget(spec.Length, failing{})); err != nil {
		return fmt.Errorf("load error table of mapping %s: %w", name, err)
	}
	err = interruptible(ctx, func() error {
		suspend := newMessage(name)
		// Nothing is written back first, neither by the file system nor by those who wait for room.
		suspend.Flags |= unix.DM_SUSPEND_FLAG | unix.DM_NOFLUSH_FLAG | unix.DM_SKIP_LOCKFS_FLAG
		_, err := c.send(unix.DM_DEV_SUSPEND, suspend, nil)
		return err
	})
	if err != nil {
		if _, clearErr := c.send(unix.DM_TABLE_CLEAR, newMessage(name), nil); clearErr != nil {
			err = fmt.Errorf("%w; clear error table: %w", err, clearErr)
		}
		return fmt.Errorf("stop mapping %s: %w", name, err)
	}
	resume := newMessage(name)
	resume.Event_nr = udevFlags
	if _, err := c.send(unix.DM_DEV_SUSPEND, resume, nil); err != nil {
		return fmt.Errorf("start error table of mapping %s: %w", name, err)
	}
	return nil
}

// interruptible makes a system call that waits for as long as it takes unless a signal interrupts it, and interrupts it when ctx is
// over. The error is errdefs.ErrUnavailable then.
func interruptible(ctx context.Context, call func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	process, thread := unix.Getpid(), unix.Gettid()
	done := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(done)
	wg.Go(func() {
		select {
		case <-done:
			return
		case <-ctx.Done():
		}
		// Again and again, for the thread may be on its way into the kernel still. The Go runtime uses this signal for itself and
		// takes it at any time.
		for {
			_ = unix.Tgkill(process, thread, unix.SIGURG)
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	for {
		err := call()
		if !errors.Is(err, unix.EINTR) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("I/O under way does not end: %w: %w", ctx.Err(), errdefs.ErrUnavailable)
		}
	}
}
