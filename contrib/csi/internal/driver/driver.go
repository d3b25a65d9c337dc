// Package driver is the three services of the CSI driver, for version 1.13 of the
// Container Storage Interface. It lends files: it makes no file system, knows no
// key and ignores all secrets.
//
// A volume that kubelet mounts is a folder with nothing on it and a record of
// package plugin/published, by which the plugin puts a sealed volume in the place
// of the container's mount. A raw block volume is a loop device.
//
// It may import the driver's other packages, plugin/published, plugin/quantity,
// shim/hotplug and guest/api, and nothing else of the project.
package driver

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"

	"github.com/sealvol/sealvol/contrib/csi/internal/store"
	"github.com/sealvol/sealvol/plugin/published"
)

// Devices are the loop devices and mounts of this node.
type Devices interface {
	// Attach makes a loop device of a file, unless there is one.
	Attach(file string) error
	// Detach takes it away, if there is one.
	Detach(file string) error
	// Bind puts a file's loop device on a target. Without one the error is an errdefs.ErrFailedPrecondition.
	Bind(file, target string) error
	// Unbind takes away what is mounted on a target, if anything is.
	Unbind(target string) error
	// State says whether a file has a loop device, and on which targets it is.
	State(file string) (attached bool, targets []string, err error)
}

// Guests are the guests of this node.
type Guests interface {
	// Volume is what a guest says of the volume of that name in hotplug requests,
	// which is published at the targets. One that no sandbox has is an
	// errdefs.ErrNotFound; one whose guest does not answer, or does not know it, an
	// errdefs.ErrUnavailable.
	Volume(ctx context.Context, name string, targets []string) (*sealvolv1.Volume, error)
}

// Driver answers Identity, Controller and Node for one node.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer

	// Name is the driver's, for example "coco-local-csi"; Version is of its build.
	Name, Version string
	// Node is this node's name.
	Node      string
	Volumes   *store.Store
	Published published.Dir
	Devices   Devices
	Guests    Guests
	Log       *slog.Logger

	busy busy
}

// Serve answers on l until ctx ends; then calls that are under way come to their end.
func (d *Driver) Serve(ctx context.Context, l net.Listener) error {
	server := grpc.NewServer(grpc.UnaryInterceptor(d.answer))
	csi.RegisterIdentityServer(server, d)
	csi.RegisterControllerServer(server, d)
	csi.RegisterNodeServer(server, d)
	stop := context.AfterFunc(ctx, server.GracefulStop)
	defer stop()
	if err := server.Serve(l); err != nil {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// answer logs a call that failed, without what was asked, which may hold secrets,
// and gives its error the status of its class. One of no class is the node's.
func (d *Driver) answer(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	response, err := handler(ctx, request)
	if err == nil {
		return response, nil
	}
	if _, ok := status.FromError(err); !ok {
		answer := status.Convert(errgrpc.ToGRPC(err))
		code := answer.Code()
		if code == codes.Unknown {
			code = codes.Internal
		}
		err = status.Error(code, strings.ReplaceAll(answer.Message(), "\n", "; "))
	}
	log := d.Log.With("call", path.Base(info.FullMethod), "error", err)
	if named, ok := request.(interface{ GetVolumeId() string }); ok {
		log = log.With("volume", named.GetVolumeId())
	}
	log.Warn("refused")
	return nil, err
}

// busy are the volumes that something is being done with.
type busy struct {
	mu  sync.Mutex
	ids map[string]bool
}

// take takes a volume until the function that it gives is called. One that is
// taken is an errdefs.ErrAborted, upon which a caller tries again.
func (b *busy) take(id string) (release func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ids[id] {
		return nil, fmt.Errorf("another call for volume %q is not done yet: try again: %w", id, errdefs.ErrAborted)
	}
	if b.ids == nil {
		b.ids = map[string]bool{}
	}
	b.ids[id] = true
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.ids, id)
	}, nil
}
