// Containerd-shim-kata-sealvol-v2 is a containerd shim that fronts the stock
// Kata shim: it hands everything to that one, but for the hotplug requests
// that it takes from containers and turns into block devices of the guest.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/backing"
	"github.com/sealvol/sealvol/shim/internal/config"
	"github.com/sealvol/sealvol/shim/internal/record"
	"github.com/sealvol/sealvol/shim/internal/sandbox"
)

const usage = `containerd-shim-kata-sealvol-v2 is a containerd shim. containerd runs it when it
is the runtime_path of a runtime, see contrib/containerd/sealvol.toml. It fronts
the stock Kata shim, which is to be named in ` + config.Path + ` (or the file
that the environment variable ` + config.Env + ` names), see
contrib/containerd/shim.toml. Other arguments than containerd's go to that one.
`

func main() {
	os.Exit(run(os.Args[1:], sandbox.Host{
		Records: record.Root,
		Open:    func(b hotplug.Backing) (sandbox.Device, error) { return backing.Open(b) },
		// virtcontainers/persist/fs, hypervisor and fs_share of Kata.
		Kata: []string{"/run/vc/sbs", "/run/vc/vm", "/run/kata-containers/shared/sandboxes"},
	}))
}

func run(args []string, h sandbox.Host) int {
	if len(args) == 1 && (args[0] == "--help" || args[0] == "-help" || args[0] == "-h") {
		fmt.Print(usage)
		return 0
	}
	if err := act(args, h); err != nil {
		fmt.Fprintf(os.Stderr, "containerd-shim-kata-sealvol-v2: %v\n", err)
		return 1
	}
	return 0
}

func act(args []string, h sandbox.Host) error {
	c, configErr := config.Load()
	if configErr == nil {
		configErr = notSelf(c.StockShim)
	}
	h.Log = newLog(c.LogLevel)
	role := ""
	if len(args) > 0 && (args[0] == sandbox.RoleDaemon || args[0] == sandbox.RoleCleanup) {
		role, args = args[0], args[1:]
	}
	call, err := sandbox.ParseCall(args)
	switch {
	case errdefs.IsNotImplemented(err):
		if configErr != nil {
			return configErr
		}
		return execStock(c, args)
	case err != nil:
		return err
	case configErr != nil && call.Action == "start":
		return configErr
	case role == sandbox.RoleDaemon:
		return sandbox.Daemon(c, h, call)
	case role == sandbox.RoleCleanup:
		return sandbox.Cleanup(c, h, call)
	}
	var answer []byte
	done := func() error { return nil }
	if call.Action == "start" {
		answer, done, err = sandbox.Start(context.Background(), c, h, call)
	} else {
		// A bundle of ours says all that is needed without the configuration.
		answer, err = sandbox.Delete(c, call)
	}
	if errdefs.IsNotImplemented(err) && configErr == nil {
		return execStock(c, args)
	}
	if err != nil {
		return err
	}
	if _, err := os.Stdout.Write(answer); err != nil {
		return err
	}
	return done()
}

// execStock becomes the stock shim. It returns only on failure.
func execStock(c config.Config, args []string) error {
	if err := unix.Exec(c.StockShim, append([]string{c.StockShim}, args...), os.Environ()); err != nil {
		return fmt.Errorf("exec %s: %w", c.StockShim, err)
	}
	return nil
}

// notSelf refuses this program as its own stock shim: it would start itself for ever.
func notSelf(stock string) error {
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return err
	}
	if other, err := os.Stat(stock); err == nil && os.SameFile(self, other) {
		return fmt.Errorf("stock_shim = %q is this program itself: %w", stock, errdefs.ErrInvalidArgument)
	}
	return nil
}

// newLog logs to syslog, where the stock shim does. Nothing else is there for
// the life of a sandbox: containerd reads stdout and stderr as the answer.
func newLog(level slog.Level) *slog.Logger {
	var out io.Writer = io.Discard
	if w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, "sealvol-shim"); err == nil {
		out = w
	}
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{} // syslog has its own.
			}
			return a
		},
	}))
}
