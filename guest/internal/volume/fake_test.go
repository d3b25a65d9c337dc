package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/guest/internal/ioerror"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/luks2"
	"github.com/sealvol/sealvol/guest/internal/pci"
	"github.com/sealvol/sealvol/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is what the fakes stand for: disks, and what has been set up on them. Its steps have names: "wait", "hold", "tags", "create cut",
// "create dif", "create crypt", "make", "copy", "mount", "flush", "remove crypt", …
type world struct {
	mu      sync.Mutex
	disks   map[string]pci.Device // by PCI path
	log     []string              // what was set up and taken down, in order
	live    map[string]int        // what is set up and not taken down yet
	fail    map[string]error      // by step
	before  map[string]func()     // called when a step starts
	missing map[string]bool       // ciphers that the kernel does not have
	loaded  []devmapper.Crypt
	options []filesystem.Options
	systems []filesystem.Type // made and mounted
	groups  []uint32          // set, one for each mount
	made    []uint64          // sizes
	keys    []*keyring.Key
	faults  ioerror.Report // of whatever device
}

func newWorld(t *testing.T) (*Manager, *world) {
	w := &world{
		disks:   map[string]pci.Device{"02/01": {Name: "vda", Number: blockdev.Number{Major: 254}, Bytes: 1 << 30, Sequence: 1}},
		live:    map[string]int{},
		fail:    map[string]error{},
		before:  map[string]func(){},
		missing: map[string]bool{},
	}
	return newManager("/volumes", slog.New(slog.NewTextHandler(t.Output(), nil)), kernel{disks: w, mapper: w, tags: w.tags, lend: w.lend, luks2: w.format, driver: w.driver, systems: w, faults: w}), w
}

var errInjected = errors.New("injected")

// step fails when it is told to or when the context has ended while it ran.
func (w *world) step(ctx context.Context, name string) error {
	w.mu.Lock()
	before, err := w.before[name], w.fail[name]
	w.mu.Unlock()
	if before != nil {
		before()
	}
	if err == nil {
		err = ctx.Err()
	}
	return err
}

// failAt makes a step fail from now on; nil lets it succeed again.
func (w *world) failAt(name string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[name] = err
}

// call calls do when a step starts; nil does nothing again.
func (w *world) call(name string, do func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.before[name] = do
}

func (w *world) up(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, "+"+what)
	w.live[what]++
}

func (w *world) down(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, "-"+what)
	if w.live[what]--; w.live[what] == 0 {
		delete(w.live, what)
	}
}

// left is what is set up now.
func (w *world) left() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(slices.Sorted(maps.Keys(w.live)), " ")
}

func (w *world) plug(path, name string, bytes, sequence uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.disks[path] = pci.Device{Name: name, Number: blockdev.Number{Major: 254, Minor: uint32(len(w.disks)) * 16}, Bytes: bytes, Sequence: sequence}
}

func (w *world) unplug(path string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.disks, path)
}

func (w *world) Find(path pci.Path) (pci.Device, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d, ok := w.disks[path.String()]; ok {
		return d, nil
	}
	return pci.Device{}, errdefs.ErrNotFound
}

func (w *world) Wait(ctx context.Context, path pci.Path) (pci.Device, error) {
	if err := w.step(ctx, "wait"); err != nil {
		return pci.Device{}, err
	}
	d, err := w.Find(path)
	if err == nil {
		return d, nil
	}
	<-ctx.Done()
	return pci.Device{}, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, ctx.Err())
}

func (w *world) Hold(ctx context.Context, disk pci.Device) (closer, error) {
	if err := w.step(ctx, "hold"); err != nil {
		return nil, err
	}
	return w.thing("hold"), nil
}

// thing is set up until it is closed; closing it twice shows as a difference in live.
func (w *world) thing(name string) *thing {
	w.up(name)
	return &thing{w, name}
}

type thing struct {
	w    *world
	name string
}

func (t *thing) Close() error {
	t.w.down(t.name)
	return nil
}

func (t *thing) Preallocate(uint64) error   { return t.w.step(context.Background(), "preallocate") }
func (t *thing) Number() blockdev.Number    { return blockdev.Number{Major: 7} }
func (t *thing) Allocated() (uint64, error) { return 4096, nil }

func (w *world) tags(ctx context.Context, _ uint64) (tags, error) {
	if err := w.step(ctx, "tags"); err != nil {
		return nil, err
	}
	return w.thing("tags"), nil
}

func (w *world) lend(key *keyring.Key, _ string, do func() error) error {
	w.mu.Lock()
	w.keys = append(w.keys, key)
	w.mu.Unlock()
	return do()
}

// Watch, Faults and Forget: what goes wrong is what the test has put into w.faults.
func (w *world) Watch(number blockdev.Number, first func(ioerror.Fault)) { w.up("watch") }
func (w *world) Forget(number blockdev.Number)                           { w.down("watch") }

func (w *world) Faults(number blockdev.Number) ioerror.Report {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.faults
}

// luksOverhead is what the tags take of the fake disk.
const luksOverhead = 8 << 20

