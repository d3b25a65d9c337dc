package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/errdefs"

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
		return nil, nil, fmt.Errorf("sandbox %s is not ours: %w", id, errdefs.ErrNotImplemented)
	case err != nil:
		return nil, nil, err
	}
	defer lock.Close() // The daemon has the same lock, in its own descriptor.
	if !own {
		return nil, nil, fmt.Errorf("the shim of sandbox %s has died: %w", id, errdefs.ErrUnavailable)
	}
	p, err := d.startDaemon(ctx, h, call, here, lock)
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(d.path))
	}
	answer, err = p.receive()
	if err != nil {
		return nil, nil, fmt.Errorf("the shim's daemon: %w", err)
	}
	return answer, p.acknowledge, nil
}

func (d dir) startDaemon(ctx context.Context, h Host, call Call, bundle string, lock *os.File) (*post, error) {
	// A daemon that was killed may have left things behind.
	s, err := d.read()
	if !errdefs.IsNotFound(err) {
		if err != nil {
			h.Log.Error("the state of a dead sandbox cannot be read", "sandbox", d.sandbox, "error", err)
		}
		_, err := d.end(ctx, h, call, s)
		if err := errors.Join(err, d.clear(h, s)); err != nil {
			return nil, fmt.Errorf("end what is left of sandbox %s: %w", d.sandbox, err)
		}
		for _, name := range []string{d.statePath(), d.socket()} {
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
	}
	if err := d.linkFrom(bundle); err != nil {
		return nil, err
	}
	return spawn(RoleDaemon, call, bundle, lock)
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
