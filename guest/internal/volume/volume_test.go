package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/ioerror"
	"github.com/sealvol/sealvol/policy"
)

// errNoCipher is what the kernel answers when it has no algorithm of a name.
const errNoCipher = unix.ENOENT

const (
	everything = "crypt cut dif mount tags watch"
	closed     = "tags" // what stays of a volume that was closed
)

// mustAcquire gives container "c" volume "v" on the disk at a path.
func mustAcquire(t *testing.T, m *Manager, at string) {
	t.Helper()
	if err := m.Acquire(t.Context(), "c", "v", spec(), path(t, at)); err != nil {
		t.Fatal(err)
	}
}

func mustRelease(t *testing.T, m *Manager) {
	t.Helper()
	if err := m.Release(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
}

func TestSealsFromTheDiskUpAndClosesFromTheMountDown(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	// After the mappings, so that the log has one order.
	ready := make(chan struct{})
	w.call("make", func() { <-ready })
	w.call("create crypt", func() { close(ready) })
	mustAcquire(t, m, "02/01")
	w.log = slices.DeleteFunc(w.log, func(s string) bool { return strings.HasSuffix(s, "image") })
	w.up("used")
	mustRelease(t, m)
	if got, want := strings.Join(w.log, " "), "+hold +cut +tags +dif +crypt +watch +mount -hold +used -mount -watch -crypt -dif -cut"; got != want {
		t.Errorf("steps\n%s, want\n%s", got, want)
	}
	w.down("used")
	if left := w.left(); left != closed {
		t.Errorf("left: %s", left)
	}
	if err := m.Destroy(t.Context()); err != nil || w.left() != "" {
		t.Errorf("%v, left: %s", err, w.left())
	}
}

// steps of sealing and, of them, those of opening again, for each layering.
var layered = map[policy.Layering]struct {
	sealing, opening []string
	closed           string // what stays of a volume that was closed
}{
	policy.MemoryTags: {
		sealing: []string{"wait", "hold", "create cut", "tags", "create dif", "create crypt", "make", "copy", "mount"},
		opening: []string{"wait", "hold", "create cut", "create dif", "create crypt"},
		closed:  closed,
	},
	policy.LUKS2: {
		sealing: []string{"wait", "hold", "create cut", "format", "open", "make", "copy", "mount"},
		opening: []string{"wait", "hold", "create cut", "open"},
		closed:  "header",
	},
}

// ofLayering is the spec of a volume with a layering.
func ofLayering(l policy.Layering) policy.Volume {
	s := spec()
	if l == policy.LUKS2 {
		s.Layering, s.Suites = policy.LUKS2, []policy.Suite{policy.AESXTSPlain64HMACSHA256}
	}
	return s
}

func TestAFailureAtAnyStepLeavesNothing(t *testing.T) {
	t.Parallel()
	for layering, steps := range layered {
		s := ofLayering(layering)
		acquire := func(t *testing.T, m *Manager, name, at string) error {
			return m.Acquire(t.Context(), "c", name, s, path(t, at))
		}
		for _, name := range steps.sealing {
			t.Run(fmt.Sprintf("%s/seal/%s", layering, name), func(t *testing.T) {
				t.Parallel()
				m, w := newWorld(t)
				w.failAt(name, errInjected)
				if err := acquire(t, m, "v", "02/01"); !errors.Is(err, errInjected) {
					t.Fatal(err)
				}
				if left := w.left(); left != "" {
					t.Errorf("left: %s after %v", left, w.log)
				}
				for _, key := range w.keys {
					if err := key.Lend("sealvol:x", func() error { return nil }); !errdefs.IsFailedPrecondition(err) {
						t.Errorf("key is not destroyed: %v", err)
					}
				}
				if err := m.Release(t.Context(), "c"); err != nil {
					t.Error(err)
				}
				// The disk is nobody's, and the volume as if never tried.
				w.failAt(name, nil)
				if err := acquire(t, m, "other", "02/01"); err != nil {
					t.Error(err)
				}
				w.plug("02/02", "vdb", 1<<30, 2)
				if err := acquire(t, m, "v", "02/02"); err != nil {
					t.Error(err)
				}
			})
		}
		for _, name := range steps.opening {
			t.Run(fmt.Sprintf("%s/open again/%s", layering, name), func(t *testing.T) {
				t.Parallel()
				m, w := newWorld(t)
				if err := acquire(t, m, "v", "02/01"); err != nil {
					t.Fatal(err)
				}
				mustRelease(t, m)
				w.failAt(name, errInjected)
				if err := acquire(t, m, "v", "02/01"); !errors.Is(err, errInjected) {
					t.Fatal(err)
				}
				if left := w.left(); left != steps.closed {
					t.Errorf("left: %s after %v", left, w.log)
				}
				w.failAt(name, nil)
				if err := acquire(t, m, "v", "02/01"); err != nil {
					t.Error(err)
				}
				if len(w.made) != 1 {
					t.Errorf("file system made %d times", len(w.made))
				}
			})
		}
	}
}

func TestTheEndOfTheContextAtAnyStepLeavesNothing(t *testing.T) {
	t.Parallel()
	for layering, steps := range layered {
		s := ofLayering(layering)
		for _, name := range steps.sealing {
			t.Run(fmt.Sprintf("%s/seal/%s", layering, name), func(t *testing.T) {
				t.Parallel()
				m, w := newWorld(t)
				ctx, cancel := context.WithCancel(t.Context())
				w.call(name, cancel)
				if err := m.Acquire(ctx, "c", "v", s, path(t, "02/01")); !errors.Is(err, context.Canceled) {
					t.Fatal(err)
				}
				if left := w.left(); left != "" {
					t.Errorf("left: %s after %v", left, w.log)
				}
				w.call(name, nil)
				if err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01")); err != nil {
					t.Error(err)
				}
			})
		}
		for _, name := range append(slices.Clone(steps.opening), "mount") {
			t.Run(fmt.Sprintf("%s/open again/%s", layering, name), func(t *testing.T) {
				t.Parallel()
				m, w := newWorld(t)
				if err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01")); err != nil {
					t.Fatal(err)
				}
				mustRelease(t, m)
				ctx, cancel := context.WithCancel(t.Context())
				w.call(name, cancel)
				if err := m.Acquire(ctx, "c", "v", s, path(t, "02/01")); !errors.Is(err, context.Canceled) || errdefs.IsDataLoss(err) {
					t.Fatal(err)
				}
				if left := w.left(); left != steps.closed {
					t.Errorf("left: %s after %v", left, w.log)
				}
				w.call(name, nil)
				if err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01")); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestUndoIsDoneBeforeTheDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, w := newWorld(t)
		w.unplug("02/01") // never arrives
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err := m.Acquire(ctx, "c", "v", spec(), path(t, "02/01"))
		if !errdefs.IsUnavailable(err) || ctx.Err() != nil || w.left() != "" {
			t.Errorf("%v, context %v, left: %s", err, ctx.Err(), w.left())
		}
	})
}

func TestADiskThatHangsHoldsNobodyForEver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, w := newWorld(t)
		w.plug("02/02", "vdb", 1<<30, 2)
		answer := make(chan struct{})
		w.call("copy", func() { <-answer }) // whatever the context says
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := m.Acquire(ctx, "c", "v", spec(), path(t, "02/01")); !errdefs.IsUnavailable(err) {
			t.Fatal(err)
		}
		if got := m.Status(); len(got) != 1 || got[0].State != "sealing" {
			t.Errorf("status %v", got)
		}
		w.call("copy", nil)
		if err := m.Acquire(t.Context(), "c", "other", spec(), path(t, "02/02")); err != nil {
			t.Errorf("another volume: %v", err)
		}
		mustRelease(t, m)
		// Nobody can have the volume meanwhile.
		short, cancelShort := context.WithTimeout(t.Context(), time.Second)
		defer cancelShort()
		if err := m.Acquire(short, "c", "v", spec(), path(t, "02/01")); !errdefs.IsUnavailable(err) {
			t.Error(err)
		}
		close(answer)
		synctest.Wait()
		if left := w.left(); left != closed { // the other volume's
			t.Errorf("left: %s", left)
		}
		mustAcquire(t, m, "02/01")
	})
}

