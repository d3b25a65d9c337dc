// Sealvol-guest is the guest service: it starts the Kata agent, stands as the gate in front
// of it and seals the volumes of the pod. As process 1 it is also the init of the guest.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/agent"
	"github.com/sealvol/sealvol/guest/internal/boot"
	"github.com/sealvol/sealvol/guest/internal/control"
	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/exposure"
	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/guest/internal/gate"
	"github.com/sealvol/sealvol/guest/internal/hostvsock"
	"github.com/sealvol/sealvol/guest/internal/mountns"
	"github.com/sealvol/sealvol/guest/internal/volume"
	"github.com/sealvol/sealvol/policy"
)

const (
	runDir     = "/run/sealvol"
	agentRun   = "/run/kata-containers"
	configFile = "/etc/sealvol/guest.toml"

	destroyTimeout = 30 * time.Second
)

const usage = `Usage: sealvol-guest serve

Starts the Kata agent, serves the host on vsock and seals the pod's volumes.
As process 1 it needs no argument: it sets up the guest and runs itself.

Configuration: ` + configFile + `
Options: --help, --version
`

func main() {
	if os.Getpid() == 1 {
		fmt.Fprintln(os.Stderr, "sealvol-guest:", boot.Run())
		os.Exit(1)
	}
	switch {
	case slices.Equal(os.Args[1:], []string{"serve"}):
	case slices.Equal(os.Args[1:], []string{"--version"}):
		fmt.Println("sealvol-guest", version())
		return
	case slices.Equal(os.Args[1:], []string{"--help"}), slices.Equal(os.Args[1:], []string{"-h"}):
		fmt.Print(usage)
		return
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "sealvol-guest:", err)
		os.Exit(1)
	}
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}

func serve() (err error) {
	if err := exposure.ForbidDumps(); err != nil {
		return err
	}
	cfg, err := loadConfig(configFile)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	attested, fallback, from := startPolicy(ctx, cfg, log)
	if err := os.Mkdir(runDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	volumes, err := volume.New(volume.Config{
		Dir:         runDir,
		Tools:       filesystem.Tools{Ext4: cfg.Mkfs, XFS: cfg.MkfsXFS},
		Cryptsetup:  cfg.Cryptsetup,
		AllowKernel: cfg.PatchedKernel,
		Log:         log,
	})
	if err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
		defer cancel()
		err = errors.Join(err, volumes.Destroy(ctx))
	}()
	kata, err := startAgent(ctx, cfg)
	if err != nil {
		return err
	}
	defer kata.Stop()

	declared := append([]uint32{gate.Port, sealvolv1.ControlPort}, cfg.VsockPorts...)
	g, err := gate.New(ctx, gate.Config{
		Log:        log,
		Dial:       kata.Dial,
		Load:       func(ctx context.Context, text []byte) (gate.Policy, error) { return policy.Load(ctx, text) },
		Default:    fallback,
		Origin:     from,
		Volumes:    volumes,
		Namespaces: mountns.Processes{Proc: "/proc", Shared: []string{agentRun + "/shared/containers", agentRun + "/sandbox/shm"}},
		Disk:       func(address device.Address) (device.Disk, error) { return device.Find("/sys", address) },
		Inspect:    func() error { return inspect(declared) },
		Run:        agentRun,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()

	host, err := hostvsock.Listen(gate.Port, log)
	if err != nil {
		return err
	}
	defer host.Close()
	reader, err := hostvsock.Listen(sealvolv1.ControlPort, log)
	if err != nil {
		return err
	}
	defer reader.Close()
	log.Info("serving the host", "version", version())
	service := control.Service{Version: version(), Sandbox: g, Volumes: volumes, TEE: attested, Now: time.Now}
	return run(ctx, kata, g, service, host, reader)
}

// run serves until a signal comes, or fails when a part of the service does.
func run(ctx context.Context, kata *agent.Agent, g *gate.Gate, c control.Service, host, reader net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.Serve(ctx, host) })
	group.Go(func() error { return c.Serve(ctx, reader) })
	group.Go(func() error {
		select {
		case <-kata.Done():
			return kata.Err()
		case <-ctx.Done():
			return nil
		}
	})
	return group.Wait()
}

func startAgent(ctx context.Context, cfg config) (*agent.Agent, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(cfg.Agent.StartTimeout))
	defer cancel()
	return agent.Start(ctx, agent.Config{
		Path: cfg.Agent.Path, ConfigFile: cfg.Agent.Config, Socket: cfg.Agent.Socket, Output: os.Stderr,
	})
}

// inspect refuses a guest that is open beside the gate.
func inspect(declared []uint32) error {
	if err := exposure.KernelCommandLine("/proc/cmdline"); err != nil {
		return err
	}
	if err := exposure.Swap("/proc/swaps"); err != nil {
		return err
	}
	ports, err := hostvsock.Listeners()
	if err != nil {
		return err
	}
	return exposure.Listeners(ports, declared)
}
