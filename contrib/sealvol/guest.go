package main

import (
	"context"
	"flag"
	"fmt"
	"math"
	"time"

	"github.com/sealvol/sealvol/contrib/internal/guest"
)

// guests reaches the guests of this node.
type guests struct {
	guest.Node
	timeout time.Duration
}

func newGuests() guests { return guests{guest.NewNode(), 15 * time.Second} }

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
	s, err := g.Find(flags.Arg(0))
	if err != nil {
		return "", 0, err
	}
	if cid, err = s.CID(ctx); err != nil {
		return "", 0, fmt.Errorf("sandbox %s: %w", s.ID, err)
	}
	return s.ID, cid, nil
}