func TestWorkThatSucceedsTooLateIsTakenBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, _ := newWorld(t)
		v := newVolume("v", spec(), plan{}, m.log)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var reverted atomic.Bool
		late := func(context.Context) error { time.Sleep(2 * undoTimeout); return nil }
		err := m.run(ctx, v, late, func(ctx context.Context) { reverted.Store(ctx.Err() == nil) })
		if !errdefs.IsUnavailable(err) || reverted.Load() {
			t.Errorf("%v, reverted %v", err, reverted.Load())
		}
		// The lock is free when all is done.
		if err := v.lock(t.Context()); err != nil || !reverted.Load() {
			t.Errorf("%v, reverted %v", err, reverted.Load())
		}
	})
}

func TestTakesTheFirstSuiteThatTheKernelHas(t *testing.T) {
	t.Parallel()
	const aegis, xts = "capi:aegis128-random", "capi:authenc(hmac(sha256),xts(aes))-random"
	tests := map[string]struct {
		missing []string
		fail    error
		want    string
		is      func(error) bool
	}{
		"it has the first":            {nil, nil, aegis, nil},
		"it has the second":           {[]string{aegis}, nil, xts, nil},
		"it has none":                 {[]string{aegis, xts}, nil, "", errdefs.IsFailedPrecondition},
		"a fault is no missing suite": {nil, unix.ENOMEM, "", func(err error) bool { return errors.Is(err, unix.ENOMEM) }},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, w := newWorld(t)
			for _, cipher := range test.missing {
				w.missing[cipher] = true
			}
			w.failAt("create crypt", test.fail)
			err := m.Acquire(t.Context(), "c", "v", spec(), path(t, "02/01"))
			if test.is != nil {
				if !test.is(err) || len(w.loaded) != 0 || w.left() != "" {
					t.Errorf("%v, loaded %v, left: %s", err, w.loaded, w.left())
				}
				return
			}
			if err != nil || len(w.loaded) != 1 || w.loaded[0].Cipher != test.want {
				t.Fatalf("%v, loaded %v", err, w.loaded)
			}
			// Not chosen again, also when the kernel has learned the better one.
			clear(w.missing)
			mustRelease(t, m)
			mustAcquire(t, m, "02/01")
			if w.loaded[1].Cipher != test.want || w.keys[len(w.keys)-1] != w.keys[len(w.keys)-2] {
				t.Errorf("opened again with %v", w.loaded[1])
			}
		})
	}
}

