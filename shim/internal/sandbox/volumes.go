package sandbox

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/record"
)

// Device is an open backing.
type Device interface {
	Path() string
	Close() error
}

// volumes are the volumes of one sandbox. A volume is on one device from the
// first container that was created with it to the end of the sandbox, and has
// its record while a container refers to it. A device that the stock shim has
// heard of stays open to the end, whatever became of it, so that no other disk
// appears under its number meanwhile.
type volumes struct {
	sandbox string
	records record.Dir
	open    func(hotplug.Backing) (Device, error)

	byName map[string]*volume
	// kept are devices that no volume is on: no container could be created with them.
	kept map[hotplug.Backing]Device
}

type volume struct {
	backing hotplug.Backing
	device  Device
	users   map[string]bool // ids of containers
	settled bool            // a container was created with it
}

// opener opens a backing that no other sandbox has.
func (d dir) opener(open func(hotplug.Backing) (Device, error)) func(hotplug.Backing) (Device, error) {
	return func(b hotplug.Backing) (Device, error) {
		device, err := open(b)
		number, isNumber := b.(hotplug.Device)
		if err != nil || !isNumber {
			return device, err
		}
		// Asked after it was locked: who had the lock before has written its state.
		if err := d.checkFree(number); err != nil {
			return nil, errors.Join(err, device.Close())
		}
		return device, nil
	}
}

// numbers gives the block devices that are open by their number, in order.
func (v *volumes) numbers() []string {
	backings := slices.Collect(maps.Keys(v.kept))
	for _, vol := range v.byName {
		backings = append(backings, vol.backing)
	}
	var numbers []string
	for _, backing := range backings {
		if number, ok := backing.(hotplug.Device); ok {
			numbers = append(numbers, number.String())
		}
	}
	slices.Sort(numbers)
	return numbers
}

// add makes the volumes ready for a container, all of them or none. What it
// gives takes that back, as long as the stock shim has not heard of them.
func (v *volumes) add(container string, wanted []hotplug.Volume) (undo func() error, err error) {
	var opened []hotplug.Backing
	undo = func() error {
		errs := []error{v.drop(container)}
		for _, backing := range opened {
			errs = append(errs, v.kept[backing].Close())
			delete(v.kept, backing)
		}
		return errors.Join(errs...)
	}
	for _, w := range wanted {
		fresh, err := v.use(container, w)
		if fresh {
			opened = append(opened, w.Backing)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("volume %q: %w", w.Name, err), undo())
		}
	}
	return undo, nil
}

// use gives a container a volume, and says whether its device was opened for that.
func (v *volumes) use(container string, w hotplug.Volume) (fresh bool, err error) {
	vol := v.byName[w.Name]
	if vol == nil {
		for name, other := range v.byName {
			if other.backing == w.Backing {
				return false, fmt.Errorf("%v is that of volume %q of this pod: %w", w.Backing, name, errdefs.ErrFailedPrecondition)
			}
		}
		device, kept := v.kept[w.Backing]
		if !kept {
			if device, err = v.open(w.Backing); err != nil {
				return false, err
			}
		}
		delete(v.kept, w.Backing)
		vol, fresh = &volume{backing: w.Backing, device: device, users: map[string]bool{}}, !kept
		v.byName[w.Name] = vol
	}
	if vol.backing != w.Backing {
		return fresh, fmt.Errorf("it is on %v for the life of this pod, not on %v: %w", vol.backing, w.Backing, errdefs.ErrFailedPrecondition)
	}
	first := len(vol.users) == 0
	vol.users[container] = true
	if first {
		if err := v.records.Write(w.Source, vol.device.Path()); err != nil {
			return fresh, fmt.Errorf("direct-volume record: %w", err)
		}
	}
	return fresh, nil
}

// settle notes that a container was created.
func (v *volumes) settle(container string) {
	for _, vol := range v.byName {
		if vol.users[container] {
			vol.settled = true
		}
	}
}

// drop ends what a container refers to, and records that none refers to any
// more. A volume that no container was created with may come on another disk.
func (v *volumes) drop(container string) error {
	var errs []error
	for name, vol := range v.byName {
		if !vol.users[container] {
			continue
		}
		delete(vol.users, container)
		if len(vol.users) > 0 {
			continue
		}
		errs = append(errs, v.records.Remove(hotplug.Source(v.sandbox, name)))
		if !vol.settled {
			v.kept[vol.backing] = vol.device
			delete(v.byName, name)
		}
	}
	return errors.Join(errs...)
}

// close lets go of all devices.
func (v *volumes) close() error {
	var errs []error
	for _, vol := range v.byName {
		errs = append(errs, vol.device.Close())
	}
	for _, device := range v.kept {
		errs = append(errs, device.Close())
	}
	clear(v.byName)
	clear(v.kept)
	return errors.Join(errs...)
}
