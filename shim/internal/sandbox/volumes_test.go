package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/record"
)

// fakeDevices are devices that can be opened and note what is open.
type fakeDevices struct {
	fail   hotplug.Backing
	opened map[string]int
}

type fakeDevice struct {
	devices *fakeDevices
	path    string
}

func (f *fakeDevices) open(b hotplug.Backing) (Device, error) {
	if b == f.fail {
		return nil, errors.New("no such disk")
	}
	f.opened[b.String()]++
	return fakeDevice{f, b.String()}, nil
}

func (d fakeDevice) Path() string { return d.path }

func (d fakeDevice) Close() error {
	d.devices.opened[d.path]--
	return nil
}

func newVolumes(t *testing.T) (*volumes, *fakeDevices) {
	t.Helper()
	devices := &fakeDevices{opened: map[string]int{}}
	return &volumes{
		sandbox: "sb", records: record.Dir(filepath.Join(t.TempDir(), "records")), open: devices.open,
		byName: map[string]*volume{}, kept: map[hotplug.Backing]Device{},
	}, devices
}

func want(name string, backing hotplug.Backing) hotplug.Volume {
	return hotplug.Volume{Name: name, MountPath: "/" + name, Source: hotplug.Source("sb", name), Backing: backing}
}

func (v *volumes) check(t *testing.T, devices *fakeDevices, records, opened int) {
	t.Helper()
	entries, err := os.ReadDir(string(v.records))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if len(entries) != records {
		t.Errorf("%d records, not %d", len(entries), records)
	}
	total := 0
	for path, n := range devices.opened {
		if n < 0 || n > 1 {
			t.Errorf("%s is open %d times", path, n)
		}
		total += n
	}
	if total != opened {
		t.Errorf("%d devices are open, not %d", total, opened)
	}
}

func TestAVolumeKeepsItsDeviceAndLosesItsRecord(t *testing.T) {
	t.Parallel()
	v, devices := newVolumes(t)
	disk := hotplug.Device{Major: 7, Minor: 1}
	for _, container := range []string{"c1", "c2"} {
		if _, err := v.add(container, []hotplug.Volume{want("a", disk)}); err != nil {
			t.Fatal(err)
		}
		v.settle(container)
	}
	v.check(t, devices, 1, 1)
	for i, container := range []string{"c1", "c1", "c2", "c3"} {
		if err := v.drop(container); err != nil {
			t.Fatal(err)
		}
		v.check(t, devices, []int{1, 1, 0, 0}[i], 1)
	}
	if _, err := v.add("c4", []hotplug.Volume{want("a", hotplug.File("/x"))}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another backing: %v", err)
	}
	if _, err := v.add("c4", []hotplug.Volume{want("b", disk)}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another volume's device: %v", err)
	}
	v.check(t, devices, 0, 1)
	if err := v.close(); err != nil {
		t.Fatal(err)
	}
	v.check(t, devices, 0, 0)
}

// A disk with which no container could be created makes room for another one, and keeps its number: Kata may have kept a match for it.
func TestAVolumeThatWasNeverCreatedMayComeOnAnotherDisk(t *testing.T) {
	t.Parallel()
	v, devices := newVolumes(t)
	small, large := hotplug.Device{Major: 7, Minor: 1}, hotplug.File("/large")
	add := func(container string, disk hotplug.Backing) error {
		_, err := v.add(container, []hotplug.Volume{want("a", disk)})
		return err
	}
	for i, disk := range []hotplug.Backing{small, large, small, small, large} {
		undo, err := v.add("c1", []hotplug.Volume{want("a", disk), want("b", hotplug.File("/never"))})
		if err != nil {
			t.Fatal(err)
		}
		if err := undo(); err != nil { // The stock shim did not hear of it.
			t.Fatal(err)
		}
		v.check(t, devices, 0, min(i, 2))
		if err := add("c1", disk); err != nil {
			t.Fatal(err)
		}
		if err := v.drop("c1"); err != nil { // The stock shim has refused it.
			t.Fatal(err)
		}
		v.check(t, devices, 0, min(i+1, 2))
	}
	if err := add("c1", large); err != nil {
		t.Fatal(err)
	}
	if err := add("c2", small); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("while a container is created its volume is on one disk: %v", err)
	}
	v.settle("c1")
	if err := v.drop("c1"); err != nil {
		t.Fatal(err)
	}
	if err := add("c2", small); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container was created with the volume, its data are on that disk: %v", err)
	}
	v.check(t, devices, 0, 2)
	if err := v.close(); err != nil {
		t.Fatal(err)
	}
	v.check(t, devices, 0, 0)
}

func TestAddIsAllOrNothing(t *testing.T) {
	t.Parallel()
	first, second := hotplug.Device{Major: 7, Minor: 1}, hotplug.Device{Major: 7, Minor: 2}
	for name, spoil := range map[string]func(*testing.T, *volumes, *fakeDevices){
		"the second disk is not there": func(_ *testing.T, _ *volumes, d *fakeDevices) { d.fail = second },
		"the second record cannot be written": func(t *testing.T, v *volumes, _ *fakeDevices) {
			// Kata's folder of records, with a file in the place of the second.
			if err := v.records.Write(hotplug.Source("sb", "b"), "/x"); err != nil {
				t.Fatal(err)
			}
			entries, err := filepath.Glob(filepath.Join(string(v.records), "*"))
			if err != nil || len(entries) != 1 {
				t.Fatalf("%v, %v", entries, err)
			}
			if err := errors.Join(os.RemoveAll(entries[0]), os.WriteFile(entries[0], nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v, devices := newVolumes(t)
			spoil(t, v, devices)
			if _, err := v.add("c1", []hotplug.Volume{want("a", first), want("b", second)}); err == nil {
				t.Fatal("no error")
			}
			v.check(t, devices, 0, 0)
			if len(v.byName) != 0 {
				t.Errorf("volumes are left: %v", v.byName)
			}
		})
	}
}

func TestUndoTakesBackWhatAddBrought(t *testing.T) {
	t.Parallel()
	v, devices := newVolumes(t)
	if _, err := v.add("c1", []hotplug.Volume{want("a", hotplug.File("/a"))}); err != nil {
		t.Fatal(err)
	}
	undo, err := v.add("c2", []hotplug.Volume{want("a", hotplug.File("/a")), want("b", hotplug.File("/b"))})
	if err != nil {
		t.Fatal(err)
	}
	v.check(t, devices, 2, 2)
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	v.check(t, devices, 1, 1)
}
