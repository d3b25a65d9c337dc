// Package volume seals the devices that the host plugs in and keeps them for the containers of the pod.
//
// A volume of the layering memory-tags is, from the container's side down:
//
//	file system      ext4 or xfs, mounted and attached nowhere but while the agent needs a path
//	dm-crypt         encrypted_disk_XXXXX: encrypts and authenticates, key in guest memory
//	dm-integrity     encrypted_disk_XXXXX_dif: keeps IV and tag of each block in a device of their own:
//	                     a loop device over a file in guest memory (package tagstore)
//	dm-linear        encrypted_disk_XXXXX_cut: what the policy wants of the disk
//	disk             virtio-blk or virtio-scsi, the host's
//
// The disk holds ciphertext and nothing else. (The layering luks2, which has the tags on the disk, is drawn at diskTags.) What a volume is made of comes from the policy; nothing is read from the disk that was not
// written, and so authenticated, by this guest.
//
// A volume is sealed for the first container that uses it and closed after the last. Key and tags stay, so that it can be opened
// again on a disk with the same bytes, wherever the host plugs it in. A volume whose last close was not clean is lost.
package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/luks2"
	"github.com/sealvol/sealvol/policy"
)

// Config is what a Manager needs.
type Config struct {
	Dir         string // a folder of the service's own; volumes are attached at Dir/volumes/NAME
	Tools       filesystem.Tools
	Cryptsetup  string // path; needed where a policy wants luks2
	AllowKernel bool   // the image's maker says that its kernel has the fixes that checkKernel looks for
	Log         *slog.Logger
}

// Manager owns the volumes of the sandbox. It may be used by several goroutines at once; volumes do not wait for one another.
type Manager struct {
	dir    string
	log    *slog.Logger
	kernel kernel
	close  func() error // what New opened

	mu      sync.Mutex
	volumes map[string]*volume
	claims  map[device.Address]string   // the volume that a disk belongs to
	holders map[string]map[*volume]bool // by container
	ended   bool
}

// New makes a Manager without volumes. The error is errdefs.ErrFailedPrecondition when the kernel cannot seal.
func New(config Config) (_ *Manager, err error) {
	if !config.AllowKernel {
		if err := checkKernel(); err != nil {
			return nil, err
		}
	}
	control, err := devmapper.Open()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(config.Dir, "volumes")
	place, err := filesystem.NewPlace(dir)
	if err != nil {
		return nil, errors.Join(err, control.Close())
	}
	if err := sweepLeftovers(control, config.Log); err != nil {
		return nil, errors.Join(err, place.Close(), control.Close())
	}
	faults, stopWatching, err := watchFaults(config.Log)
	if err != nil {
		return nil, errors.Join(err, place.Close(), control.Close())
	}
	m := newManager(dir, config.Log, kernel{
		disks:   sysDisks{sysfs: "/sys"},
		mapper:  control,
		tags:    newTags,
		lend:    (*keyring.Key).Lend,
		luks2:   formatter(luks2.New(config.Cryptsetup, control)),
		driver:  func(cipher string) (string, error) { return cipherDriver("/proc/crypto", cipher) },
		systems: mkfs{tools: config.Tools},
		faults:  faults,
	})
	m.close = func() error { return errors.Join(stopWatching(), place.Close(), control.Close()) }
	return m, nil
}

// sweepLeftovers ends the volumes of a service that was killed. Their keys were in its memory alone, so none can be opened again.
func sweepLeftovers(control *devmapper.Control, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	swept, err := control.Sweep(ctx, mappingPrefix)
	for _, mapping := range swept {
		log.Warn("ended a mapping that was left behind", "mapping", mapping.Name, "in use", mapping.Held)
	}
	if err != nil {
		return fmt.Errorf("what an earlier service left behind: %w", err)
	}
	return nil
}

// errEnded is all that there is after Destroy.
var errEnded = fmt.Errorf("the sandbox has ended: %w", errdefs.ErrFailedPrecondition)

func newManager(dir string, log *slog.Logger, k kernel) *Manager {
	return &Manager{
		dir:     dir,
		log:     log,
		kernel:  k,
		close:   func() error { return nil },
		volumes: map[string]*volume{},
		claims:  map[device.Address]string{},
		holders: map[string]map[*volume]bool{},
	}
}

