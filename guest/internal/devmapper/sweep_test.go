package devmapper

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// fakeMapping is a mapping of fakeStacks. It is gone when nobody holds it and its removal was asked for.
type fakeMapping struct {
	number    uint32
	kind      string // empty: no table
	on        []*fakeMapping
	users     int // file systems
	loaded    bool
	suspended bool
	deferred  bool
	hangs     chan struct{} // until it is closed, the disk does not answer; nil: it always does
	gone      bool
}

// fakeStacks is a kernel with mappings over one another.
type fakeStacks struct {
	t        *testing.T
	mu       sync.Mutex
	mappings map[string]*fakeMapping
	calls    []string
	fail     map[string]error // by call
}

func (k *fakeStacks) add(name, kind string, on ...*fakeMapping) *fakeMapping {
	m := &fakeMapping{number: uint32(len(k.mappings)), kind: kind, on: on}
	k.mappings[name] = m
	return m
}

// volume adds the mappings of a volume.
func (k *fakeStacks) volume(name string) (crypt, integrity, linear *fakeMapping) {
	linear = k.add(name+"_cut", "linear")
	integrity = k.add(name+"_dif", "integrity", linear)
	crypt = k.add(name, "crypt", integrity)
	return crypt, integrity, linear
}

func (k *fakeStacks) open(m *fakeMapping) int {
	open := m.users
	for _, other := range k.mappings {
		if slices.Contains(other.on, m) {
			open++
		}
	}
	return open
}

// settle removes what waited for its last user.
func (k *fakeStacks) settle() {
	for changed := true; changed; {
		changed = false
		for name, m := range k.mappings {
			if m.deferred && k.open(m) == 0 {
				m.gone = true
				delete(k.mappings, name)
				changed = true
			}
		}
	}
}

func (k *fakeStacks) names() (names []string) {
	for name := range k.mappings {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// reply writes an answer as the kernel does.
func reply(buffer, answer []byte) error {
	header := (*unix.DmIoctl)(unsafe.Pointer(&buffer[0]))
	if len(buffer) < headerBytes+len(answer) {
		header.Flags |= unix.DM_BUFFER_FULL_FLAG
		return nil
	}
	header.Data_size = uint32(headerBytes + len(answer))
	copy(buffer[headerBytes:], answer)
	return nil
}

func (k *fakeStacks) ioctl(request uint, buffer []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	header := (*unix.DmIoctl)(unsafe.Pointer(&buffer[0]))
	name := text(header.Name[:])
	call := map[uint]string{
		unix.DM_LIST_DEVICES: "list", unix.DM_TABLE_DEPS: "deps", unix.DM_TABLE_STATUS: "status", unix.DM_TABLE_LOAD: "load",
		unix.DM_TABLE_CLEAR: "clear", unix.DM_DEV_SUSPEND: "resume", unix.DM_DEV_REMOVE: "remove",
	}[request]
	if header.Flags&unix.DM_SUSPEND_FLAG != 0 {
		call = "suspend"
	}
	m := k.mappings[name]
	switch call {
	case "list", "deps", "status":
	default:
		k.calls = append(k.calls, call+" "+name)
	}
	if err := k.fail[strings.TrimSpace(call+" "+name)]; err != nil {
		return err
	}
	if m == nil && call != "list" {
		return unix.ENXIO
	}
	switch call {
	case "list":
		var list []Mapping
		for _, name := range k.names() {
			list = append(list, Mapping{Name: name, UUID: "CRYPT-SEALVOL-" + name, Number: blockdev.Number{Major: 253, Minor: k.mappings[name].number}})
		}
		return reply(buffer, encodeList(list...))
	case "deps":
		answer := binary.NativeEndian.AppendUint64(nil, uint64(1+len(m.on)))
		answer = binary.NativeEndian.AppendUint64(answer, unix.Mkdev(254, 0))
		for _, on := range m.on {
			answer = binary.NativeEndian.AppendUint64(answer, unix.Mkdev(253, on.number))
		}
		return reply(buffer, answer)
	case "status":
		if m.kind == "" {
			return reply(buffer, nil)
		}
		header.Target_count = 1
		spec := unix.DmTargetSpec{Length: 4096}
		copy(spec.Target_type[:], m.kind)
		return reply(buffer, append(slices.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&spec)), targetSpecBytes)), 0))
	case "load":
		spec := (*unix.DmTargetSpec)(unsafe.Pointer(&buffer[header.Data_start]))
		if text(spec.Target_type[:]) != "error" || spec.Length != 4096 {
			k.t.Errorf("loaded %+v", spec)
		}
		m.loaded = true
	case "clear":
		m.loaded = false
	case "suspend":
		if header.Flags&unix.DM_NOFLUSH_FLAG == 0 || header.Flags&unix.DM_SKIP_LOCKFS_FLAG == 0 {
			k.t.Errorf("flags of suspend are %#x", header.Flags)
		}
		if m.hangs != nil {
			k.mu.Unlock()
			<-m.hangs
			k.mu.Lock()
		}
		m.suspended = true
	case "resume":
		if !m.loaded || !m.suspended {
			k.t.Errorf("resume of %s: %+v", name, m)
		}
		m.kind, m.on, m.suspended = "error", nil, false
		k.settle()
	case "remove":
		if header.Flags&unix.DM_DEFERRED_REMOVE == 0 {
			k.t.Error("removal is not to wait")
		}
		if k.open(m) == 0 {
			header.Flags &^= unix.DM_DEFERRED_REMOVE
		}
		m.deferred = true
		k.settle()
	}
	return nil
}

