package luks2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
)

var errInjected = errors.New("injected failure")

// world is a Tool whose cryptsetup writes the real header and makes the mappings of the real one, unless a test says otherwise.
type world struct {
	*Tool
	t        *testing.T
	fail     string   // the step that fails: an action, or "find NAME", "table NAME", "memory"
	flags    []string // of the last action
	header   []byte   // what luksFormat writes
	mappings map[string]fakeMapping
	tables   map[string]string // in place of the real ones
	lower    uint64            // length of the lower mapping, in bytes
	files    []string          // that memory was asked for
	removed  []string
	dead     bool // mappings cannot be removed
}

type fakeMapping struct {
	device devmapper.Device
	table  string
}

// data is the device under the volume.
var data = devmapper.Device{Name: "cut", Number: blockdev.Number{Major: 253, Minor: 7}, Bytes: 1 << 30}

const uuid = "b54c12d6-1102-4b3d-93f4-72bfd4ad76c1" // of the real header

func newWorld(t *testing.T) *world {
	w := &world{t: t, header: realHeader(t), mappings: map[string]fakeMapping{}, tables: map[string]string{}, lower: 1 << 29}
	w.Tool = &Tool{run: w.runs, memory: w.remembers, mapper: w, sysfs: t.TempDir()}
	return w
}

func (w *world) step(name string) error {
	if w.fail == name {
		return errInjected
	}
	return nil
}

func (w *world) remembers(_ string, size uint64) (*os.File, error) {
	if err := w.step("memory"); err != nil {
		return nil, err
	}
	file, err := os.CreateTemp(w.t.TempDir(), "header")
	if err != nil {
		return nil, err
	}
	w.files = append(w.files, file.Name())
	return file, file.Truncate(int64(size))
}

func (w *world) runs(_ context.Context, header *os.File, _ *keyring.Key, action string, flags ...string) error {
	w.flags = flags
	err := w.step(action)
	switch action {
	case "luksFormat":
		if _, err := header.WriteAt(w.header, 0); err != nil {
			return err
		}
	case "open":
		name := flags[len(flags)-1]
		sectors := w.lower / devmapper.SectorBytes
		w.add(name+"_dif", 8, fmt.Sprintf("0 %d integrity 253:7 0 32 D 5 block_size:4096 journal_sectors:16368 interleave_sectors:32768 buffer_sectors:128 fix_padding", sectors))
		if err == nil {
			w.add(name, 9, fmt.Sprintf("0 %d crypt capi:authenc(hmac(sha256),xts(aes))-plain64 :96:logon:cryptsetup:%s-d0 0 253:8 0 2 integrity:32:aead sector_size:4096", sectors, uuid))
		}
	default:
		w.t.Errorf("unexpected action %s", action)
	}
	return err
}

func (w *world) add(name string, minor uint32, table string) {
	if other, ok := w.tables[name]; ok {
		table = other
	}
	w.mappings[name] = fakeMapping{devmapper.Device{Name: name, Number: blockdev.Number{Major: 253, Minor: minor}, Bytes: w.lower}, table}
}

func (w *world) Find(name string) (devmapper.Device, error) {
	m, ok := w.mappings[name]
	if !ok {
		return devmapper.Device{}, fmt.Errorf("mapping %s: %w", name, errdefs.ErrNotFound)
	}
	return m.device, w.step("find " + name)
}

func (w *world) Table(name string) (string, error) {
	m, ok := w.mappings[name]
	if !ok {
		return "", errdefs.ErrNotFound
	}
	return m.table, w.step("table " + name)
}

func (w *world) Remove(ctx context.Context, name string) error {
	if ctx.Err() != nil || w.dead {
		return errdefs.ErrUnavailable
	}
	w.removed = append(w.removed, name)
	delete(w.mappings, name)
	return nil
}

// hold puts a mapping over a device into sysfs.
func (w *world) hold(below blockdev.Number, name string, number blockdev.Number) {
	w.t.Helper()
	dir := filepath.Join(w.sysfs, "dev/block", below.String(), "holders", fmt.Sprintf("dm-%d", number.Minor))
	if err := os.MkdirAll(filepath.Join(dir, "dm"), 0o700); err != nil {
		w.t.Fatal(err)
	}
	for file, content := range map[string]string{"dm/name": name, "dev": number.String()} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content+"\n"), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
}

// overwritten makes sure that nothing stays in the memory of a header.
func (w *world) overwritten() {
	w.t.Helper()
	for _, file := range w.files {
		content, err := os.ReadFile(file)
		if err != nil || !zero(content) || len(content) < headerBytes {
			w.t.Errorf("header of %d bytes is not overwritten, %v", len(content), err)
		}
	}
}

func newKey(t *testing.T, size int) *keyring.Key {
	t.Helper()
	key, err := keyring.New(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { key.Destroy() })
	return key
}

func (w *world) mustFormat() *Header {
	w.t.Helper()
	header, err := w.Format(w.t.Context(), data, newKey(w.t, KeyBytes))
	if err != nil {
		w.t.Fatal(err)
	}
	return header
}

func (w *world) mustOpen(header *Header) Mappings {
	w.t.Helper()
	m, err := w.Open(w.t.Context(), "v", data, header, newKey(w.t, KeyBytes))
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

func (w *world) has(flag string) bool { return slices.Contains(w.flags, flag) }

func (w *world) left() string {
	var names []string
	for name := range w.mappings {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}
