// Command sealvol-nri is the NRI plugin of sealvol: it turns what a pod asks
// for in its annotations, and what a CSI driver has published to it, into
// hotplug requests on the specs of its containers, which the runtime shim
// carries out. It keeps no state and of the host it reads what drivers published
// (plugin/published) and touches nothing. It is not trusted: the guest checks
// all that follows from it.
//
// It imports shim/hotplug for the format of the request, plugin/published for
// that of the records, plugin/quantity for sizes, and no other package of the
// project.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/containerd/nri/pkg/api"
)

const usage = `sealvol-nri gives the containers of Kata pods sealed volumes. It runs beside
containerd, as root, and connects to its NRI socket:

  sealvol-nri -config /etc/sealvol/nri.conf

containerd can also start it: link it into NRI's plugin_path as 10-sealvol; its
configuration is then 10-sealvol.conf in NRI's plugin_config_path.

A volume of a CSI driver that leaves records for it (sealvol-csi does) needs
nothing more than its claim. For others a pod has an annotation:

  volume.sealvol.io/encrypted: '{"device": "/dev/encrypted", "mountPath": "/mnt/encrypted", "mode": "ephemeral"}'
  volume.sealvol.io/pages: '{"emptyDir": "scratch", "size": "10Gi"}'

where device is the path that a block device has inside of containers
(volumeDevices in Kubernetes, devices in CRI), and emptyDir the name of one in
the pod. A container that cannot have what its pod asks for is refused, and says
why.

NRI goes on without a plugin that is gone. Name this one in required_plugins of
NRI's default_validator, so that containers are refused instead.

Flags:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "sealvol-nri:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("sealvol-nri", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // its own reports would repeat ours
	configFile := flags.String("config", "", "configuration `FILE` in TOML (default: as nri.conf is shipped)")
	p := &plugin{level: new(slog.LevelVar), startLimit: startLimit}
	flags.StringVar(&p.socket, "socket", api.DefaultSocketPath, "`PATH` of NRI's socket")
	flags.StringVar(&p.name, "name", "sealvol", "`NAME` to register as, that of required_plugins")
	flags.StringVar(&p.index, "index", "10", "two digits `NN` that order this plugin among others")
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
		info, _ := debug.ReadBuildInfo()
		_, err := fmt.Fprintf(stdout, "sealvol-nri %s %s\n", info.Main.Version, info.GoVersion)
		return err
	}
	if err := errors.Join(api.CheckPluginName(p.name), api.CheckPluginIndex(p.index)); err != nil {
		return err
	}

	p.config = defaultConfig()
	if *configFile != "" {
		text, err := os.ReadFile(*configFile)
		if err != nil {
			return err
		}
		if p.config, err = parseConfig(text); err != nil {
			return fmt.Errorf("%s: %w", *configFile, err)
		}
	}
	p.level.Set(p.config.logLevel)
	p.log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: p.level}))
	_, p.launched = os.LookupEnv(api.PluginSocketEnvVar)
	return p.run(ctx)
}
