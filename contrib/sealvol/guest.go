package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"net"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// guests reaches the guests of this node.
type guests struct {
	roots   []string // where Kata's runtimes keep one folder for each sandbox
	dial    func(ctx context.Context, cid, port uint32) (net.Conn, error)
	timeout time.Duration
}

func newGuests() guests {
	return guests{
		roots:   []string{"/run/vc/sbs", "/run/kata"}, // the Go runtime's, runtime-rs's
		dial:    dialVsock,
		timeout: 15 * time.Second,
	}
}

// target is what a command line says of the guest.
type target struct{ cid *uint }

// flags adds the flags that name a guest.
func (g *guests) flags(flags *flag.FlagSet) target {
	flags.DurationVar(&g.timeout, "timeout", g.timeout, "`TIME` to wait for the guest")
	return target{flags.Uint("cid", 0, "vsock `CID` of the guest, instead of SANDBOX")}
}

// check is errUsage unless the command line names one guest.
func (t target) check(flags *flag.FlagSet) error {
	switch {
	case *t.cid > math.MaxUint32:
		return fmt.Errorf("%w: --cid %d is no CID", errUsage, *t.cid)
	case *t.cid == 0 && flags.NArg() == 0:
		return fmt.Errorf("%w: which sandbox? `crictl pods -q` lists them", errUsage)
	case flags.NArg() > 1 || *t.cid != 0 && flags.NArg() > 0:
		return fmt.Errorf("%w: unexpected argument %q (flags go before SANDBOX)", errUsage, flags.Arg(flags.NArg()-1))
	}
	return nil
}

// find finds the guest that a checked command line names. The sandbox is empty for one named by its CID.
func (g guests) find(ctx context.Context, t target, flags *flag.FlagSet) (sandboxID string, cid uint32, err error) {
	if *t.cid != 0 {
		return "", uint32(*t.cid), nil
	}
	s, err := findSandbox(g.roots, flags.Arg(0))
	if err != nil {
		return "", 0, err
	}
	if cid, err = s.cid(ctx); err != nil {
		return "", 0, fmt.Errorf("sandbox %s: %w", s.id, err)
	}
	return s.id, cid, nil
}

// ask calls a guest's control service.
func (g guests) ask(ctx context.Context, cid uint32, question func(sealvolv1.ControlService) error) error {
	conn, err := g.dial(ctx, cid, sealvolv1.ControlPort)
	if err != nil {
		return fmt.Errorf("no control service on vsock port %d: %w: is this a guest of sealvol, and does it still run?", sealvolv1.ControlPort, err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	err = question(sealvolv1.NewControlClient(client))
	if ctx.Err() != nil {
		return fmt.Errorf("control service: no answer in time: %w: try again, or with a longer --timeout", ctx.Err())
	}
	if err != nil {
		err = errgrpc.ToNative(err)
		if errdefs.IsNotImplemented(err) {
			return errors.New("its control service is another version than sealvol.v1: use the sealvol tool that was built with the guest image")
		}
		if slices.ContainsFunc([]rune(err.Error()), unprintable) {
			return errors.New("the control service answered with an error that cannot be printed")
		}
		return fmt.Errorf("control service: %w", err)
	}
	return nil
}