func newStacks(t *testing.T) (*Control, *fakeStacks) {
	t.Helper()
	k := &fakeStacks{t: t, mappings: map[string]*fakeMapping{}, fail: map[string]error{}}
	dev := t.TempDir()
	if err := os.Mkdir(filepath.Join(dev, "mapper"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &Control{dev: dev, ioctl: k.ioctl}, k
}

func (k *fakeStacks) links(t *testing.T, c *Control) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(c.dev, "mapper"))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

func link(t *testing.T, c *Control, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.Symlink("../dm-0", filepath.Join(c.dev, "mapper", name)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKillRemovesWhatNobodyHolds(t *testing.T) {
	t.Parallel()
	c, k := newStacks(t)
	k.add("one", "crypt")
	link(t, c, "one")
	for range 2 { // the second time there is nothing to kill
		if held, err := c.Kill(t.Context(), "one"); held || err != nil {
			t.Errorf("%v, %v", held, err)
		}
	}
	if left := k.links(t, c); len(left) != 0 || len(k.mappings) != 0 || slices.Contains(k.calls, "load one") {
		t.Errorf("left %v, links %v, calls %v", k.names(), left, k.calls)
	}
}

func TestKillMakesWhatIsHeldFail(t *testing.T) {
	t.Parallel()
	c, k := newStacks(t)
	crypt, integrity, _ := k.volume("one")
	crypt.users = 1
	link(t, c, "one")
	if held, err := c.Kill(t.Context(), "one"); !held || err != nil {
		t.Errorf("%v, %v", held, err)
	}
	if crypt.kind != "error" || k.open(integrity) != 0 || len(k.links(t, c)) != 0 {
		t.Errorf("%+v, links %v", crypt, k.links(t, c))
	}
	crypt.users = 0
	k.settle()
	if !crypt.gone {
		t.Error("it did not go with its last user")
	}
}

func TestKillOfAMappingThatItsDiskKeepsBusy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, k := newStacks(t)
		crypt, _, _ := k.volume("one")
		crypt.users, crypt.hangs = 1, make(chan struct{})
		for range 2 { // of which the second waits for the first
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			held, err := c.Kill(ctx, "one")
			if !held || !errdefs.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, %v", held, err)
			}
		}
		if !crypt.deferred {
			t.Errorf("it will not go with its last user: %+v", crypt)
		}
		close(crypt.hangs)
		synctest.Wait()
		if crypt.kind != "error" {
			t.Errorf("%+v, although the disk has answered", crypt)
		}
		if calls := strings.Join(k.calls, ", "); calls != "remove one, load one, suspend one, remove one, resume one" {
			t.Errorf("calls %s", calls)
		}
	})
}

