// Package guest reaches the guests that run on this node: it finds them by Kata's
// sandboxes, and calls their control services. What they answer came through the
// host and proves nothing. It may import guest/api and no other package of the project.
package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// Node is where guests are found.
type Node struct {
	// Roots are where Kata's runtimes keep one folder for each sandbox.
	Roots []string
	// Dial connects to a port of the guest with that vsock CID.
	Dial func(ctx context.Context, cid, port uint32) (net.Conn, error)
}

// NewNode is this machine.
func NewNode() Node {
	return Node{
		Roots: []string{"/run/vc/sbs", "/run/kata"}, // the Go runtime's, runtime-rs's
		Dial:  dialVsock,
	}
}

// Ask calls a guest's control service.
func (n Node) Ask(ctx context.Context, cid uint32, question func(sealvolv1.ControlService) error) error {
	conn, err := n.Dial(ctx, cid, sealvolv1.ControlPort)
	if err != nil {
		return fmt.Errorf("no control service on vsock port %d: %w: is this a guest of sealvol, and does it still run?", sealvolv1.ControlPort, err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	err = question(sealvolv1.NewControlClient(client))
	if ctx.Err() != nil {
		return fmt.Errorf("control service: no answer in time: %w: try again, and wait longer", ctx.Err())
	}
	if err != nil {
		err = errgrpc.ToNative(err)
		if errdefs.IsNotImplemented(err) {
			return errors.New("its control service is another version than sealvol.v1: use programs that were built with the guest image")
		}
		if slices.ContainsFunc([]rune(err.Error()), Unprintable) {
			return errors.New("the control service answered with an error that cannot be printed")
		}
		return fmt.Errorf("control service: %w", err)
	}
	return nil
}

// Unprintable characters could move the cursor, reorder text or hide it.
func Unprintable(r rune) bool {
	return r == unicode.ReplacementChar || r != ' ' && !unicode.IsGraphic(r) || unicode.Is(unicode.Zs, r) && r != ' '
}