// Acquire makes a volume ready for a container. The first time it seals the disk at the address, waiting for it until ctx ends; when
// the volume is open it makes sure that the same disk is there; after a clean close it opens the volume again. A container
// that has the volume already may ask again.
//
// Whatever fails is undone before Acquire returns, which is why the work gets a little less time than ctx gives. The errors leave
// the volume's name to the caller. They are errdefs.ErrUnavailable when disk or time is wanting, ErrPermissionDenied for a disk
// that is another volume's or a volume that has another disk, ErrFailedPrecondition for what the policy asks and disk or kernel
// do not have, and ErrDataLoss for a volume that is lost.
func (m *Manager) Acquire(ctx context.Context, container, name string, spec policy.Volume, address device.Address) error {
	v, err := m.volume(name, spec)
	if err != nil {
		return err
	}
	return m.run(ctx, v, func(ctx context.Context) error {
		ctx, cancel := withReserve(ctx)
		defer cancel()
		err := m.acquire(ctx, v, container, address)
		if err != nil && ctx.Err() != nil && !errdefs.IsUnavailable(err) && !errdefs.IsDataLoss(err) {
			return fmt.Errorf("there was not enough time: %w: %w", err, errdefs.ErrUnavailable)
		}
		return err
	}, func(ctx context.Context) { m.release(ctx, v, container) })
}

// Release takes a container's volumes from it. The last container's volume is written back, unmounted and closed, and the disk
// let go, before Release returns. A volume for which this fails is lost; the error names it.
func (m *Manager) Release(ctx context.Context, container string) error {
	m.mu.Lock()
	held := slices.Collect(maps.Keys(m.holders[container]))
	m.mu.Unlock()
	return each(held, func(v *volume) error {
		return m.run(ctx, v, func(ctx context.Context) error { return m.release(ctx, v, container) }, nil)
	})
}

// Attach attaches a volume's mount at the returned path, until as many Detach have been called as Attach. Like Detach and Number it waits, until
// ctx ends, for what else happens to the volume, and not for its disk.
func (m *Manager) Attach(ctx context.Context, name string) (dir string, err error) {
	dir = filepath.Join(m.dir, name)
	return dir, m.withOpen(ctx, name, func(v *volume) error {
		if v.attached == 0 {
			if err := v.mount.Attach(dir); err != nil {
				return err
			}
		}
		v.attached++
		return nil
	})
}

// Detach takes a volume's mount from its path. What the agent bound from there into a container stays.
func (m *Manager) Detach(ctx context.Context, name string) error {
	return m.withOpen(ctx, name, func(v *volume) error {
		if v.attached == 0 {
			return fmt.Errorf("it is not attached: %w", errdefs.ErrFailedPrecondition)
		}
		if v.attached == 1 {
			if err := v.mount.Detach(); err != nil {
				return err
			}
		}
		v.attached--
		return nil
	})
}

// Number is the device number of a volume's file system, as a container's mountinfo shows it.
func (m *Manager) Number(ctx context.Context, name string) (major, minor uint32, err error) {
	err = m.withOpen(ctx, name, func(v *volume) error {
		major, minor = v.crypt.Number.Major, v.crypt.Number.Minor
		return nil
	})
	return major, minor, err
}

// Disks are the addresses of the disks that volumes have at present, by volume, those included that are being sealed or closed.
func (m *Manager) Disks() map[string]device.Address {
	m.mu.Lock()
	defer m.mu.Unlock()
	disks := make(map[string]device.Address, len(m.claims))
	for address, volume := range m.claims {
		disks[volume] = address
	}
	return disks
}

// withOpen calls do for a volume that is open, while nothing else happens to it.
func (m *Manager) withOpen(ctx context.Context, name string, do func(*volume) error) error {
	m.mu.Lock()
	v, ok := m.volumes[name]
	m.mu.Unlock()
	if !ok {
		return fmt.Errorf("no volume %q: %w", name, errdefs.ErrNotFound)
	}
	if err := v.lock(ctx); err != nil {
		return err
	}
	defer v.unlock()
	if state := v.state.Load(); state != stateOpen {
		return fmt.Errorf("it is %v: %w", state, errdefs.ErrFailedPrecondition)
	}
	return do(v)
}

// Status is what there is to know about each volume, sorted by name. Of a volume that is being sealed or closed at the moment it is
// the name and the state alone: Status never waits for a disk.
func (m *Manager) Status() []*sealvolv1.Volume {
	m.mu.Lock()
	volumes := slices.SortedFunc(maps.Values(m.volumes), func(a, b *volume) int { return strings.Compare(a.name, b.name) })
	m.mu.Unlock()
	var status []*sealvolv1.Volume
	for _, v := range volumes {
		status = append(status, v.status(m.kernel.mapper, m.kernel.faults))
	}
	return status
}

