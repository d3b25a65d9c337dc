package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sealvol/sealvol/shim/internal/bundle"
	"github.com/sealvol/sealvol/shim/internal/relay"
)

// The daemon's own method, for `delete`: forget a container (a StringValue),
// answered by an Empty.
const (
	ownService   = "sealvol.shim.v1.Shim"
	forgetMethod = "Forget"
)

// Handle implements relay.Handler. The messages of Create, Delete and Kill are the
// same in both versions of the task service, in the fields that count here.
func (d *daemon) Handle(service, method string) relay.Call {
	switch service + "/" + method {
	case "containerd.task.v2.Task/Create", "containerd.task.v3.Task/Create":
		return d.begun(d.create)
	case "containerd.task.v2.Task/Delete", "containerd.task.v3.Task/Delete":
		return d.begun(d.delete)
	case "containerd.task.v2.Task/Kill", "containerd.task.v3.Task/Kill":
		return d.kill
	case ownService + "/" + forgetMethod:
		return d.begun(d.forget)
	}
	return nil
}

// begun lets a call begin unless the sandbox ends, which waits for those that have.
func (d *daemon) begun(call relay.Call) relay.Call {
	return func(ctx context.Context, payload []byte, forward func() ([]byte, error)) ([]byte, error) {
		d.mu.Lock()
		ending := d.ending
		if !ending {
			d.calls.Add(1)
		}
		d.mu.Unlock()
		if ending {
			return nil, fmt.Errorf("sandbox %s ends: %w", d.sandbox, errdefs.ErrUnavailable)
		}
		defer d.calls.Done()
		return call(ctx, payload, forward)
	}
}

func (d *daemon) create(_ context.Context, payload []byte, forward func() ([]byte, error)) ([]byte, error) {
	request := new(task.CreateTaskRequest)
	if err := unmarshal(payload, request); err != nil {
		return nil, err
	}
	if err := d.add(request.ID, request.Bundle); err != nil {
		d.host.Log.Error("a container is refused", "container", request.ID, "error", err)
		return nil, fmt.Errorf("sealvol: container %s: %w", request.ID, err)
	}
	response, err := forward()
	if err != nil {
		d.host.Log.Warn("the stock shim did not create a container", "container", request.ID, "error", err)
		d.drop(request.ID)
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.volumes.settle(request.ID)
	return response, nil
}

func (d *daemon) delete(_ context.Context, payload []byte, forward func() ([]byte, error)) ([]byte, error) {
	request := new(task.DeleteRequest)
	if err := unmarshal(payload, request); err != nil {
		return nil, err
	}
	response, err := forward()
	if request.ExecID == "" && (err == nil || status.Code(err) == codes.NotFound) {
		d.drop(request.ID)
	}
	return response, err
}

func (d *daemon) forget(_ context.Context, payload []byte, _ func() ([]byte, error)) ([]byte, error) {
	container := new(wrapperspb.StringValue)
	if err := unmarshal(payload, container); err != nil {
		return nil, err
	}
	if d.drop(container.Value) == 0 {
		d.endOnce.Do(func() { close(d.over) })
	}
	return proto.Marshal(new(emptypb.Empty))
}

// kill ends the sandbox when its own container cannot be killed otherwise. The
// stock shim refuses that for good when the sandbox was created and not started
// ("Sandbox not running"), as a containerd that died in between leaves it.
// containerd stops a pod with this call, and waits for the exit, which it sees
// in the end of its connection.
func (d *daemon) kill(_ context.Context, payload []byte, forward func() ([]byte, error)) ([]byte, error) {
	request := new(task.KillRequest)
	if err := unmarshal(payload, request); err != nil {
		return nil, err
	}
	response, err := forward()
	if status.Code(err) == codes.Unavailable {
		// The stock shim may have ended: then containerd is to see that, and not this error.
		d.holdEnd()
	}
	own := request.ID == d.sandbox && request.ExecID == "" && request.Signal == uint32(unix.SIGKILL)
	if own && err != nil && status.Code(err) != codes.NotFound {
		d.host.Log.Warn("the stock shim cannot kill the sandbox, which ends", "error", err)
		d.endOnce.Do(func() { close(d.over) })
		return proto.Marshal(new(emptypb.Empty))
	}
	return response, err
}

func unmarshal(payload []byte, message proto.Message) error {
	if err := proto.Unmarshal(payload, message); err != nil {
		return fmt.Errorf("%s: %v: %w", message.ProtoReflect().Descriptor().FullName(), err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// add makes the host ready for a container, or changes nothing.
func (d *daemon) add(container, dir string) (err error) {
	if err := identifiers.Validate(container); err != nil {
		return err
	}
	if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir {
		return fmt.Errorf("bundle %q is not an absolute, clean path: %w", dir, errdefs.ErrInvalidArgument)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, there := d.state.Containers[container]; there {
		return fmt.Errorf("it is there already: %w", errdefs.ErrAlreadyExists)
	}
	request, err := bundle.Read(dir, d.sandbox)
	if err != nil {
		return err
	}
	undo, err := d.volumes.add(container, request.Volumes)
	if err != nil {
		return err
	}
	d.state.Containers[container] = dir
	defer func() {
		if err != nil {
			delete(d.state.Containers, container)
			err = errors.Join(err, undo(), d.note())
		}
	}()
	if err := d.note(); err != nil {
		return err
	}
	if err := request.Take(); err != nil {
		return err
	}
	for _, volume := range request.Volumes {
		d.host.Log.Info("a volume is plugged in", "container", container, "volume", volume.Name, "backing", volume.Backing)
	}
	return nil
}

// note writes down what has changed.
func (d *daemon) note() error {
	d.state.Devices = d.volumes.numbers()
	return d.write(d.state)
}

// drop ends what was done for a container, and says how many containers are left.
func (d *daemon) drop(container string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.state.Containers, container)
	// What fails here is done again when the sandbox ends.
	if err := errors.Join(d.volumes.drop(container), d.note()); err != nil {
		d.host.Log.Error("drop a container", "container", container, "error", err)
	}
	return len(d.state.Containers)
}
