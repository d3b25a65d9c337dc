package volume

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/guest/internal/ioerror"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/pci"
	"github.com/sealvol/sealvol/policy"
)

// state is where a volume is in its life.
type state string

const (
	stateNew     state = "new"     // never sealed; nothing is set up
	stateSealing state = "sealing" // being sealed or opened again
	stateOpen    state = "open"
	stateClosing state = "closing"
	stateClosed  state = "closed" // cleanly: key and tags are kept
	stateFailed  state = "failed" // lost
)

// stateVar is a state that may be read without the volume's lock.
type stateVar struct{ value atomic.Value }

func (v *stateVar) Load() state   { return v.value.Load().(state) }
func (v *stateVar) Store(s state) { v.value.Store(s) }

// volume is one volume of the policy. What follows token is for whoever has the lock.
type volume struct {
	name  string
	spec  policy.Volume
	plan  plan
	log   *slog.Logger
	state stateVar

	token chan struct{} // the lock: full while somebody has it

	cause error // why the state is failed

	// From the first seal to the end of the sandbox.
	kept  layers
	label string // of the mappings
	sealed

	// While it is open.
	layers                   layers
	path                     pci.Path
	disk                     pci.Device
	linear, integrity, crypt devmapper.Device
	mount                    mount
	attached                 int // times
}

// sealed is what a volume is made of.
type sealed struct {
	bytes    uint64 // of the disk
	capacity uint64 // bytes that the file system has of them
	suite    suite
	key      *keyring.Key
	tags     tags           // of memory-tags
	header   luksHeader     // of luks2
	driver   string         // of the suite's cipher, as /proc/crypto has it
	faults   ioerror.Report // while it was open before
	found    time.Time      // when the disk was there
	ready    time.Duration  // from then to the mount
	created  time.Time      // when it was first open, by the wall clock
	opened   time.Time      // when it was last opened
}

func newVolume(name string, spec policy.Volume, p plan, log *slog.Logger) *volume {
	v := &volume{name: name, spec: spec, plan: p, log: log.With("volume", name), token: make(chan struct{}, 1)}
	v.state.Store(stateNew)
	return v
}

// mapping is the name of one of the volume's mappings.
func (v *volume) mapping(suffix string) string { return mappingPrefix + v.label + suffix }

// mappingPrefix begins the names of all our mappings, and of nobody else's.
const mappingPrefix = "encrypted_disk_"

func (v *volume) lock(ctx context.Context) error {
	select {
	case v.token <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("it is busy (%v): %w: %w", v.state.Load(), ctx.Err(), errdefs.ErrUnavailable)
	}
}

func (v *volume) unlock() { <-v.token }

func (m *Manager) acquire(ctx context.Context, v *volume, container string, path pci.Path) error {
	switch v.state.Load() {
	case stateFailed:
		return v.cause
	case stateOpen:
		if err := m.sameDisk(v, path); err != nil {
			return err
		}
	default:
		if err := m.claim(path, v); err != nil {
			return err
		}
		err := m.open(ctx, v, path)
		if len(v.layers) == 0 {
			m.unclaim(path, v)
		}
		if err != nil {
			return err
		}
	}
	m.give(container, v)
	return nil
}

// sameDisk fails unless the disk at a path is the one that an open volume is sealed on.
func (m *Manager) sameDisk(v *volume, path pci.Path) error {
	if path != v.path {
		return fmt.Errorf("its disk is at PCI path %v, not at %v: %w", v.path, path, errdefs.ErrPermissionDenied)
	}
	disk, err := m.kernel.disks.Find(path)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("its disk was unplugged: %w", errdefs.ErrUnavailable)
	}
	if err != nil {
		return err
	}
	if disk.Sequence != v.disk.Sequence {
		return fmt.Errorf("the disk at PCI path %v is not the one that it is sealed on: %w", path, errdefs.ErrPermissionDenied)
	}
	return nil
}

// open seals the disk, or opens the volume again. When it fails the volume is as before, but for two cases in which it is lost: the disk
// does not hold what was closed, or the undo failed too.
func (m *Manager) open(ctx context.Context, v *volume, path pci.Path) error {
	before := v.state.Load()
	isNew := before == stateNew
	v.state.Store(stateSealing)
	v.path = path
	step := m.reopen
	if isNew {
		step = m.seal
	}
	err := step(ctx, v)
	if err == nil {
		v.opened = time.Now()
		if isNew {
			v.created = v.opened
		}
		v.state.Store(stateOpen)
		v.log.Info("volume is open", "new", isNew, "pci", path.String(), "disk", v.disk.Name, "bytes", v.bytes,
			"suite", v.suite.name, "mapping", v.crypt.Name, "ready", v.ready)
		return nil
	}
	undo, cancel := withUndoTime(ctx)
	defer cancel()
	unsaved, left := v.takeDown(undo)
	if isNew {
		left = oneLine(left, v.kept.unwind(undo))
		v.sealed = sealed{}
		unsaved = nil // nobody has written anything yet
	}
	if undoErr := cmp.Or(unsaved, left); undoErr != nil {
		err = fmt.Errorf("%v; undo: %v: %w", err, undoErr, errdefs.ErrDataLoss)
	}
	if errdefs.IsDataLoss(err) {
		v.fail(err)
		return err
	}
	v.state.Store(before)
	v.log.Warn("volume does not open", "pci", path.String(), "error", err)
	return err
}