func TestAVolumeHasOneDiskAndADiskOneVolume(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	w.plug("02/02", "vdb", 1<<30, 2)
	acquire := func(container, volume, at string) error {
		return m.Acquire(t.Context(), container, volume, spec(), path(t, at))
	}
	if err := acquire("a", "v", "02/01"); err != nil {
		t.Fatal(err)
	}
	if err := acquire("b", "v", "02/01"); err != nil {
		t.Errorf("a second container: %v", err)
	}
	if err := acquire("a", "v", "02/01"); err != nil {
		t.Errorf("the same container again: %v", err)
	}
	if err := acquire("b", "v", "02/02"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("another disk for the volume: %v", err)
	}
	if err := acquire("a", "other", "02/01"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("another volume on the disk: %v", err)
	}
	other := spec()
	other.Size.Max = 1 << 20
	if err := m.Acquire(t.Context(), "b", "v", other, path(t, "02/01")); !errdefs.IsPermissionDenied(err) {
		t.Errorf("another policy for the volume: %v", err)
	}
	w.plug("02/01", "vda", 1<<30, 3)
	if err := acquire("d", "v", "02/01"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("another disk in its place: %v", err)
	}
	w.unplug("02/01")
	if err := acquire("d", "v", "02/01"); !errdefs.IsUnavailable(err) {
		t.Errorf("its disk is gone: %v", err)
	}
	// None of this has harmed the volume, which is closed after its last container.
	if err := m.Release(t.Context(), "a"); err != nil || w.left() != everything {
		t.Errorf("%v, left: %s", err, w.left())
	}
	for range 2 {
		if err := m.Release(t.Context(), "b"); err != nil || w.left() != closed {
			t.Errorf("%v, left: %s", err, w.left())
		}
	}
}

