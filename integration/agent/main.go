// Command kata-agent is a stand-in for Kata's agent, for tests only: it speaks
// the agent's ttrpc protocol (Kata 3.20) and really runs containers with runc,
// so that exec, logs, exit codes and mounts in the node tests are real. It
// trusts its peer as the real agent does: whatever storage, mount or file the
// host names it mounts or writes, because that is what sealvol's gate in front
// of it has to prevent.
//
// It must not be PID 1 and needs cgroup v2, runc and procfs. Network RPCs are
// refused; seccomp profiles are not supported (disable_guest_seccomp=true).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/mdlayher/vsock"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
)

// stateDir holds the agent's own state: bundles, runc's state, namespaces.
const stateDir = "/run/kata-agent"

// config is the part of the agent's configuration file that the stand-in
// reads. The real agent has many more keys, so unknown ones are ignored.
type config struct {
	ServerAddr string `toml:"server_addr"`
}

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("component", "agent-stand-in")
	file := flag.String("config", "", "configuration `FILE` (TOML; reads server_addr)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := run(ctx, *file, log); err != nil {
		log.Error("agent ends", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, file string, log *slog.Logger) error {
	cfg := config{ServerAddr: "vsock://-1:1024"}
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("read configuration: %w", err)
		}
		if err := toml.Unmarshal(b, &cfg); err != nil {
			return fmt.Errorf("parse configuration %s: %w", file, err)
		}
	}
	l, err := listen(cfg.ServerAddr)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", cfg.ServerAddr, err)
	}
	return serve(ctx, l, log)
}

// listen takes the address forms of the real agent that tests need:
// unix:///path and vsock://-1:1024.
func listen(addr string) (net.Listener, error) {
	switch {
	case strings.HasPrefix(addr, "unix://"):
		p := strings.TrimPrefix(addr, "unix://")
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			return nil, err
		}
		return net.Listen("unix", p)
	case addr == "vsock://-1:1024":
		return vsock.ListenContextID(unix.VMADDR_CID_ANY, 1024, nil)
	default:
		return nil, errors.New("only unix:///path and vsock://-1:1024 are supported")
	}
}

// serve answers until ctx ends or DestroySandbox was answered, as the real
// agent does. Containers that are left are destroyed.
func serve(ctx context.Context, l net.Listener, log *slog.Logger) error {
	// Containers and execs outlive the runc that made them and then become
	// our children, so that we can wait for them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	s, err := newSandbox(log)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(
		func(ctx context.Context, u ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
			resp, err := m(ctx, u)
			if err != nil && !errors.Is(err, errEOF) {
				log.Warn("request failed", "method", path.Base(info.FullMethod), "error", err)
			}
			return resp, errgrpc.ToGRPC(err)
		}))
	if err != nil {
		return err
	}
	pb.RegisterAgentServiceService(server, s)
	pb.RegisterHealthService(server, s)

	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	log.Info("serving", "address", l.Addr().String())
	select {
	case err = <-served:
	case <-s.destroyed:
	case <-ctx.Done():
	}
	// Grace for the answer to DestroySandbox, which is under way.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		server.Close()
	}
	if errors.Is(err, ttrpc.ErrServerClosed) {
		err = nil
	}
	end, cancelEnd := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancelEnd()
	return errors.Join(err, s.destroy(end))
}