// seal makes the volume on the disk. What it did is in the volume's layers, also when it fails.
func (m *Manager) seal(ctx context.Context, v *volume) error {
	hold, err := m.takeDisk(ctx, v)
	if err != nil {
		return err
	}
	defer hold.Close()
	if v.bytes, err = v.plan.length(v.disk.Bytes); err != nil {
		return err
	}
	var made *making
	if length := v.plan.layering.length(v.bytes); length != 0 {
		made = startMaking(ctx, m.kernel.systems, v.plan.fs, length)
		defer made.close()
	}
	v.label = strings.ToLower(rand.Text()[:5])
	if err := m.addCut(ctx, v); err != nil {
		return err
	}
	if err := v.plan.layering.create(ctx, m, v); err != nil {
		return err
	}
	v.capacity = v.crypt.Bytes
	if made == nil {
		made = startMaking(ctx, m.kernel.systems, v.plan.fs, v.capacity)
		defer made.close()
	}
	if err := made.copyTo(ctx, v.crypt.Node()); err != nil {
		return err
	}
	return m.addMount(ctx, v)
}

// reopen makes the volume available again after a clean close.
func (m *Manager) reopen(ctx context.Context, v *volume) error {
	hold, err := m.takeDisk(ctx, v)
	if err != nil {
		return err
	}
	defer hold.Close()
	if v.disk.Bytes < v.bytes {
		return fmt.Errorf("the disk has %d bytes, the volume %d: %w", v.disk.Bytes, v.bytes, errdefs.ErrFailedPrecondition)
	}
	if err := m.addCut(ctx, v); err != nil {
		return err
	}
	if err := v.plan.layering.open(ctx, m, v); err != nil {
		return err
	}
	err = m.addMount(ctx, v)
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("the disk does not hold what the volume was closed with: %v: %w", err, errdefs.ErrDataLoss)
	}
	return err
}

// takeDisk waits for the disk and makes sure that it is nobody's, until the mapping over it is there and the result is closed.
func (m *Manager) takeDisk(ctx context.Context, v *volume) (_ closer, err error) {
	if v.disk, err = m.kernel.disks.Wait(ctx, v.path); err != nil {
		return nil, err
	}
	if v.disk.ReadOnly {
		return nil, fmt.Errorf("the disk at PCI path %v is read-only: %w", v.path, errdefs.ErrFailedPrecondition)
	}
	v.found = time.Now()
	return m.kernel.disks.Hold(ctx, v.disk)
}

// addCut makes the lowest mapping: what the policy wants of the disk.
func (m *Manager) addCut(ctx context.Context, v *volume) (err error) {
	v.linear, err = m.add(ctx, v, "_cut", devmapper.Linear{Device: v.disk.Number})
	return err
}

// add makes a mapping of the volume's length.
func (m *Manager) add(ctx context.Context, v *volume, suffix string, target devmapper.Target) (devmapper.Device, error) {
	name := v.mapping(suffix)
	device, err := m.kernel.mapper.Create(ctx, name, "CRYPT-SEALVOL-"+name, v.bytes, target)
	if err != nil {
		return devmapper.Device{}, err
	}
	v.layers.push(func(ctx context.Context) error { return m.kernel.mapper.Remove(ctx, name) })
	return device, nil
}

func (m *Manager) addMount(ctx context.Context, v *volume) error {
	m.watch(v)
	mounted, err := m.kernel.systems.Mount(ctx, v.plan.fs, v.crypt, v.plan.options)
	if err != nil {
		return err
	}
	v.mount = mounted
	v.layers.push(mounted.Close)
	if group := v.spec.FSGroup; group != nil {
		if err := mounted.SetGroup(ctx, group.GID, filesystem.ChangePolicy(group.ChangePolicy)); err != nil {
			return err
		}
	}
	v.ready = time.Since(v.found)
	// The last step: from here on nobody looks at the context.
	return ctx.Err()
}

// takeDown closes the mount and removes the mappings. The first error says that something that was written may not be on the disk; the
// second, that something could not be removed, often follows from it. What could not be removed stays in the volume's layers.
func (v *volume) takeDown(ctx context.Context) (unsaved, left error) {
	if v.mount != nil {
		// Also a layer, where it does nothing the second time: what could not be written must not keep the mappings.
		unsaved = v.mount.Close(ctx)
		v.mount, v.attached = nil, 0
	}
	return unsaved, v.layers.unwind(ctx)
}