func TestOpensAgainWhereverTheDiskIs(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	mustAcquire(t, m, "02/01")
	mustRelease(t, m)
	w.unplug("02/01")
	w.plug("02/07", "vdq", 2<<30, 9)
	mustAcquire(t, m, "02/07")
	if len(w.made) != 1 || w.made[0] != 1<<30 {
		t.Errorf("file systems made: %d", w.made)
	}
	if got := m.Status()[0]; got.SizeBytes != 1<<30 || got.PciPath != "02/07" || got.Device != "vdq" {
		t.Errorf("status %v", got)
	}
	mustRelease(t, m)
	w.plug("02/07", "vdq", 1<<30-512, 10)
	if err := m.Acquire(t.Context(), "c", "v", spec(), path(t, "02/07")); !errdefs.IsFailedPrecondition(err) || w.left() != closed {
		t.Errorf("a smaller disk: %v, left: %s", err, w.left())
	}
	// The old place is free for another volume.
	w.plug("02/01", "vda", 1<<30, 11)
	if err := m.Acquire(t.Context(), "c", "other", spec(), path(t, "02/01")); err != nil {
		t.Error(err)
	}
}

func mustBeLost(t *testing.T, m *Manager, w *world) {
	t.Helper()
	if err := m.Acquire(t.Context(), "c", "v", spec(), path(t, "02/01")); !errdefs.IsDataLoss(err) {
		t.Errorf("lost volume opens: %v", err)
	}
	if got := m.Status()[0]; got.State != "failed" || got.Error == "" {
		t.Errorf("status %v", got)
	}
	if len(w.made) > 1 {
		t.Error("lost volume was made anew")
	}
	clear(w.fail)
	if err := m.Destroy(t.Context()); err != nil || w.left() != "" {
		t.Errorf("destroy: %v, left: %s", err, w.left())
	}
}

func TestForeignBytesAreNotOpened(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	mustAcquire(t, m, "02/01")
	mustRelease(t, m)
	w.failAt("mount", unix.EBADMSG)
	if err := m.Acquire(t.Context(), "c", "v", spec(), path(t, "02/01")); !errdefs.IsDataLoss(err) || w.left() != closed {
		t.Errorf("%v, left: %s", err, w.left())
	}
	mustBeLost(t, m, w)
}

func TestAnUncleanCloseIsTheVolumesEnd(t *testing.T) {
	t.Parallel()
	tests := map[string]string{
		"flush":        closed,
		"remove crypt": "crypt " + closed,
		"remove dif":   "dif " + closed,
		"remove cut":   "cut " + closed,
	}
	for name, left := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, w := newWorld(t)
			mustAcquire(t, m, "02/01")
			w.failAt(name, errInjected)
			if err := m.Release(t.Context(), "c"); !errdefs.IsDataLoss(err) || strings.Contains(err.Error(), "\n") {
				t.Errorf("release: %v", err)
			}
			if w.left() != left {
				t.Errorf("left: %s", w.left())
			}
			mustBeLost(t, m, w)
		})
	}
}

// A container that does not go, or whoever else has a mapping open, keeps no key in the kernel beyond the sandbox.
func TestDestroyEndsByForceWhatIsInUse(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	mustAcquire(t, m, "02/01")
	w.failAt("remove crypt", errdefs.ErrUnavailable)
	if err := m.Destroy(t.Context()); err != nil || w.left() != "" {
		t.Errorf("%v, left: %s", err, w.left())
	}
}

