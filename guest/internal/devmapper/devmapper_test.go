package devmapper

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

func TestTables(t *testing.T) {
	t.Parallel()
	disk, meta := blockdev.Number{Major: 254, Minor: 16}, blockdev.Number{Major: 7, Minor: 1}
	for want, target := range map[string]Target{
		"linear 254:16 8": Linear{Device: disk, Start: 8},
		"integrity 254:16 0 32 D 4 block_size:4096 meta_device:7:1 journal_sectors:64 buffer_sectors:8": Integrity{
			Data: disk, Meta: meta, TagBytes: 32, BlockBytes: 4096, JournalSectors: 64, BufferSectors: 8},
		"crypt capi:aegis128-random :16:logon:sealvol:abcde 0 254:16 0 2 integrity:32:aead sector_size:4096": Crypt{
			Cipher: "capi:aegis128-random", KeyBytes: 16, Description: "sealvol:abcde", Device: disk, TagBytes: 32, BlockBytes: 4096},
	} {
		if got := target.kind() + " " + target.params(); got != want {
			t.Errorf("table\n%s, want\n%s", got, want)
		}
	}
}

// fakeKernel is one side of /dev/mapper/control.
type fakeKernel struct {
	t        *testing.T
	calls    []string
	mappings map[string]string // table by name
	fail     map[uint]error
	busy     int // times that a removal fails
	reply    string
	flags    uint32
}

func newControl(t *testing.T) (*Control, *fakeKernel) {
	k := &fakeKernel{t: t, mappings: map[string]string{}, fail: map[uint]error{}}
	dev := t.TempDir()
	if err := os.Mkdir(filepath.Join(dev, "mapper"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &Control{dev: dev, ioctl: k.ioctl}, k
}

func (k *fakeKernel) ioctl(request uint, buffer []byte) error {
	header := (*unix.DmIoctl)(unsafe.Pointer(&buffer[0]))
	if uintptr(unsafe.Pointer(&buffer[0]))%8 != 0 || header.Version[0] != 4 || int(header.Data_size) != len(buffer) || header.Data_start != 312 {
		k.t.Errorf("malformed message: %+v", header)
	}
	name := text(header.Name[:])
	k.calls = append(k.calls, map[uint]string{
		unix.DM_DEV_CREATE: "create", unix.DM_TABLE_LOAD: "load", unix.DM_DEV_SUSPEND: "resume", unix.DM_DEV_REMOVE: "remove", unix.DM_TABLE_STATUS: "status",
		unix.DM_DEV_STATUS: "find",
	}[request])
	if err := k.fail[request]; err != nil {
		return err
	}
	header.Dev = unix.Mkdev(253, 300)
	switch request {
	case unix.DM_DEV_CREATE:
		k.mappings[name] = ""
	case unix.DM_TABLE_LOAD:
		spec := (*unix.DmTargetSpec)(unsafe.Pointer(&buffer[header.Data_start]))
		if header.Target_count != 1 || int(header.Data_start+spec.Next) > len(buffer) || spec.Next%8 != 0 || header.Flags&unix.DM_SECURE_DATA_FLAG == 0 {
			k.t.Errorf("malformed table: %+v %+v", header, spec)
		}
		k.mappings[name] = text(spec.Target_type[:]) + " " + text(buffer[int(header.Data_start)+targetSpecBytes:])
	case unix.DM_DEV_REMOVE:
		if k.busy > 0 {
			k.busy--
			return unix.EBUSY
		}
		if _, ok := k.mappings[name]; !ok {
			return unix.ENXIO
		}
		delete(k.mappings, name)
	case unix.DM_DEV_STATUS:
		if _, ok := k.mappings[name]; !ok {
			return unix.ENXIO
		}
	case unix.DM_TABLE_STATUS:
		header.Flags = k.flags
		header.Target_count = 1
		spec := (*unix.DmTargetSpec)(unsafe.Pointer(&buffer[header.Data_start]))
		spec.Length = 8
		copy(spec.Target_type[:], "linear")
		copy(buffer[int(header.Data_start)+targetSpecBytes:], k.reply)
	}
	return nil
}

func TestCreateMakesReadyAndRemoveLeavesNothing(t *testing.T) {
	t.Parallel()
	c, k := newControl(t)
	link := filepath.Join(c.dev, "mapper", "one")
	// A link of this name that somebody left behind.
	if err := os.Symlink("nowhere", link); err != nil {
		t.Fatal(err)
	}
	device, err := c.Create(t.Context(), "one", "uuid", 4096, Linear{})
	if err != nil {
		t.Fatal(err)
	}
	want := Device{Name: "one", Number: blockdev.Number{Major: 253, Minor: 300}, Bytes: 4096}
	if device != want || device.Node() != "/dev/dm-300" || device.Link() != "/dev/mapper/one" {
		t.Errorf("device %+v", device)
	}
	if to, err := os.Readlink(link); err != nil || to != "../dm-300" {
		t.Errorf("link to %q, %v", to, err)
	}
	if k.mappings["one"] != "linear 0:0 0" {
		t.Errorf("mappings %q", k.mappings)
	}
	for range 2 { // the second time there is nothing to remove
		if err := c.Remove(t.Context(), "one"); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(link); !errors.Is(err, os.ErrNotExist) || len(k.mappings) != 0 {
		t.Errorf("left: %v, %v", err, k.mappings)
	}
}

func TestCreateUndoes(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		request uint
		calls   string
	}{
		"create": {unix.DM_DEV_CREATE, "create"},
		"load":   {unix.DM_TABLE_LOAD, "create load remove"},
		"resume": {unix.DM_DEV_SUSPEND, "create load resume remove"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, k := newControl(t)
			k.fail[test.request] = unix.ENOENT
			if _, err := c.Create(t.Context(), "one", "", 4096, Linear{}); !errors.Is(err, unix.ENOENT) {
				t.Error(err)
			}
			if calls := strings.Join(k.calls, " "); calls != test.calls || len(k.mappings) != 0 {
				t.Errorf("calls %s, left %v", calls, k.mappings)
			}
		})
	}
	t.Run("link", func(t *testing.T) {
		t.Parallel()
		c, k := newControl(t)
		if err := os.Remove(filepath.Join(c.dev, "mapper")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Create(t.Context(), "one", "", 4096, Linear{}); !errors.Is(err, os.ErrNotExist) || len(k.mappings) != 0 {
			t.Errorf("%v, left %v", err, k.mappings)
		}
	})
	t.Run("names that do not fit", func(t *testing.T) {
		t.Parallel()
		c, k := newControl(t)
		for _, name := range [][2]string{{strings.Repeat("x", 128), ""}, {"one", strings.Repeat("x", 129)}} {
			if _, err := c.Create(t.Context(), name[0], name[1], 4096, Linear{}); !errdefs.IsInvalidArgument(err) || len(k.calls) != 0 {
				t.Errorf("%v, calls %v", err, k.calls)
			}
		}
	})
}

func TestRemoveWaitsForTheLastUser(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, k := newControl(t)
		k.mappings["one"], k.busy = "", 20
		if err := c.Remove(t.Context(), "one"); err != nil || len(k.mappings) != 0 {
			t.Errorf("%v, left %v", err, k.mappings)
		}
		k.mappings["one"], k.busy = "", 1<<30
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Remove(ctx, "one"); !errdefs.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		k.fail[unix.DM_DEV_REMOVE] = unix.EPERM
		if err := c.Remove(t.Context(), "one"); !errors.Is(err, unix.EPERM) {
			t.Error(err)
		}
	})
}