// Destroy ends every volume: mounts and mappings are removed, tags freed and keys overwritten. Nothing can be acquired
// afterwards. When it fails, because somebody still uses a volume, it may be called again. The key of a volume whose disk hangs is there until it lets go.
func (m *Manager) Destroy(ctx context.Context) error {
	m.mu.Lock()
	m.ended = true
	volumes := slices.Collect(maps.Values(m.volumes))
	m.mu.Unlock()
	err := each(volumes, func(v *volume) error {
		return m.run(ctx, v, func(ctx context.Context) error { return m.destroy(ctx, v) }, nil)
	})
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	close := m.close
	m.close = func() error { return nil }
	return close()
}

// volume is the volume of a name. The same name always is the same volume, with the same policy.
func (m *Manager) volume(name string, spec policy.Volume) (*volume, error) {
	// It becomes a folder of m.dir.
	if name == "" || name[0] == '.' || strings.ContainsRune(name, '/') {
		return nil, fmt.Errorf("name %q: %w", name, errdefs.ErrInvalidArgument)
	}
	p, err := newPlan(spec)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return nil, errEnded
	}
	v, ok := m.volumes[name]
	if !ok {
		v = newVolume(name, spec, p, m.log)
		m.volumes[name] = v
	}
	if !reflect.DeepEqual(v.spec, spec) {
		return nil, fmt.Errorf("it has another policy already: %w", errdefs.ErrPermissionDenied)
	}
	return v, nil
}

// claim makes a disk a volume's, or fails when it is another one's.
func (m *Manager) claim(address device.Address, v *volume) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return errEnded
	}
	if owner, ok := m.claims[address]; ok && owner != v.name {
		return fmt.Errorf("the disk at %v is volume %s: %w", address, owner, errdefs.ErrPermissionDenied)
	}
	m.claims[address] = v.name
	return nil
}

// unclaim gives a disk back, if it is the volume's.
func (m *Manager) unclaim(address device.Address, v *volume) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claims[address] == v.name {
		delete(m.claims, address)
	}
}

// forget removes a volume that is destroyed.
func (m *Manager) forget(v *volume) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.volumes, v.name)
	for _, held := range m.holders {
		delete(held, v)
	}
}

// give notes that a container has a volume.
func (m *Manager) give(container string, v *volume) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.holders[container] == nil {
		m.holders[container] = map[*volume]bool{}
	}
	m.holders[container][v] = true
}

// drop takes a volume from a container and says whether another one still has it.
func (m *Manager) drop(container string, v *volume) (held bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.holders[container], v)
	if len(m.holders[container]) == 0 {
		delete(m.holders, container)
	}
	for _, volumes := range m.holders {
		held = held || volumes[v]
	}
	return held
}

const (
	// undoTimeout bounds the undo of something that failed.
	undoTimeout = 5 * time.Second
	// maxReserve is the most time that is kept back for undo.
	maxReserve = 2 * time.Second
)

// withReserve ends a little before ctx, so that what fails because of that is undone when ctx ends.
func withReserve(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-min(time.Until(deadline)/10, maxReserve)))
}

// withUndoTime is for undo, which must happen also when ctx has ended.
func withUndoTime(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// run does something to a volume, alone. A disk that does not answer holds the work up for as long as the host likes, and no context
// ends that. So when ctx has ended and time for undo has passed, run returns without it. Should the work succeed after all, revert
// takes it back.
func (m *Manager) run(ctx context.Context, v *volume, do func(context.Context) error, revert func(context.Context)) error {
	if err := v.lock(ctx); err != nil {
		return err
	}
	var settled atomic.Bool // by the work's end or by our leaving
	done := make(chan error, 1)
	// The volume's lock is this goroutine's from here on: it ends with the work, and Destroy waits for that.
	go func() {
		err := do(ctx)
		if !settled.CompareAndSwap(false, true) && err == nil && revert != nil {
			undo, cancel := withUndoTime(ctx)
			revert(undo)
			cancel()
		}
		v.unlock()
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-time.After(undoTimeout):
	}
	if !settled.CompareAndSwap(false, true) {
		return <-done
	}
	// %v, so that the class at the RPC edge is the one that a caller acts on.
	return fmt.Errorf("the disk does not answer: %v: %w", ctx.Err(), errdefs.ErrUnavailable)
}

// each calls do for each volume at once and puts the errors into one line.
func each(volumes []*volume, do func(*volume) error) error {
	errs := make([]error, len(volumes))
	var wg sync.WaitGroup
	for i, v := range volumes {
		wg.Go(func() {
			if err := do(v); err != nil {
				errs[i] = fmt.Errorf("volume %s: %w", v.name, err)
			}
		})
	}
	wg.Wait()
	return oneLine(errs...)
}

// oneLine is errors.Join for errors that a person reads in one line.
func oneLine(errs ...error) (joined error) {
	for _, err := range errs {
		switch {
		case joined == nil:
			joined = err
		case err != nil:
			joined = fmt.Errorf("%w; %w", joined, err)
		}
	}
	return joined
}