func TestDestroyEndsEverythingAndCanBeRepeated(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	w.plug("02/02", "vdb", 1<<30, 2)
	mustAcquire(t, m, "02/01")
	if err := m.Acquire(t.Context(), "d", "other", spec(), path(t, "02/02")); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(t.Context(), "d"); err != nil {
		t.Fatal(err)
	}
	w.failAt("flush", errInjected) // does not matter any more
	w.failAt("remove dif", errInjected)
	w.failAt("sweep", errInjected)
	if err := m.Destroy(t.Context()); !errors.Is(err, errInjected) {
		t.Errorf("destroy with a mapping that cannot be ended: %v", err)
	}
	for _, key := range w.keys {
		if err := key.Lend("sealvol:x", func() error { return nil }); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a key is left: %v", err)
		}
	}
	w.failAt("remove dif", nil)
	for range 2 {
		if err := m.Destroy(t.Context()); err != nil || w.left() != "" {
			t.Errorf("destroy again: %v, left: %s", err, w.left())
		}
	}
	for _, volume := range []string{"v", "new"} {
		if err := m.Acquire(t.Context(), "c", volume, spec(), path(t, "02/01")); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("after the end: %v", err)
		}
	}
	if err := m.Release(t.Context(), "c"); err != nil {
		t.Error(err)
	}
}

func TestNobodyGetsAVolumeThatWasDestroyedMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, w := newWorld(t)
		mustAcquire(t, m, "02/01")
		finish := make(chan struct{})
		w.call("flush", func() { <-finish })
		destroyed, acquired := make(chan error, 1), make(chan error, 1)
		go func() { destroyed <- m.Destroy(t.Context()) }()
		synctest.Wait()
		// As a request that had found the volume before the end began.
		m.ended = false
		go func() { acquired <- m.Acquire(t.Context(), "d", "v", spec(), path(t, "02/01")) }()
		synctest.Wait()
		m.ended = true
		close(finish)
		if err := <-destroyed; err != nil {
			t.Error(err)
		}
		if err := <-acquired; !errors.Is(err, errEnded) || w.left() != "" {
			t.Errorf("%v, left: %s", err, w.left())
		}
	})
}

func TestSizeIsThePolicys(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		disk uint64
		size policy.Size
		want uint64 // 0: refused
	}{
		"all of a disk within bounds":   {1 << 30, policy.Size{Max: 10 << 30}, 1 << 30},
		"the disk's part below max":     {20 << 30, policy.Size{Max: 10 << 30}, 10 << 30},
		"rounded down to blocks":        {1<<30 + 4095, policy.Size{Max: 10 << 30}, 1 << 30},
		"exactly min":                   {1 << 30, policy.Size{Min: 1 << 30, Max: 1 << 30}, 1 << 30},
		"a sector less than min":        {1<<30 - 512, policy.Size{Min: 1 << 30, Max: 1 << 30}, 0},
		"nothing":                       {0, policy.Size{Max: 1 << 30}, 0},
		"too small for any file system": {1<<20 - 512, policy.Size{Max: 1 << 30}, 0},
		"a policy too small for any":    {1 << 30, policy.Size{Max: 4096}, 0},
		"the smallest that has one":     {1 << 20, policy.Size{Max: 1 << 30}, 1 << 20},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, w := newWorld(t)
			w.plug("02/01", "vda", test.disk, 1)
			s := spec()
			s.Size = test.size
			err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01"))
			if test.want == 0 {
				if !errdefs.IsFailedPrecondition(err) || w.left() != "" {
					t.Errorf("%v, left: %s", err, w.left())
				}
				return
			}
			if err != nil || len(w.made) != 1 || w.made[0] != test.want || m.Status()[0].SizeBytes != test.want {
				t.Errorf("%v, made %d", err, w.made)
			}
		})
	}
}

func TestOptionsAreThePolicys(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	s := spec()
	s.Options = []policy.Option{policy.NoSUID, policy.NoDev, policy.NoExec, policy.NoATime, policy.NoDirATime, policy.LazyTime, policy.Sync}
	if err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01")); err != nil {
		t.Fatal(err)
	}
	const attributes = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOATIME | unix.MOUNT_ATTR_NODIRATIME
	if got := w.options[0]; got.Attributes != attributes || strings.Join(got.Flags, " ") != "lazytime sync" {
		t.Errorf("options %+v", got)
	}
}

