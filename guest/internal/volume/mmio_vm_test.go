//go:build vm && mmio

package volume

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/device"
)

// This machine has its one disk on virtio-mmio, as Firecracker's have.
func TestMMIOSealsADisk(t *testing.T) {
	if disk, err := device.Find("/sys", address(t, "mmioblk", "/dev/vdb")); !errdefs.IsNotFound(err) {
		t.Errorf("another name: %+v, %v", disk, err)
	}
	sealsAndOpensAgain(t, address(t, "mmioblk", "/dev/vda"), 0, func() {})
}
