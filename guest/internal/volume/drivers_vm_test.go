//go:build vm

package volume

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/integration/qmp"
)

// The machine has two more disks, of 64 MiB each: behind a root port and a bridge, and on virtio-scsi, which has no other.
const (
	onPort = 3
	onSCSI = 4
)

// sealsAndOpensAgain has a volume live on the disk at an address, with a container that comes back after again has been called.
func sealsAndOpensAgain(t *testing.T, at device.Address, disk int, again func()) {
	t.Helper()
	m := newVM(t)
	want := content("needle", 128)
	s := spec()
	small(&s)
	if err := m.Acquire(timeout(t, time.Minute), "c1", "v", s, at); err != nil {
		t.Fatal(err)
	}
	use := func(do func(file string)) {
		t.Helper()
		dir, err := m.Attach(t.Context(), "v")
		if err != nil {
			t.Fatal(err)
		}
		do(filepath.Join(dir, "needle.py"))
		if err := m.Detach(context.WithoutCancel(t.Context()), "v"); err != nil {
			t.Fatal(err)
		}
	}
	use(func(file string) { write(t, file, want) })
	if got := m.Disks()["v"]; got != at {
		t.Errorf("the volume's disk is at %v, want %v", got, at)
	}
	release(t, m, "c1")
	onHost := read(t, host(t, disk), 0, smallBytes)
	if bytes.Contains(onHost, []byte("plaintext of")) || bytes.Equal(onHost, make([]byte, smallBytes)) {
		t.Error("the host's file has the volume in plain, or nothing of it")
	}
	again()
	if err := m.Acquire(timeout(t, time.Minute), "c2", "v", s, at); err != nil {
		t.Fatalf("the volume does not come back for the next container: %v", err)
	}
	use(func(file string) {
		dropCaches(t)
		if failed := verify(t, file, want); failed != nil {
			t.Errorf("blocks %v do not read", failed)
		}
	})
	release(t, m, "c2")
}

func TestVMSealsADiskBehindARootPortAndABridge(t *testing.T) {
	sealsAndOpensAgain(t, address(t, "blk", "1c/00/01"), onPort, func() {})
}

// Kata takes the disk out when the container has stopped, and puts it in again for the next.
func TestVMSealsASCSIDiskThatIsPluggedInAgain(t *testing.T) {
	sealsAndOpensAgain(t, address(t, "scsi", "0:0"), onSCSI, func() {
		unplugSCSI(t, address(t, "scsi", "0:0"))
		plugSCSI(t, 0)
	})
}

func TestVMWaitsForASCSIDisk(t *testing.T) {
	ctx := timeout(t, time.Minute)
	before, err := device.Find("/sys", address(t, "scsi", "0:0"))
	if err != nil {
		t.Fatal(err)
	}
	unplugSCSI(t, address(t, "scsi", "0:0"))
	type found struct {
		disk device.Disk
		err  error
	}
	done := make(chan found, 1)
	go func() {
		disk, err := device.Wait(ctx, "/sys", address(t, "scsi", "1:2"))
		done <- found{disk, err}
	}()
	plugSCSI(t, 1*256+2)
	got := <-done
	if got.err != nil || got.disk.Bytes != before.Bytes || got.disk.Sequence <= before.Sequence {
		t.Errorf("plugged in at 1:2: %+v, %v; it was %+v", got.disk, got.err, before)
	}
	unplugSCSI(t, address(t, "scsi", "1:2"))
	plugSCSI(t, 0)
	after, err := device.Wait(ctx, "/sys", address(t, "scsi", "0:0"))
	if err != nil || after.Sequence <= got.disk.Sequence {
		t.Errorf("plugged in at 0:0 again: %+v, %v; another disk in the same place must have another sequence number", after, err)
	}
}

// Each disk has one address: by another driver's form, or by its controller's, it is not found or not one.
func TestVMADiskHasOneAddress(t *testing.T) {
	for _, at := range []device.Address{address(t, "blk", "13"), address(t, "mmioblk", "/dev/vda"), address(t, "blk", "10")} {
		if disk, err := device.Find("/sys", at); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%v: %+v, %v", at, disk, err)
		}
	}
	for _, at := range []device.Address{address(t, "blk", "1c"), address(t, "blk", "1c/00"), address(t, "blk", "00/01"), address(t, "scsi", "0:1"), address(t, "mmioblk", "/dev/vdzz")} {
		if disk, err := device.Find("/sys", at); !errdefs.IsNotFound(err) {
			t.Errorf("%v: %+v, %v", at, disk, err)
		}
	}
	numbers := map[string]device.Address{}
	for _, at := range []device.Address{path(t, slots[0]), path(t, slots[1]), path(t, slots[2]), path(t, "1c/00/01"), address(t, "scsi", "0:0")} {
		disk, err := device.Find("/sys", at)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := numbers[disk.Number.String()]; ok {
			t.Errorf("%v and %v are one disk", other, at)
		}
		numbers[disk.Number.String()] = at
	}
}

// unplugSCSI takes the disk out. QEMU tells the guest and does not wait for it, as it does on PCI.
func unplugSCSI(t *testing.T, at device.Address) {
	t.Helper()
	unplug(t, onSCSI)
	for ctx := timeout(t, time.Minute); ; time.Sleep(time.Millisecond) {
		_, err := device.Find("/sys", at)
		if errdefs.IsNotFound(err) {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%v: the disk is still there: %v", at, err)
		}
	}
}

// plugSCSI puts the disk in as Kata does, by its number.
func plugSCSI(t *testing.T, index int) {
	t.Helper()
	if err := qemu(t).Execute("device_add", map[string]any{
		"driver": "scsi-hd", "id": qmp.ID(onSCSI), "drive": qmp.ID(onSCSI), "bus": "scsi0.0", "channel": 0, "scsi-id": index / 256, "lun": index % 256,
		"werror": "report",
	}); err != nil {
		t.Fatal(err)
	}
}
