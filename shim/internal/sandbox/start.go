package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/internal/bundle"
	"github.com/sealvol/sealvol/shim/internal/config"
)

// startTime bounds how long one `start` waits for another one of its sandbox.
const startTime = 30 * time.Second

// Start does what containerd's `start` asks for, in the bundle's folder. It
// gives the answer for stdout, and what is to be called when that is written:
// a sandbox whose answer nobody got is undone. For a container whose sandbox
// the stock shim runs without us the error is an errdefs.ErrNotImplemented.
func Start(ctx context.Context, c config.Config, h Host, call Call) (answer []byte, done func() error, err error) {
	here, err := os.Getwd()
	if err != nil {
		return nil, nil, err
	}
	id, own, err := bundle.Sandbox(here, call.ID)
	if err != nil {
		return nil, nil, err
	}
	d, err := newDir(c.StateDir, call.Namespace, id)
	if err != nil {
		return nil, nil, err
	}
	lock, err := d.lock(own)
	switch {
	case errdefs.IsUnavailable(err):
		if err := d.linkFrom(here); err != nil {
			return nil, nil, err
		}
		answer, err := d.answer(ctx)
		return answer, func() error { return nil }, err
	case errdefs.IsNotFound(err) && !own:
		// The bundles of a sandbox are side by side; Kata's shim counts on it too.
		if _, err := linked(filepath.Join(filepath.Dir(here), id)); err == nil {
			return nil, nil, fmt.Errorf("sandbox %s has ended: %w", id, errdefs.ErrUnavailable)
		}
		return nil, nil, fmt.Errorf("sandbox %s is not ours: %w", id, errdefs.ErrNotImplemented)
	case err != nil:
		return nil, nil, err
	}
	defer lock.Close() // The daemon has the same lock, in its own descriptor.
	if !own {
		return nil, nil, fmt.Errorf("the shim of sandbox %s has died: %w", id, errdefs.ErrUnavailable)
	}
	if err := sweep(c, h, call); err != nil {
		h.Log.Error("look for orphans", "error", err)
	}
	p, err := d.startDaemon(ctx, h, call, here, lock)
	if err != nil {
		return nil, nil, errors.Join(err, d.remove())
	}
	answer, err = p.receive()
	if errdefs.IsAborted(err) {
		// It was killed, and containerd calls no `delete` for what never started.
		endErr := d.endKilled(ctx, h, call)
		if endErr == nil {
			endErr = d.remove()
		}
		err = errors.Join(err, endErr)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("the shim's daemon: %w", err)
	}
	return answer, p.acknowledge, nil
}

func (d dir) startDaemon(ctx context.Context, h Host, call Call, bundle string, lock *os.File) (*post, error) {
	if err := d.endKilled(ctx, h, call); err != nil {
		return nil, fmt.Errorf("end what is left of sandbox %s: %w", d.sandbox, err)
	}
	for _, name := range []string{d.statePath(), d.socket()} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if err := d.linkFrom(bundle); err != nil {
		return nil, err
	}
	// Marked from its first moment, nothing that it starts can escape when it is killed.
	return spawn(RoleDaemon, call, bundle, []string{d.mark()}, lock)
}

// endKilled ends what a daemon that was killed has left behind, if there is
// anything, all but the folder. The caller has the lock.
func (d dir) endKilled(ctx context.Context, h Host, call Call) error {
	s, err := d.read()
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		h.Log.Error("the state of a dead sandbox cannot be read", "sandbox", d.sandbox, "error", err)
	}
	if _, err := d.end(ctx, h, call, s); err != nil {
		return err
	}
	return d.clear(h, s)
}

// sweep ends orphans: sandboxes whose shim was killed together with the `start`
// that made it, so that containerd does not know of them and calls no `delete`;
// and it removes the folders of those that had ended but for that. It finds
// those that a `delete` is about to come for too, which does no harm. The work
// is done by processes that nobody waits for.
func sweep(c config.Config, h Host, call Call) error {
	paths, err := filepath.Glob(filepath.Join(c.StateDir, "*"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		d, err := parseDir(path)
		if err != nil || unix.Rmdir(path) == nil || !d.begun() {
			continue
		}
		lock, err := d.lock(false)
		if errdefs.IsNotFound(err) {
			// It was killed when nothing but the folder was left.
			if err := d.remove(); err != nil {
				return err
			}
		}
		if err != nil {
			continue // Its shim lives, or somebody ends it already.
		}
		if err := lock.Close(); err != nil {
			return err
		}
		h.Log.Warn("an orphan is ended: its shim was killed", "namespace", d.namespace, "orphan", d.sandbox)
		orphan := call
		orphan.Namespace, orphan.ID, orphan.Bundle, orphan.Action = d.namespace, d.sandbox, d.path, "delete" // No bundle: it is found by its id.
		p, err := spawn(RoleCleanup, orphan, "/", nil)
		if err != nil {
			return err
		}
		if err := p.file.Close(); err != nil {
			return err
		}
	}
	return nil
}

// begun is false for a folder that a `start` may be about to lock.
func (d dir) begun() bool {
	if _, err := os.Stat(d.statePath()); err == nil {
		return true
	}
	info, err := os.Stat(d.path)
	return err == nil && time.Since(info.ModTime()) > startTime
}

// answer waits for the daemon's recorded answer.
func (d dir) answer(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		s, err := d.read()
		if err == nil && len(s.Answer) > 0 {
			return s.Answer, nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the shim of sandbox %s does not come up: %w: %w", d.sandbox, context.Cause(ctx), errdefs.ErrUnavailable)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
