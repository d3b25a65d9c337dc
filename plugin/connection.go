package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

const (
	// The wait between two tries to connect doubles from the first to the last:
	// while the plugin is away, containerd refuses every new container.
	firstWait = 100 * time.Millisecond
	lastWait  = 5 * time.Second

	// startLimit bounds registration. NRI's own limit does not cover the wait
	// for its Configure call, which never ends if the runtime goes away then.
	startLimit = 30 * time.Second
)

// errStuck says that the NRI stub does not come back, so that only a new
// process can connect again.
var errStuck = errors.New("registration with NRI did not end")

// handler answers the runtime's calls on one connection. It implements the
// stub's Configure and CreateContainer and no more: NRI subscribes a plugin to
// what it implements.
type handler struct {
	log    *slog.Logger
	level  *slog.LevelVar
	config atomic.Pointer[config]
}

// Configure takes the configuration that a runtime has for a plugin that it
// starts itself. For others it is empty.
func (h *handler) Configure(_ context.Context, text, runtime, version string) (api.EventMask, error) {
	if text != "" {
		c, err := parseConfig([]byte(text))
		if err != nil {
			return 0, errgrpc.ToGRPC(err)
		}
		h.config.Store(&c)
		h.level.Set(c.logLevel)
	}
	h.log.Info("registered with NRI", "runtime", runtime, "version", version)
	return 0, nil // no events: what the handler implements
}

// CreateContainer adjusts a container of a pod that asks for volumes, or refuses it.
func (h *handler) CreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	name := pod.GetNamespace() + "/" + pod.GetName()
	log := h.log.With("pod", name, "sandbox", pod.GetId(), "container", container.GetName())
	adjustment, err := adjust(*h.config.Load(), pod, container)
	if err != nil {
		log.Error("container refused", "err", err)
		return nil, nil, errgrpc.ToGRPC(fmt.Errorf("sealvol: container %q of pod %q refused: %w", container.GetName(), name, err))
	}
	for _, m := range adjustment.GetMounts() {
		if _, removed := m.IsMarkedForRemoval(); removed {
			continue
		}
		log.Info("volume requested", "mountPath", m.Destination, "source", m.Source)
	}
	return adjustment, nil, nil
}

// plugin keeps a connection to the runtime's NRI.
type plugin struct {
	name, index, socket string
	// launched says that the runtime started us on a connection of its own,
	// with its own name for us. There is no second one.
	launched bool
	// startLimit bounds each registration.
	startLimit time.Duration
	config     config
	level      *slog.LevelVar
	log        *slog.Logger
}

// run serves the runtime until the context ends, which is no error. It connects
// again whenever it must; what it cannot cure is an error.
func (p *plugin) run(ctx context.Context) error {
	wait := firstWait
	for {
		connected, err := p.serve(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case p.launched || errors.Is(err, errStuck):
			return err
		case connected:
			wait = firstWait
		}
		p.log.Warn("not connected to NRI, trying again", "socket", p.socket, "in", wait, "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, lastWait)
	}
}

// serve serves one connection until it is lost. connected says that there was one.
func (p *plugin) serve(ctx context.Context) (connected bool, err error) {
	h := &handler{log: p.log, level: p.level}
	h.config.Store(&p.config)
	lost := make(chan struct{})
	options := []stub.Option{
		stub.WithOnClose(func() { close(lost) }),
		stub.WithLogger(stubLog{p.log}),
		// NRI's default is to go on without the plugin, and to drop it when it
		// was slow once.
		stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: true, KeepConnected: true}),
	}
	if !p.launched {
		options = append(options, stub.WithPluginName(p.name), stub.WithPluginIdx(p.index), stub.WithSocketPath(p.socket),
			stub.WithDialer(func(socket string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			}))
	}
	s, err := stub.New(h, options...)
	if err != nil {
		return false, fmt.Errorf("NRI stub: %w", err)
	}

	// Start holds a lock that Stop needs, so it cannot be called off.
	started := make(chan error, 1)
	go func() { started <- s.Start(ctx) }()
	select {
	case err = <-started:
	case <-ctx.Done():
		return false, ctx.Err()
	case <-time.After(p.startLimit):
		return false, errStuck
	}
	if err != nil {
		return false, err
	}
	select {
	case <-ctx.Done():
		s.Stop()
		return true, ctx.Err()
	case <-lost:
		return true, errors.New("connection lost")
	}
}

// stubLog is the stub's log. What it calls information is detail here.
type stubLog struct{ *slog.Logger }

func (l stubLog) Debugf(ctx context.Context, format string, args ...any) {
	l.DebugContext(ctx, fmt.Sprintf(format, args...))
}

func (l stubLog) Infof(ctx context.Context, format string, args ...any) {
	l.DebugContext(ctx, fmt.Sprintf(format, args...))
}

func (l stubLog) Warnf(ctx context.Context, format string, args ...any) {
	l.WarnContext(ctx, fmt.Sprintf(format, args...))
}

func (l stubLog) Errorf(ctx context.Context, format string, args ...any) {
	l.ErrorContext(ctx, fmt.Sprintf(format, args...))
}