func TestKillTellsWhatFailed(t *testing.T) {
	t.Parallel()
	for _, call := range []string{"remove one", "status one", "load one", "suspend one", "resume one"} {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			c, k := newStacks(t)
			k.add("one", "crypt").users = 1
			k.fail[call] = unix.ENOMEM
			if _, err := c.Kill(t.Context(), "one"); !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "one") {
				t.Error(err)
			}
			// The last user goes in the middle.
			k.fail[call] = unix.ENXIO
			if held, err := c.Kill(t.Context(), "one"); held || err != nil {
				t.Errorf("%v, %v", held, err)
			}
		})
	}
	t.Run("without a table there is nothing to fail", func(t *testing.T) {
		t.Parallel()
		c, k := newStacks(t)
		k.add("one", "").users = 1
		if held, err := c.Kill(t.Context(), "one"); !held || err != nil {
			t.Errorf("%v, %v", held, err)
		}
	})
}

func TestSweepLeavesNothing(t *testing.T) {
	t.Parallel()
	c, k := newStacks(t)
	k.volume("encrypted_disk_a")
	k.volume("encrypted_disk_b")
	k.add("encrypted_disk_c_cut", "") // killed while it made this one
	k.add("other", "linear")
	link(t, c, "encrypted_disk_a", "encrypted_disk_gone", "other")
	swept, err := c.Sweep(t.Context(), "encrypted_disk_")
	if err != nil || len(swept) != 7 || slices.ContainsFunc(swept, func(s Swept) bool { return s.Held }) {
		t.Errorf("%v, %v", swept, err)
	}
	if left, links := k.names(), k.links(t, c); !slices.Equal(left, []string{"other"}) || !slices.Equal(links, []string{"other"}) {
		t.Errorf("left %q, links %q", left, links)
	}
	k.calls = nil
	if swept, err := c.Sweep(t.Context(), "encrypted_disk_"); len(swept) != 0 || err != nil || len(k.calls) != 0 {
		t.Errorf("again: %v, %v, %v", swept, err, k.calls)
	}
}

func TestSweepTakesTheDiskAwayFirstAndThenFromTheTop(t *testing.T) {
	t.Parallel()
	c, k := newStacks(t)
	crypt, _, _ := k.volume("v")
	crypt.users = 1
	swept, err := c.Sweep(t.Context(), "v")
	if want := []Swept{{"v", true}, {"v_dif", false}, {"v_cut", false}}; err != nil || !slices.Equal(swept, want) {
		t.Errorf("%v, %v", swept, err)
	}
	want := "load v_cut, suspend v_cut, resume v_cut, remove v, load v, suspend v, resume v, remove v_dif, remove v_cut"
	if calls := strings.Join(k.calls, ", "); calls != want {
		t.Errorf("calls %s, want %s", calls, want)
	}
	if left := k.names(); !slices.Equal(left, []string{"v"}) {
		t.Errorf("left %q", left)
	}
	// Once more while it is still held.
	if swept, err := c.Sweep(t.Context(), "v"); err != nil || !slices.Equal(swept, []Swept{{"v", true}}) {
		t.Errorf("%v, %v", swept, err)
	}
}