func TestRefusesWhatIsNotSupported(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*policy.Volume){
		"layering":    func(v *policy.Volume) { v.Layering = "luks1" },
		"file system": func(v *policy.Volume) { v.FSType = "btrfs" },
		"mode":        func(v *policy.Volume) { v.Mode = "persistent" },
		"suite":       func(v *policy.Volume) { v.Suites = append(v.Suites, "aegis128-plain64") },
		"option":      func(v *policy.Volume) { v.Options = append(v.Options, "discard") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, w := newWorld(t)
			s := spec()
			change(&s)
			if err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01")); !errdefs.IsFailedPrecondition(err) || len(w.log) != 0 {
				t.Errorf("%v after %v", err, w.log)
			}
		})
	}
}

// The tags of luks2 are on the disk, so the file system is smaller than what the policy wants of it, by what only the kernel knows.
func TestFileSystemIsAsLargeAsWhatTheLayeringLeaves(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	w.plug("02/02", "vdb", 1<<30, 2)
	for i, want := range map[policy.Layering]uint64{policy.MemoryTags: 1 << 30, policy.LUKS2: 1<<30 - luksOverhead} {
		at := map[policy.Layering]string{policy.MemoryTags: "02/01", policy.LUKS2: "02/02"}[i]
		if err := m.Acquire(t.Context(), "c", string(i), ofLayering(i), path(t, at)); err != nil {
			t.Fatal(err)
		}
		if got := w.made[len(w.made)-1]; got != want {
			t.Errorf("layering %s: file system of %d bytes, want %d", i, got, want)
		}
	}
	for _, status := range m.Status() {
		if status.Name == string(policy.LUKS2) && (status.SizeBytes != 1<<30-luksOverhead || status.Suite != string(policy.AESXTSPlain64HMACSHA256) || status.Counters.TagBytes != 0) {
			t.Errorf("status %v", status)
		}
	}
}

func TestFileSystemAndGroupAreThePolicys(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	s := spec()
	s.FSType, s.FSGroup = policy.XFS, &policy.FSGroup{GID: 2000, ChangePolicy: policy.OnRootMismatch}
	for range 2 { // whoever restarts finds it so again
		if err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01")); err != nil {
			t.Fatal(err)
		}
		mustRelease(t, m)
	}
	if got := fmt.Sprint(w.systems, w.groups); got != "[xfs xfs xfs] [2000 2000]" {
		t.Errorf("made and mounted, groups: %s", got)
	}
}

func TestAGroupThatCannotBeSetLeavesNothing(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	s := spec()
	s.FSGroup = &policy.FSGroup{GID: 2000, ChangePolicy: policy.Always}
	w.failAt("group", errInjected)
	if err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01")); !errors.Is(err, errInjected) {
		t.Error(err)
	}
	if left := w.left(); left != "" {
		t.Errorf("left: %s", left)
	}
}

func TestTagsThatMayOutgrowTheirBoundAreRefusedBeforehand(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	s := spec()
	const need = 1 << 30 / 128
	s.MaxTagMemory = need - 1
	err := m.Acquire(t.Context(), "c", "v", s, path(t, "02/01"))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), fmt.Sprint(need)) || !strings.Contains(err.Error(), fmt.Sprint(need-1)) {
		t.Errorf("want both numbers: %v", err)
	}
	if left := w.left(); left != "" {
		t.Errorf("left: %s", left)
	}
	s.MaxTagMemory = need
	if err := m.Acquire(t.Context(), "c", "w", s, path(t, "02/01")); err != nil {
		t.Error(err)
	}
}

func TestTagsThatCannotBeAllocatedBeforehandLeaveNothing(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	mustAcquire(t, m, "02/01") // whose policy does not ask for it
	w.failAt("preallocate", errInjected)
	w.plug("02/02", "vdb", 1<<30, 2)
	s := spec()
	s.PreallocateTags = true
	if err := m.Acquire(t.Context(), "c", "w", s, path(t, "02/02")); !errors.Is(err, errInjected) {
		t.Error(err)
	}
	if left := w.left(); left != everything || w.live["tags"] != 1 {
		t.Errorf("left: %s", left)
	}
}

