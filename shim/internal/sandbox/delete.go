package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sealvol/sealvol/shim/internal/config"
)

// cleanupTime bounds what `delete` starts.
const cleanupTime = 10 * time.Minute

// Delete does what containerd's `delete` asks for: it may come at any time,
// for each container, concurrently, with or without a daemon or a bundle. It
// gives the answer for stdout. For a container that is not ours the error is an
// errdefs.ErrNotImplemented.
//
// The work goes on when containerd kills this process.
func Delete(c config.Config, call Call) ([]byte, error) {
	if call.Bundle == "" {
		here, err := os.Getwd()
		if err != nil {
			return nil, err
		}
		call.Bundle = here
	}
	if _, err := locate(c, call); errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	} else if err != nil {
		return nil, err
	}
	p, err := spawn(RoleCleanup, call, "/", nil)
	if err != nil {
		return nil, err
	}
	answer, err := p.receive()
	if err != nil {
		return nil, fmt.Errorf("clean up: %w", err)
	}
	return answer, nil
}

// locate finds the sandbox's folder from the bundle, or without that from the
// configured state.
func locate(c config.Config, call Call) (dir, error) {
	d, err := linked(call.Bundle)
	if errdefs.IsNotFound(err) {
		if _, statErr := os.Stat(filepath.Join(call.Bundle, "config.json")); statErr == nil {
			return dir{}, err // A bundle of the stock shim's.
		}
		return search(c.StateDir, call.Namespace, call.ID)
	}
	return d, err
}

// Cleanup is the program in [RoleCleanup].
func Cleanup(c config.Config, h Host, call Call) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTime)
	defer cancel()
	p := openPost()
	answer, err := func() ([]byte, error) {
		d, err := locate(c, call)
		if err != nil {
			return nil, err
		}
		h.Log = h.Log.With("namespace", d.namespace, "sandbox", d.sandbox)
		return d.cleanup(ctx, h, call)
	}()
	l := letter{Stdout: answer}
	if err != nil {
		h.Log.Error("clean up", "container", call.ID, "error", err)
		l.Error = err.Error()
	}
	p.send(l) // containerd may have killed the process that waits for it.
	return err
}

func (d dir) cleanup(ctx context.Context, h Host, call Call) ([]byte, error) {
	for {
		if conn, err := net.Dial("unix", d.socket()); err == nil {
			answer, err := d.deleteOne(ctx, h, conn, call)
			if !errdefs.IsUnavailable(err) {
				return answer, err
			}
		}
		lock, err := d.lock(false)
		switch {
		case err == nil:
			defer lock.Close()
			return d.deleteAll(ctx, h, call)
		case errdefs.IsNotFound(err):
			return killed()
		case !errdefs.IsUnavailable(err):
			return nil, err
		}
		// A daemon comes up or ends, or another `delete` is at work.
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("sandbox %s: %w: %w", d.sandbox, context.Cause(ctx), errdefs.ErrUnavailable)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// deleteOne deletes one container of a living sandbox, as the stock shim does,
// and tells the daemon. It is an errdefs.ErrUnavailable if that has died.
func (d dir) deleteOne(ctx context.Context, h Host, conn net.Conn, call Call) ([]byte, error) {
	client := ttrpc.NewClient(conn)
	defer client.Close()
	s, err := d.read()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	bundle := call.Bundle
	if _, err := linked(bundle); err != nil {
		bundle = s.Containers[call.ID]
	}
	answer, deleteErr := killed()
	if bundle != "" {
		answer, deleteErr = stockDelete(ctx, s.StockShim, call, call.ID, bundle, deleteTime)
	}
	if _, has := s.Containers[call.ID]; deleteErr != nil && !has {
		// It was never created, or is deleted already: the stock shim has nothing to fail at.
		h.Log.Info("the stock shim's delete failed", "container", call.ID, "error", deleteErr)
		answer, deleteErr = killed()
	}
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	if err := client.Call(ctx, ownService, forgetMethod, wrapperspb.String(call.ID), new(emptypb.Empty)); err != nil {
		return nil, fmt.Errorf("the shim of sandbox %s: %w: %w", d.sandbox, err, errdefs.ErrUnavailable)
	}
	return answer, deleteErr
}

// deleteAll ends a sandbox whose daemon has died. Without its shim no
// container of it has a future, so it ends with the first `delete`.
func (d dir) deleteAll(ctx context.Context, h Host, call Call) ([]byte, error) {
	s, err := d.read()
	if err != nil && !errdefs.IsNotFound(err) {
		// The processes and the records are found without it.
		h.Log.Error("the state of a dead sandbox cannot be read", "error", err)
	}
	h.Log.Info("the sandbox has lost its shim and ends")
	answers, err := d.end(ctx, h, call, s)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(d.clear(h, s), d.remove()); err != nil {
		return nil, err
	}
	if answer := answers[call.ID]; len(answer) > 0 {
		return answer, nil
	}
	return killed()
}

// killed is what the stock shim's `delete` answers. Its message is the same in
// both versions of the task service.
func killed() ([]byte, error) {
	return proto.Marshal(&task.DeleteResponse{
		ExitStatus: 128 + uint32(unix.SIGKILL),
		ExitedAt:   timestamppb.Now(),
	})
}