func TestSweepOfDisksThatHang(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, k := newStacks(t)
		crypt, integrity, linear := k.volume("s_v")
		crypt.users, linear.hangs = 1, make(chan struct{})
		busy, _, below := k.volume("s_w")
		busy.users, busy.hangs, below.hangs = 1, make(chan struct{}), make(chan struct{})
		k.volume("s_x")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		swept, err := c.Sweep(ctx, "s_")
		if !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "\n") {
			t.Error(err)
		}
		// Without I/O under way the key is gone. dm-integrity, which would wait for the disk, is not touched. The sound volume is gone.
		if crypt.kind != "error" || integrity.kind != "integrity" || integrity.deferred || slices.ContainsFunc(k.calls, func(call string) bool { return call == "remove s_v_dif" || call == "remove s_w_dif" }) {
			t.Errorf("crypt %+v, integrity %+v", crypt, integrity)
		}
		slices.SortFunc(swept, func(a, b Swept) int { return strings.Compare(a.Name, b.Name) })
		if want := []Swept{{"s_v", true}, {"s_x", false}, {"s_x_cut", false}, {"s_x_dif", false}}; !slices.Equal(swept, want) {
			t.Errorf("swept %v", swept)
		}
		for _, m := range []*fakeMapping{linear, busy, below} {
			close(m.hangs)
		}
		synctest.Wait()
		if linear.kind != "error" || busy.kind != "error" || below.kind != "error" {
			t.Errorf("%+v, %+v, %+v, although the disks have answered", linear, busy, below)
		}
		crypt.users, busy.users = 0, 0
		k.settle()
		if _, err := c.Sweep(t.Context(), "s_"); err != nil || len(k.mappings) != 0 {
			t.Errorf("again: %v, left %q", err, k.names())
		}
	})
}

func TestSweepGoesOnAfterAFailure(t *testing.T) {
	t.Parallel()
	for _, call := range []string{"load s_v_cut", "remove s_v", "remove s_v_dif"} {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			c, k := newStacks(t)
			k.volume("s_v")
			k.volume("s_w")
			k.fail[call] = unix.ENOMEM
			if _, err := c.Sweep(t.Context(), "s_"); !errors.Is(err, unix.ENOMEM) || strings.Contains(err.Error(), "\n") {
				t.Error(err)
			}
			if k.mappings["s_w"] != nil || k.mappings["s_w_dif"] != nil || k.mappings["s_w_cut"] != nil {
				t.Errorf("left %q", k.names())
			}
			k.fail[call] = nil
			if _, err := c.Sweep(t.Context(), "s_"); err != nil || len(k.mappings) != 0 {
				t.Errorf("again: %v, left %q", err, k.names())
			}
		})
	}
	for _, call := range []string{"list", "status s_v", "deps s_v"} {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			c, k := newStacks(t)
			k.volume("s_v")
			k.fail[call] = unix.ENOMEM
			if _, err := c.Sweep(t.Context(), "s_"); !errors.Is(err, unix.ENOMEM) {
				t.Error(err)
			}
		})
	}
}

func TestSweepOfAllMappingsIsRefused(t *testing.T) {
	t.Parallel()
	c, k := newStacks(t)
	k.add("root", "verity")
	if _, err := c.Sweep(t.Context(), ""); !errdefs.IsInvalidArgument(err) || len(k.calls) != 0 {
		t.Errorf("%v, calls %v", err, k.calls)
	}
}

func TestTopFirst(t *testing.T) {
	t.Parallel()
	l := func(name string, below ...string) layer { return layer{Mapping: Mapping{Name: name}, below: below} }
	tests := map[string]struct {
		layers []layer
		want   string
	}{
		"nothing":                {nil, ""},
		"a stack":                {[]layer{l("c"), l("b", "c"), l("a", "b")}, "a b c"},
		"two that share one":     {[]layer{l("c"), l("b", "c"), l("a", "c")}, "b a c"},
		"one over two":           {[]layer{l("c"), l("b", "c"), l("a", "b", "c")}, "a b c"},
		"a circle below a layer": {[]layer{l("c", "b"), l("b", "c"), l("a", "b")}, "a c b"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []string
			for _, l := range topFirst(test.layers) {
				got = append(got, l.Name)
			}
			if got := strings.Join(got, " "); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}