// release takes a volume from a container and closes it when that was the last one.
func (m *Manager) release(ctx context.Context, v *volume, container string) error {
	if m.drop(container, v) || v.state.Load() != stateOpen {
		return nil
	}
	v.state.Store(stateClosing)
	unsaved, left := v.takeDown(ctx)
	if len(v.layers) == 0 {
		m.unclaim(v.path, v)
	}
	if err := cmp.Or(unsaved, left); err != nil {
		// %v, so that the class is the one that matters to the caller.
		err = fmt.Errorf("it was not closed cleanly: %v: %w", err, errdefs.ErrDataLoss)
		v.fail(err)
		return err
	}
	v.state.Store(stateClosed)
	v.log.Info("volume is closed")
	return nil
}

// fail marks a volume as lost. Destroy still removes what is left of it.
func (v *volume) fail(cause error) {
	v.cause = cause
	v.state.Store(stateFailed)
	v.log.Error("volume is lost", "error", cause)
}

// destroy leaves nothing of a volume but, where somebody will not let go of it, mappings of which every read and write fails.
func (m *Manager) destroy(ctx context.Context, v *volume) error {
	unsaved, left := v.takeDown(ctx)
	if left != nil {
		v.log.Warn("in use at the end", "error", left)
		if left = m.sweep(ctx, v); left == nil {
			v.layers = nil
		}
	}
	// The key goes in any case, and first.
	if err := oneLine(v.kept.unwind(ctx), left); err != nil {
		v.fail(err)
		return err
	}
	// For those who have waited for the lock meanwhile.
	v.cause = errEnded
	v.state.Store(stateFailed)
	m.unclaim(v.path, v)
	m.forget(v)
	if unsaved != nil {
		v.log.Warn("not written back at the end", "error", unsaved)
	}
	v.log.Info("volume is destroyed")
	return nil
}

// sweep ends what is left of the volume's mappings by force: the kernel's copy of the key goes, whoever has the volume open.
func (m *Manager) sweep(ctx context.Context, v *volume) error {
	ctx, cancel := withUndoTime(ctx)
	defer cancel()
	_, err := m.kernel.mapper.Sweep(ctx, v.mapping(""))
	return err
}

// status describes the volume as far as it can be known without waiting. The mounts are the policy's: which of its containers live is
// not known here.
func (v *volume) status(m mapper, w watcher) *sealvolv1.Volume {
	status := &sealvolv1.Volume{
		Name:     v.name,
		State:    string(v.state.Load()),
		Layering: string(v.spec.Layering),
		FsType:   string(v.spec.FSType),
	}
	select {
	case v.token <- struct{}{}:
		defer v.unlock()
	default:
		return status
	}
	// Again, now that nobody changes it.
	status.State = string(v.state.Load())
	status.SizeBytes = v.capacity
	status.Suite = string(v.suite.name)
	status.CipherDriver = v.driver
	status.Created, status.Opened = seconds(v.created), seconds(v.opened)
	faults := v.faults
	if v.state.Load() == stateOpen {
		faults = sum(faults, w.Faults(v.crypt.Number))
		if faults.Count > 0 {
			status.State = "degraded"
		}
	}
	status.Faults = showFaults(faults)
	if v.cause != nil {
		status.Error = v.cause.Error()
	}
	status.Counters = &sealvolv1.Counters{ReadyMicros: uint64(v.ready.Microseconds())}
	if v.tags != nil {
		var err error
		if status.Counters.TagBytes, err = v.tags.Allocated(); err != nil {
			v.log.Warn("status", "error", err)
		}
	}
	if v.state.Load() != stateOpen {
		return status
	}
	for _, place := range v.spec.Mounts {
		status.Mounts = append(status.Mounts, &sealvolv1.Mount{Container: place.Container, Path: place.Path, ReadOnly: place.ReadOnly, Options: texts(v.spec.Options)})
	}
	status.Device, status.PciPath = v.disk.Name, v.path.String()
	for _, device := range []devmapper.Device{v.crypt, v.integrity, v.linear} {
		table, err := m.Table(device.Name)
		if err != nil {
			v.log.Warn("status", "error", err)
		}
		status.Mappings = append(status.Mappings, &sealvolv1.Mapping{
			Name: device.Name, Number: device.Number.String(), Table: table, SizeBytes: device.Bytes,
		})
	}
	if usage, err := v.mount.Usage(); err != nil {
		v.log.Warn("status", "error", err)
	} else {
		status.Usage = showUsage(usage)
	}
	counted, err := m.Status(v.integrity.Name)
	if err == nil {
		_, err = fmt.Sscan(counted, &status.Counters.Mismatches)
	}
	if err != nil {
		v.log.Warn("status", "error", err)
	}
	return status
}

func showUsage(s unix.Statfs_t) *sealvolv1.Usage {
	block := uint64(s.Bsize)
	return &sealvolv1.Usage{
		TotalBytes: s.Blocks * block, UsedBytes: (s.Blocks - s.Bfree) * block, AvailableBytes: s.Bavail * block,
		TotalInodes: s.Files, FreeInodes: s.Ffree,
	}
}

// seconds is a time as the control service tells it, 0 for none.
func seconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func texts(options []policy.Option) (list []string) {
	for _, option := range options {
		list = append(list, string(option))
	}
	return list
}
