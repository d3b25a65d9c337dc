package sandbox

import (
	"flag"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
)

// Call is how containerd calls a shim binary, core/runtime/v2/binary.go and
// the flags of pkg/shim/shim.go there.
type Call struct {
	Namespace, Address, PublishBinary, ID string
	// Bundle is given to `delete`. For `start` it is the working directory.
	Bundle string
	Debug  bool
	// Action is `start`, `delete`, or none.
	Action string
}

// ParseCall reads the arguments of `start` or `delete`. Others are an
// errdefs.ErrNotImplemented: they are between containerd and the stock shim.
func ParseCall(args []string) (Call, error) {
	var c Call
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&c.Namespace, "namespace", "", "")
	flags.StringVar(&c.Address, "address", "", "")
	flags.StringVar(&c.PublishBinary, "publish-binary", "", "")
	flags.StringVar(&c.ID, "id", "", "")
	flags.StringVar(&c.Bundle, "bundle", "", "")
	flags.BoolVar(&c.Debug, "debug", false, "")
	if err := flags.Parse(args); err != nil {
		return Call{}, fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	}
	c.Action = flags.Arg(0)
	if c.Action != "start" && c.Action != "delete" || flags.NArg() != 1 {
		return Call{}, fmt.Errorf("arguments %q: %w", flags.Args(), errdefs.ErrNotImplemented)
	}
	if err := identifiers.Validate(c.Namespace); err != nil {
		return Call{}, fmt.Errorf("-namespace: %w", err)
	}
	if err := identifiers.Validate(c.ID); err != nil {
		return Call{}, fmt.Errorf("-id: %w", err)
	}
	return c, nil
}

// args gives the arguments with which containerd would call the stock shim.
func (c Call) args() []string {
	args := []string{"-namespace", c.Namespace, "-address", c.Address, "-publish-binary", c.PublishBinary, "-id", c.ID}
	if c.Bundle != "" {
		args = append(args, "-bundle", c.Bundle)
	}
	if c.Debug {
		args = append(args, "-debug")
	}
	return append(args, c.Action)
}
