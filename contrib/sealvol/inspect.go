package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

const inspectShort = "show what is sealed in a running pod, and how"

const inspectHelp = `Usage: sealvol inspect [flags] SANDBOX

Shows the sealed volumes of a running Kata pod as its guest reports them: the
devices like lsblk does, each mapping like cryptsetup status does, and the
policy that is in force. SANDBOX is the pod sandbox's id or the start of it, if
no other sandbox starts so. Needs root on the node.

Examples:
  sealvol inspect "$(crictl pods -q --name my-pod)"
  sealvol inspect 3f2a
  sealvol inspect -o json 3f2a | jq -r '.status.volumes[].suite'
  sealvol inspect --cid 3              # a guest by its vsock CID, without Kata

What this prints proves nothing: it came through the host, which can forge all
of it, and it is not attested. It helps to see what runs; to know that a guest
is the right one, verify its attestation report.

Flags:
`

// inspector asks a guest for its status.
type inspector struct {
	roots   []string // where Kata's runtimes keep one folder for each sandbox
	dial    func(ctx context.Context, cid, port uint32) (net.Conn, error)
	timeout time.Duration
}

func newInspector() *inspector {
	return &inspector{
		roots:   []string{"/run/vc/sbs", "/run/kata"}, // the Go runtime's, runtime-rs's
		dial:    dialVsock,
		timeout: 15 * time.Second,
	}
}

func (i *inspector) run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("inspect", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // its own reports would repeat ours
	output := flags.String("o", "table", "output `FORMAT`: table or json")
	cid := flags.Uint("cid", 0, "vsock `CID` of the guest, instead of SANDBOX")
	flags.DurationVar(&i.timeout, "timeout", i.timeout, "`TIME` to wait for the guest")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(stdout)
		_, err := io.WriteString(stdout, inspectHelp)
		flags.PrintDefaults()
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", errUsage, err)
	case *output != "table" && *output != "json":
		return fmt.Errorf("%w: -o %s is neither table nor json", errUsage, *output)
	case *cid > math.MaxUint32:
		return fmt.Errorf("%w: --cid %d is no CID", errUsage, *cid)
	case *cid == 0 && flags.NArg() == 0:
		return fmt.Errorf("%w: which sandbox? `crictl pods -q` lists them", errUsage)
	case flags.NArg() > 1 || *cid != 0 && flags.NArg() > 0:
		return fmt.Errorf("%w: unexpected argument %q (flags go before SANDBOX)", errUsage, flags.Arg(flags.NArg()-1))
	}
	ctx, cancel := context.WithTimeout(ctx, i.timeout)
	defer cancel()

	r := report{CID: uint32(*cid)}
	if r.CID == 0 {
		s, err := findSandbox(i.roots, flags.Arg(0))
		if err != nil {
			return err
		}
		if r.CID, err = s.cid(ctx); err != nil {
			return fmt.Errorf("sandbox %s: %w", s.id, err)
		}
		r.Sandbox = s.id
	}
	var err error
	if r.Status, err = i.ask(ctx, r.CID); err != nil {
		return fmt.Errorf("guest with CID %d: %w", r.CID, err)
	}
	r.notes, err = check(r.Status)
	if err != nil {
		return fmt.Errorf("guest with CID %d: its answer is damaged or forged: %w", r.CID, err)
	}
	if *output == "json" {
		return r.writeJSON(stdout)
	}
	return r.writeTable(stdout)
}

func (i *inspector) ask(ctx context.Context, cid uint32) (*sealvolv1.StatusResponse, error) {
	conn, err := i.dial(ctx, cid, sealvolv1.ControlPort)
	if err != nil {
		return nil, fmt.Errorf("no control service on vsock port %d: %w: is this a guest of sealvol, and does it still run?", sealvolv1.ControlPort, err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	status, err := sealvolv1.NewControlClient(client).Status(ctx, &sealvolv1.StatusRequest{})
	if ctx.Err() != nil {
		return nil, fmt.Errorf("control service: no answer in time: %w: try again, or with a longer --timeout", ctx.Err())
	}
	if err != nil {
		err = errgrpc.ToNative(err)
		if errdefs.IsNotImplemented(err) {
			return nil, errors.New("its control service is another version than sealvol.v1: use the sealvol tool that was built with the guest image")
		}
		if slices.ContainsFunc([]rune(err.Error()), unprintable) {
			return nil, errors.New("the control service answered with an error that cannot be printed")
		}
		return nil, fmt.Errorf("control service: %w", err)
	}
	return status, nil
}
