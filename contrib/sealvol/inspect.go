package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"

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
type inspector struct{ guests }

func (i *inspector) run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("inspect", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // its own reports would repeat ours
	output := flags.String("o", "table", "output `FORMAT`: table or json")
	pod := i.flags(flags)
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
	}
	if err := pod.check(flags); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, i.timeout)
	defer cancel()

	var r report
	var err error
	if r.Sandbox, r.CID, err = i.find(ctx, pod, flags); err != nil {
		return err
	}
	err = i.Ask(ctx, r.CID, func(c sealvolv1.ControlService) (err error) {
		r.Status, err = c.Status(ctx, &sealvolv1.StatusRequest{})
		return err
	})
	if err != nil {
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
