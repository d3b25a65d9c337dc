package sandbox

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/record"
)

// Device is an open backing.
type Device interface {
	Path() string
	Close() error
}

// volumes are the volumes of one sandbox. A volume has its device from its
// first use to the end of the sandbox, so that no other disk appears under the
// device's number meanwhile, and its record while a container refers to it.
type volumes struct {
	sandbox string
	records record.Dir
	open    func(hotplug.Backing) (Device, error)

	byName map[string]*volume
}

type volume struct {
	backing hotplug.Backing
	device  Device
	users   map[string]bool // ids of containers
}

// add makes the volumes ready for a container, all of them or none. What it
// gives takes that back, as long as the stock shim has not heard of them.
func (v *volumes) add(container string, wanted []hotplug.Volume) (undo func() error, err error) {
	var fresh []string
	undo = func() error {
		errs := []error{v.drop(container)}
		for _, name := range fresh {
			errs = append(errs, v.byName[name].device.Close())
			delete(v.byName, name)
		}
		return errors.Join(errs...)
	}
	for _, w := range wanted {
		added, err := v.use(container, w)
		if added {
			fresh = append(fresh, w.Name)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("volume %q: %w", w.Name, err), undo())
		}
	}
	return undo, nil
}

// use gives a container a volume, and says whether it is the first that has it.
func (v *volumes) use(container string, w hotplug.Volume) (added bool, err error) {
	vol := v.byName[w.Name]
	if vol == nil {
		for name, other := range v.byName {
			if other.backing == w.Backing {
				return false, fmt.Errorf("%v is that of volume %q of this pod: %w", w.Backing, name, errdefs.ErrFailedPrecondition)
			}
		}
		opened, err := v.open(w.Backing)
		if err != nil {
			return false, err
		}
		vol = &volume{backing: w.Backing, device: opened, users: map[string]bool{}}
		v.byName[w.Name] = vol
		added = true
	}
	if vol.backing != w.Backing {
		return added, fmt.Errorf("it is on %v for the life of this pod, not on %v: %w", vol.backing, w.Backing, errdefs.ErrFailedPrecondition)
	}
	if len(vol.users) == 0 {
		if err := v.records.Write(w.Source, vol.device.Path()); err != nil {
			return added, fmt.Errorf("direct-volume record: %w", err)
		}
	}
	vol.users[container] = true
	return added, nil
}

// drop ends what a container refers to, and records that none refers to any more.
func (v *volumes) drop(container string) error {
	var errs []error
	for name, vol := range v.byName {
		if !vol.users[container] {
			continue
		}
		delete(vol.users, container)
		if len(vol.users) == 0 {
			errs = append(errs, v.records.Remove(hotplug.Source(v.sandbox, name)))
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
	clear(v.byName)
	return errors.Join(errs...)
}
