package devmapper

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Find returns a mapping that was made by another program. The error is errdefs.ErrNotFound when there is none of that name, and
// errdefs.ErrFailedPrecondition when it has not one target, as one has that is still being made.
func (c *Control) Find(name string) (Device, error) {
	status := newMessage(name)
	_, err := c.send(unix.DM_DEV_STATUS, status, nil)
	if errors.Is(err, unix.ENXIO) {
		return Device{}, fmt.Errorf("mapping %s: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return Device{}, fmt.Errorf("mapping %s: %w", name, err)
	}
	spec, _, err := c.target(name, unix.DM_STATUS_TABLE_FLAG)
	if err != nil {
		return Device{}, err
	}
	return Device{Name: name, Number: blockdev.FromDev(status.Dev), Bytes: spec.Length * SectorBytes}, nil
}