func (w *world) format(ctx context.Context, data devmapper.Device, key *keyring.Key) (luksHeader, error) {
	w.mu.Lock()
	w.keys = append(w.keys, key)
	w.mu.Unlock()
	if err := w.step(ctx, "format"); err != nil {
		return nil, err
	}
	return fakeHeader{w.thing("header")}, nil
}

type fakeHeader struct{ *thing }

func (h fakeHeader) Open(ctx context.Context, name string, data devmapper.Device, key *keyring.Key) (luks2.Mappings, error) {
	if err := h.w.step(ctx, "open"); err != nil {
		return luks2.Mappings{}, err
	}
	h.w.up("dif")
	h.w.up("crypt")
	number := blockdev.Number{Major: 253, Minor: 2}
	return luks2.Mappings{
		Crypt:     devmapper.Device{Name: name, Number: number, Bytes: data.Bytes - luksOverhead},
		Integrity: devmapper.Device{Name: name + "_dif", Number: number, Bytes: data.Bytes - luksOverhead},
	}, nil
}

func (w *world) driver(cipher string) (string, error) { return "driver of " + cipher, nil }

// short is a mapping's name without its label.
func short(name string) string {
	if _, suffix, ok := strings.Cut(strings.TrimPrefix(name, "encrypted_disk_"), "_"); ok {
		return suffix
	}
	return "crypt"
}

func (w *world) Create(ctx context.Context, name, uuid string, length uint64, target devmapper.Target) (devmapper.Device, error) {
	if err := w.step(ctx, "create "+short(name)); err != nil {
		return devmapper.Device{}, err
	}
	if crypt, ok := target.(devmapper.Crypt); ok {
		w.mu.Lock()
		missing := w.missing[crypt.Cipher]
		if !missing {
			w.loaded = append(w.loaded, crypt)
		}
		w.mu.Unlock()
		if missing {
			return devmapper.Device{}, fmt.Errorf("load table: %w", errNoCipher)
		}
	}
	w.up(short(name))
	return devmapper.Device{Name: name, Number: blockdev.Number{Major: 253, Minor: 2}, Bytes: length}, nil
}

func (w *world) Remove(ctx context.Context, name string) error {
	// As the real one: it tries at least once.
	if err := w.step(context.Background(), "remove "+short(name)); err != nil {
		return err
	}
	w.down(short(name))
	return nil
}

func (w *world) Sweep(ctx context.Context, prefix string) ([]devmapper.Swept, error) {
	if prefix == mappingPrefix {
		panic("a sweep for one volume would end them all")
	}
	if err := w.step(ctx, "sweep"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, mapping := range []string{"crypt", "dif", "cut"} {
		delete(w.live, mapping)
	}
	return nil, nil
}

func (w *world) Table(name string) (string, error) { return "table of " + short(name), nil }
func (w *world) Status(string) (string, error)     { return "3 8 -", nil }

func (w *world) Make(ctx context.Context, fs filesystem.Type, size uint64) (image, error) {
	if err := w.step(ctx, "make"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.made = append(w.made, size)
	w.systems = append(w.systems, fs)
	w.mu.Unlock()
	return fakeImage{w.thing("image")}, nil
}

type fakeImage struct{ *thing }

func (i fakeImage) CopyTo(ctx context.Context, node string) error { return i.w.step(ctx, "copy") }

func (w *world) Mount(ctx context.Context, fs filesystem.Type, _ devmapper.Device, options filesystem.Options) (mount, error) {
	if err := w.step(ctx, "mount"); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.options = append(w.options, options)
	w.systems = append(w.systems, fs)
	w.mu.Unlock()
	w.up("mount")
	return &fakeMount{w: w}, nil
}

type fakeMount struct {
	w      *world
	dir    string
	closed bool
}

func (m *fakeMount) Attach(dir string) error { m.dir = dir; return nil }
func (m *fakeMount) Detach() error           { m.dir = ""; return nil }

func (m *fakeMount) SetGroup(ctx context.Context, gid uint32, _ filesystem.ChangePolicy) error {
	m.w.mu.Lock()
	m.w.groups = append(m.w.groups, gid)
	m.w.mu.Unlock()
	return m.w.step(ctx, "group")
}

func (m *fakeMount) Usage() (unix.Statfs_t, error) {
	return unix.Statfs_t{Bsize: 4096, Blocks: 1000, Bfree: 900, Bavail: 800, Files: 70, Ffree: 60}, nil
}

func (m *fakeMount) Close(ctx context.Context) error {
	if m.closed {
		return nil
	}
	m.closed = true
	m.w.down("mount")
	return m.w.step(ctx, "flush")
}

func path(t *testing.T, s string) pci.Path {
	t.Helper()
	p, err := pci.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func spec() policy.Volume {
	return policy.Volume{
		Mode:     policy.Ephemeral,
		Layering: policy.MemoryTags,
		Suites:   []policy.Suite{policy.AEGIS128Random, policy.AESXTSRandomHMACSHA256},
		FSType:   policy.Ext4,
		Options:  []policy.Option{policy.NoSUID, policy.NoDev},
		Size:     policy.Size{Max: 10 << 30},
		Mounts:   []policy.Mount{{Container: "c", Path: "/mnt/encrypted"}},
	}
}
