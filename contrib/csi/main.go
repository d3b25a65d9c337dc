// Command sealvol-csi is a CSI driver that lends sparse files of a node to sealed
// volumes. It makes no file system and sees no key: what is in a file is the
// guest's, and the guest trusts nothing of what is lent.
//
// It may import plugin/published, plugin/quantity, shim/hotplug, shim/loop,
// shim/atomicfile, guest/api and contrib/internal, and nothing else of the project.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/sealvol/sealvol/contrib/csi/internal/driver"
	"github.com/sealvol/sealvol/contrib/csi/internal/rawblock"
	"github.com/sealvol/sealvol/contrib/csi/internal/sandboxes"
	"github.com/sealvol/sealvol/contrib/csi/internal/store"
	"github.com/sealvol/sealvol/contrib/internal/guest"
	"github.com/sealvol/sealvol/plugin/published"
)

const usage = `sealvol-csi is the CSI driver coco-local-csi: it lends sparse files of this node to
sealed volumes. It runs on each node, as root, beside kubelet:

  sealvol-csi -config /etc/sealvol/csi.toml -node "$(hostname)"

A pod asks for a volume as for any other, here one that lives as long as the pod:

  volumes:
  - name: encrypted
    ephemeral: {volumeClaimTemplate: {spec: {
      storageClassName: coco-local-csi, accessModes: [ReadWriteOncePod],
      resources: {requests: {storage: 1Gi}}}}}

or, without a claim:

  - name: encrypted
    csi: {driver: coco-local-csi, volumeAttributes: {size: 1Gi}}

The driver needs the sidecars of contrib/kubernetes, and on the node sealvol-nri,
which finds the records that the driver leaves, and sealvol's shim. A pod that does
not run under them sees an empty folder that is not its volume.

Flags:
`

// guestPatience is how long a guest may take to say how full a volume is. kubelet
// asks again every minute, for all volumes of the node one after the other.
const guestPatience = 5 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "sealvol-csi:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("sealvol-csi", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // its own reports would repeat ours
	configFile := flags.String("config", "", "configuration `FILE` in TOML (default: as csi.toml is shipped)")
	node := flags.String("node", "", "`NAME` of this node in Kubernetes (default: the host's name)")
	version := flags.Bool("version", false, "print the version and end")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(stdout)
		_, err := fmt.Fprint(stdout, usage)
		flags.PrintDefaults()
		return err
	case err != nil:
		return fmt.Errorf("%w, see -help", err)
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q, see -help", flags.Arg(0))
	case *version:
		_, err := fmt.Fprintf(stdout, "sealvol-csi %s\n", build())
		return err
	}
	c := defaultConfig()
	if *configFile != "" {
		text, err := os.ReadFile(*configFile)
		if err != nil {
			return err
		}
		if c, err = parseConfig(text); err != nil {
			return fmt.Errorf("%s: %w", *configFile, err)
		}
	}
	if *node == "" {
		var err error
		if *node, err = os.Hostname(); err != nil {
			return fmt.Errorf("this node's name: %w", err)
		}
	}
	return serve(ctx, c, *node, slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.logLevel})))
}

// serve answers until ctx ends.
func serve(ctx context.Context, c config, node string, log *slog.Logger) (err error) {
	volumes, err := store.Open(c.volumes, c.capacity, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, volumes.Close()) }()
	d := &driver.Driver{
		Name: c.driver, Version: build(), Node: node, Volumes: volumes, Published: published.Dir(c.published),
		Devices: rawblock.Host{}, Log: log,
		Guests: sandboxes.Sandboxes{Bundles: c.bundles, Node: guest.NewNode(), Timeout: guestPatience},
	}
	if err := d.Reconcile(); err != nil {
		return err
	}
	l, err := listen(c.socket)
	if err != nil {
		return err
	}
	log.Info("ready", "driver", c.driver, "node", node, "socket", c.socket, "volumes", len(volumes.List()))
	return d.Serve(ctx, l) // closes l
}

// listen makes the socket, in the place of one that a killed driver left. Only the
// driver that has the volumes comes here.
func listen(socket string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o750); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(socket); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(socket); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	// Who may connect may delete volumes.
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// build is the version of this program; one built outside a module's release has none.
func build() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "devel"
	}
	return info.Main.Version
}
