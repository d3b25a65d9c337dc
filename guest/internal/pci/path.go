// Package pci finds the block device that the host plugged in at a place of the PCI tree.
//
// Kata names a virtio-blk disk by the slots on the way to it: "02/01" is the device in slot 1 behind the bridge in slot 2 of the
// root bus. The kernel's names (vda, vdb, …) depend on the order of arrival and mean nothing here.
package pci

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	// maxSlot is the highest slot of a bus.
	maxSlot = 0x1f
	// maxLevels bounds a path. Kata makes paths of two levels; a bus number has 8 bits, so that no real tree is near this.
	maxLevels = 16
)

// Path is a place in the PCI tree below the root bus 0000:00. Two paths are equal if and only if they name the same place.
// The zero value names none.
type Path struct {
	text string
}

// Parse reads a path: slots from the root bus on, each two lower-case hex digits up to 1f, with "/" between them. Every slot stands
// for its function 0. The error is errdefs.ErrInvalidArgument.
func Parse(s string) (Path, error) {
	slots := strings.Split(s, "/")
	if len(slots) > maxLevels {
		return Path{}, fmt.Errorf("PCI path has %d levels, at most %d are possible: %w", len(slots), maxLevels, errdefs.ErrInvalidArgument)
	}
	for _, slot := range slots {
		if len(slot) != 2 || hex(slot[0]) < 0 || hex(slot[1]) < 0 || hex(slot[0])<<4|hex(slot[1]) > maxSlot {
			return Path{}, fmt.Errorf("PCI path %q is not like 02/01, slots of two lower-case hex digits up to %x: %w", s, maxSlot, errdefs.ErrInvalidArgument)
		}
	}
	return Path{text: s}, nil
}

func (p Path) String() string { return p.text }

// hex is the value of a lower-case hex digit, negative for anything else.
func hex(c byte) int {
	return strings.IndexByte("0123456789abcdef", c)
}