func TestRefusesNamesThatLeadElsewhere(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", ".", "..", "../v", "a/b", "/v"} {
		m, w := newWorld(t)
		if err := m.Acquire(t.Context(), "c", name, spec(), path(t, "02/01")); !errdefs.IsInvalidArgument(err) || len(w.log) != 0 {
			t.Errorf("%q: %v after %v", name, err, w.log)
		}
	}
}

func TestVolumesDoNotWaitForOneAnother(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	const volumes = 16
	// Nobody gets past this step before everybody is there.
	arrived := make(chan struct{}, volumes)
	all := make(chan struct{})
	w.call("create dif", func() { arrived <- struct{}{}; <-all })
	results := make(chan error, volumes)
	for i := range volumes {
		at := fmt.Sprintf("02/%02x", i)
		w.plug(at, "vda", 1<<30, uint64(i))
		go func() { results <- m.Acquire(t.Context(), "c", "v"+at[3:], spec(), path(t, at)) }()
	}
	for range volumes {
		<-arrived
	}
	close(all)
	for range volumes {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	mustRelease(t, m)
	if w.live["tags"] != volumes || w.left() != closed {
		t.Errorf("left: %v", w.live)
	}
}

func TestOnlyAnOpenVolumeCanBeAttached(t *testing.T) {
	t.Parallel()
	m, _ := newWorld(t)
	if _, err := m.Attach(t.Context(), "v"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	mustAcquire(t, m, "02/01")
	mounted := m.volumes["v"].mount.(*fakeMount)
	for range 2 { // a container may have a volume at two paths
		if dir, err := m.Attach(t.Context(), "v"); err != nil || dir != "/volumes/v" || mounted.dir != dir {
			t.Errorf("%q, %v, attached at %q", dir, err, mounted.dir)
		}
	}
	if major, minor, err := m.Number(t.Context(), "v"); err != nil || major != 253 || minor != 2 {
		t.Errorf("%d:%d, %v", major, minor, err)
	}
	for _, want := range []string{"/volumes/v", ""} {
		if err := m.Detach(t.Context(), "v"); err != nil || mounted.dir != want {
			t.Errorf("%v, attached at %q", err, mounted.dir)
		}
	}
	if err := m.Detach(t.Context(), "v"); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	mustRelease(t, m)
	if _, err := m.Attach(t.Context(), "v"); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if _, _, err := m.Number(t.Context(), "v"); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

// While a volume is busy for as long as its disk likes, the gate, which holds every path of the sandbox meanwhile, must be able to give up.
func TestNobodyWaitsForABusyVolumeForEver(t *testing.T) {
	t.Parallel()
	m, _ := newWorld(t)
	mustAcquire(t, m, "02/01")
	busy := m.volumes["v"]
	if err := busy.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer busy.unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, call := range map[string]func() error{
		"attach": func() error { _, err := m.Attach(ctx, "v"); return err },
		"detach": func() error { return m.Detach(ctx, "v") },
		"number": func() error { _, _, err := m.Number(ctx, "v"); return err },
	} {
		if err := call(); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	m, _ := newWorld(t)
	mustAcquire(t, m, "02/01")
	name := m.volumes["v"].crypt.Name
	want := &sealvolv1.Volume{
		Name: "v", State: "open", Layering: "memory-tags", Suite: "aegis128-random", FsType: "ext4", SizeBytes: 1 << 30, Device: "vda", PciPath: "02/01",
		CipherDriver: "driver of capi:aegis128-random",
		Mappings: []*sealvolv1.Mapping{
			{Name: name, Number: "253:2", Table: "table of crypt", SizeBytes: 1 << 30},
			{Name: name + "_dif", Number: "253:2", Table: "table of dif", SizeBytes: 1 << 30},
			{Name: name + "_cut", Number: "253:2", Table: "table of cut", SizeBytes: 1 << 30},
		},
		Mounts:   []*sealvolv1.Mount{{Container: "c", Path: "/mnt/encrypted", Options: []string{"nosuid", "nodev"}}},
		Counters: &sealvolv1.Counters{TagBytes: 4096, Mismatches: 3, ReadyMicros: uint64(m.volumes["v"].ready.Microseconds())},
		Created:  m.volumes["v"].created.Unix(),
		Opened:   m.volumes["v"].opened.Unix(),
		Usage:    &sealvolv1.Usage{TotalBytes: 4096000, UsedBytes: 409600, AvailableBytes: 3276800, TotalInodes: 70, FreeInodes: 60},
	}
	if want.Created <= 0 || want.Opened != want.Created {
		t.Errorf("created at %d, opened at %d: a volume that is sealed was opened then", want.Created, want.Opened)
	}
	if diff := cmp.Diff(want, m.Status()[0], protocmp.Transform()); diff != "" || len(name) != len("encrypted_disk_XXXXX") {
		t.Error(diff)
	}
	mustRelease(t, m)
	want.State, want.Device, want.PciPath, want.Mappings, want.Mounts, want.Counters.Mismatches, want.Usage = "closed", "", "", nil, nil, 0, nil
	if diff := cmp.Diff(want, m.Status()[0], protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	created, opened := m.volumes["v"].created, m.volumes["v"].opened
	mustAcquire(t, m, "02/01")
	if v := m.volumes["v"]; !v.created.Equal(created) || !v.opened.After(opened) {
		t.Errorf("opened again: created %v, was %v; opened %v, was %v", v.created, created, v.opened, opened)
	}
}

func TestAVolumeWithFaultsIsDegraded(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	mustAcquire(t, m, "02/01")
	if got := m.Status()[0]; got.State != "open" || got.Faults != nil {
		t.Errorf("status %v", got)
	}
	w.faults = ioerror.Report{Count: 2, First: ioerror.Fault{Op: ioerror.Read, Sector: 8}}
	want := &sealvolv1.Faults{Count: 2, FirstSector: 8, FirstOperation: "read"}
	if got := m.Status()[0]; got.State != "degraded" || cmp.Diff(want, got.Faults, protocmp.Transform()) != "" {
		t.Errorf("status %v", got)
	}
	mustRelease(t, m)
	if got := m.Status()[0]; got.State != "closed" || got.Faults.GetCount() != 2 {
		t.Errorf("closed: status %v", got)
	}
	// Opened again it is still degraded, and counts on.
	w.faults = ioerror.Report{Count: 1, First: ioerror.Fault{Op: ioerror.Write, Sector: 16}, Incomplete: true}
	mustAcquire(t, m, "02/01")
	want.Count, want.AtLeast = 3, true
	if got := m.Status()[0]; got.State != "degraded" || cmp.Diff(want, got.Faults, protocmp.Transform()) != "" {
		t.Errorf("open again: status %v", got)
	}
}

func TestCheckRelease(t *testing.T) {
	t.Parallel()
	for release, want := range map[string]bool{
		"6.8.0": true, "6.8": true, "6.8-rc1": true, "6.12.117+deb12-amd64": true, "6.18.44-fc": true, "7.0.0": true, "10.1": true,
		"6.7.12": false, "6.1.0-40-amd64": false, "5.15.0": false, "4.19": false, "6": false, "": false, "6.x": false, "linux": false,
	} {
		if err := checkRelease(release); (err == nil) != want || err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("checkRelease(%q) = %v", release, err)
		}
	}
}

func TestADiskThatIsReadOnlyIsNotSealed(t *testing.T) {
	t.Parallel()
	m, w := newWorld(t)
	disk := w.disks["02/01"]
	disk.ReadOnly = true
	w.disks["02/01"] = disk
	err := m.Acquire(t.Context(), "c", "v", spec(), path(t, "02/01"))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "read-only") || w.left() != "" {
		t.Errorf("got %v, left: %s", err, w.left())
	}
}

// The policy decides by it which disk a volume may come back on.
func TestDisksAreThoseOfOpenVolumes(t *testing.T) {
	t.Parallel()
	m, _ := newWorld(t)
	if len(m.Disks()) != 0 {
		t.Errorf("before: %v", m.Disks())
	}
	mustAcquire(t, m, "02/01")
	if got := m.Disks(); len(got) != 1 || got["v"] != path(t, "02/01") {
		t.Errorf("open: %v", got)
	}
	mustRelease(t, m)
	if len(m.Disks()) != 0 {
		t.Errorf("closed: %v", m.Disks())
	}
}