func TestTableAndStatus(t *testing.T) {
	t.Parallel()
	c, k := newControl(t)
	k.reply = "254:0 0"
	if table, err := c.Table("one"); err != nil || table != "0 8 linear 254:0 0" {
		t.Errorf("%q, %v", table, err)
	}
	if status, err := c.Status("one"); err != nil || status != "254:0 0" {
		t.Errorf("%q, %v", status, err)
	}
	k.flags = unix.DM_BUFFER_FULL_FLAG
	if _, err := c.Table("one"); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	k.fail[unix.DM_TABLE_STATUS] = unix.ENXIO
	if _, err := c.Status("one"); !errors.Is(err, unix.ENXIO) {
		t.Error(err)
	}
}

func TestFindKnowsMappingsOfOthers(t *testing.T) {
	t.Parallel()
	c, k := newControl(t)
	if device, err := c.Find("one"); !errdefs.IsNotFound(err) || device != (Device{}) {
		t.Errorf("%+v, %v", device, err)
	}
	k.mappings["one"] = "linear 254:0 0"
	want := Device{Name: "one", Number: blockdev.Number{Major: 253, Minor: 300}, Bytes: 4096}
	if device, err := c.Find("one"); err != nil || device != want {
		t.Errorf("%+v, %v", device, err)
	}
	k.fail[unix.DM_TABLE_STATUS] = unix.ENXIO
	if _, err := c.Find("one"); !errors.Is(err, unix.ENXIO) {
		t.Error(err)
	}
	k.fail[unix.DM_DEV_STATUS] = unix.EPERM
	if _, err := c.Find("one"); !errors.Is(err, unix.EPERM) || errdefs.IsNotFound(err) {
		t.Error(err)
	}
}
