package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// disk is a file system that has that many bytes free.
func disk(free int64) func(string, *unix.Statfs_t) error {
	return func(_ string, stat *unix.Statfs_t) error {
		*stat = unix.Statfs_t{Bsize: 4096, Bavail: uint64(free) / 4096}
		return nil
	}
}

type options struct{ free, capacity int64 }

func openStore(t *testing.T, root string, o options) *Store {
	t.Helper()
	if o.free == 0 {
		o.free = 1 << 40
	}
	s, err := open(root, o.capacity, disk(o.free), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newStore(t *testing.T, o options) *Store {
	t.Helper()
	return openStore(t, filepath.Join(t.TempDir(), "volumes"), o)
}

func mustCreate(t *testing.T, s *Store, id string, bytes int64) Volume {
	t.Helper()
	v, err := s.Create(id, Range{Required: bytes})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// files are all files below the store's root but its lock.
func files(t *testing.T, s *Store) (found []string) {
	t.Helper()
	err := filepath.WalkDir(s.root, func(path string, entry fs.DirEntry, err error) error {
		if name, _ := filepath.Rel(s.root, path); err == nil && name != "." && name != "lock" {
			found = append(found, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestAVolumeIsASparseFileOfItsSize(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	v := mustCreate(t, s, "pvc-1", 10<<30)
	info, err := os.Stat(v.File)
	if err != nil {
		t.Fatal(err)
	}
	if written, err := v.Allocated(); err != nil || info.Size() != 10<<30 || info.Mode() != 0o600 || written > mib {
		t.Errorf("the disk has %d bytes, %d of them written (%v), and mode %v", info.Size(), written, err, info.Mode())
	}
	if got := files(t, s); !cmp.Equal(got, []string{"pvc-1", "pvc-1/disk.img", "pvc-1/volume.json"}) {
		t.Errorf("there are %q", got)
	}
	again, err := s.Create("pvc-1", Range{Required: 10 << 30, Limit: 10 << 30})
	if err != nil || again != v {
		t.Errorf("made again it is %v (%v)", again, err)
	}
	for range 2 {
		if err := s.Delete("pvc-1"); err != nil {
			t.Error(err)
		}
	}
	if got := files(t, s); len(got) > 0 {
		t.Errorf("after Delete there are %q", got)
	}
	if _, err := s.Get("pvc-1"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func TestSizes(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		size Range
		want int64
		is   func(error) bool
	}{
		"none":                               {Range{}, DefaultBytes, nil},
		"none, of a limit":                   {Range{Limit: 5 * mib}, 5 * mib, nil},
		"none, of a limit between":           {Range{Limit: 5*mib + 1}, 5 * mib, nil},
		"none, of a limit that is too small": {Range{Limit: mib - 1}, 0, errdefs.IsOutOfRange},
		"one byte":                           {Range{Required: 1}, mib, nil},
		"exactly":                            {Range{Required: 5 * mib, Limit: 5 * mib}, 5 * mib, nil},
		"between":                            {Range{Required: 5*mib + 1}, 6 * mib, nil},
		"between, and not more":              {Range{Required: 5*mib + 1, Limit: 6*mib - 1}, 0, errdefs.IsOutOfRange},
		"more than at most":                  {Range{Required: 5 * mib, Limit: 4 * mib}, 0, errdefs.IsInvalidArgument},
		"negative":                           {Range{Required: -1}, 0, errdefs.IsInvalidArgument},
		"a negative limit":                   {Range{Limit: -1}, 0, errdefs.IsInvalidArgument},
		"what overflows":                     {Range{Required: math.MaxInt64}, 0, errdefs.IsOutOfRange},
	} {
		got, err := test.size.bytes()
		if got != test.want || test.is == nil && err != nil || test.is != nil && !test.is(err) {
			t.Errorf("%s: %d (%v), not %d", name, got, err, test.want)
		}
	}
}

func TestTheSameNameWithAnotherSizeIsRefused(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	mustCreate(t, s, "a", 4*mib)
	for _, size := range []Range{{Required: 5 * mib}, {Limit: 3 * mib}} {
		if v, err := s.Create("a", size); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%v gives %v (%v)", size, v, err)
		}
	}
	if v, err := s.Create("a", Range{Required: mib}); err != nil || v.Bytes != 4*mib {
		t.Errorf("a smaller wish gives %v (%v)", v, err)
	}
}

func TestIDsThatAreNoLabelsAreRefused(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	for _, id := range []string{"", ".", "..", "../a", "a/b", "A", "lost+found", ".new-a", strings.Repeat("a", 64), "a\n"} {
		if v, err := s.Create(id, Range{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Create(%q) gives %v (%v)", id, v, err)
		}
		if err := s.Delete(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Delete(%q) gives %v", id, err)
		}
		if v, err := s.Expand(id, Range{Required: mib}); !errdefs.IsNotFound(err) {
			t.Errorf("Expand(%q) gives %v (%v)", id, v, err)
		}
	}
	if got := files(t, s); len(got) > 0 {
		t.Errorf("there are %q", got)
	}
}

func wantAvailable(t *testing.T, s *Store, want int64) {
	t.Helper()
	if got, err := s.Available(); err != nil || got != want {
		t.Errorf("%d bytes are available (%v), not %d", got, err, want)
	}
}

func TestNoMoreIsPromisedThanThereIs(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]options{
		"of the file system": {free: 10*mib + 4096},
		"of the capacity":    {free: 100 * mib, capacity: 10 * mib},
		"of both":            {free: 10 * mib, capacity: 10 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, o)
			wantAvailable(t, s, 10*mib)
			mustCreate(t, s, "a", 6*mib)
			wantAvailable(t, s, 4*mib)
			if v, err := s.Create("b", Range{Required: 5 * mib}); !errdefs.IsResourceExhausted(err) {
				t.Errorf("got %v (%v)", v, err)
			}
			if v, err := s.Expand("a", Range{Required: 11 * mib}); !errdefs.IsResourceExhausted(err) {
				t.Errorf("got %v (%v)", v, err)
			}
			mustCreate(t, s, "b", 4*mib)
			wantAvailable(t, s, 0)
			if err := s.Delete("a"); err != nil {
				t.Error(err)
			}
			wantAvailable(t, s, 6*mib)
			if v, err := s.Expand("b", Range{Required: 10 * mib}); err != nil || v.Bytes != 10*mib {
				t.Errorf("got %v (%v)", v, err)
			}
			wantAvailable(t, s, 0)
			if again := openStore(t, reopened(t, s), o); true {
				wantAvailable(t, again, 0)
			}
		})
	}
}

// What a volume's guest has written is gone from the file system's free space, and
// must not be taken from it once more.
func TestWhatIsWrittenIsNotCountedTwice(t *testing.T) {
	t.Parallel()
	free := int64(100 * mib)
	s := newStore(t, options{free: free})
	v := mustCreate(t, s, "a", 10*mib)
	wantAvailable(t, s, 90*mib)
	file, err := os.OpenFile(v.File, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(make([]byte, 4*mib)); err != nil {
		t.Fatal(err)
	}
	if err := file.Sync(); err != nil {
		t.Fatal(err)
	}
	written, err := v.Allocated()
	if err != nil {
		t.Fatal(err)
	}
	s.statfs = disk(free - written)
	wantAvailable(t, s, 90*mib)
	s.statfs = disk(mib) // somebody else's files
	wantAvailable(t, s, 0)
}

// reopened closes a store, so that another can have its folder.
func reopened(t *testing.T, s *Store) (root string) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return s.root
}

func TestOneDriverHasTheFolder(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	if _, err := open(s.root, 0, disk(mib), slog.New(slog.DiscardHandler)); !errdefs.IsUnavailable(err) {
		t.Errorf("two drivers have %s (%v)", s.root, err)
	}
	openStore(t, reopened(t, s), options{})
}

func TestWhatASandboxHasIsLeftAlone(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	v := mustCreate(t, s, "a", mib)
	shim, err := os.Open(v.File)
	if err != nil {
		t.Fatal(err)
	}
	defer shim.Close()
	if err := unix.Flock(int(shim.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete("a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the disk of a running pod was deleted (%v)", err)
	}
	if _, err := s.Expand("a", Range{Required: 2 * mib}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the disk of a running pod was expanded (%v)", err)
	}
	if got, err := s.Expand("a", Range{Required: mib}); err != nil || got != v {
		t.Errorf("a volume that is large enough gives %v (%v)", got, err)
	}
	if err := unix.Flock(int(shim.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete("a"); err != nil {
		t.Error(err)
	}
}

func TestExpandMakesLargerAlone(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	v := mustCreate(t, s, "a", 4*mib)
	if got, err := s.Expand("a", Range{Required: 2 * mib}); err != nil || got != v {
		t.Errorf("to less: %v (%v)", got, err)
	}
	if got, err := s.Expand("a", Range{Required: mib, Limit: 2 * mib}); !errdefs.IsOutOfRange(err) {
		t.Errorf("to less than it has: %v (%v)", got, err)
	}
	for range 2 {
		got, err := s.Expand("a", Range{Required: 8 * mib, Limit: 8 * mib})
		if err != nil || got.Bytes != 8*mib {
			t.Errorf("to more: %v (%v)", got, err)
		}
	}
	if info, err := os.Stat(v.File); err != nil || info.Size() != 8*mib {
		t.Errorf("the disk is %v (%v)", info, err)
	}
	again := openStore(t, reopened(t, s), options{})
	if got, err := again.Get("a"); err != nil || got.Bytes != 8*mib {
		t.Errorf("after a start it is %v (%v)", got, err)
	}
}

// Each step of a volume's making fails once; nothing may be left of those before it.
func TestAFailureLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(s *Store) error{ // makes the step fail
		"the disk's size": func(s *Store) error { s.truncate = func(*os.File, int64) error { return unix.EFBIG }; return nil },
		"the sync":        func(s *Store) error { s.sync = func(string) error { return unix.EIO }; return nil },
		"the rename":      func(s *Store) error { return os.MkdirAll(filepath.Join(s.root, "a", "occupied"), 0o700) },
		"the statfs":      func(s *Store) error { s.statfs = func(string, *unix.Statfs_t) error { return unix.EIO }; return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, options{})
			if err := spoil(s); err != nil {
				t.Fatal(err)
			}
			before := files(t, s)
			if v, err := s.Create("a", Range{Required: mib}); err == nil {
				t.Fatalf("it was made: %v", v)
			}
			if diff := cmp.Diff(before, files(t, s)); diff != "" {
				t.Errorf("something is left:\n%s", diff)
			}
			if v, err := s.Get("a"); !errdefs.IsNotFound(err) {
				t.Errorf("there is %v (%v)", v, err)
			}
		})
	}
}

func TestAnExpansionThatFailsIsTakenBack(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	v := mustCreate(t, s, "a", mib)
	s.truncate = func(*os.File, int64) error { return unix.EFBIG }
	if got, err := s.Expand("a", Range{Required: 2 * mib}); !errors.Is(err, unix.EFBIG) {
		t.Errorf("got %v (%v)", got, err)
	}
	s.truncate = (*os.File).Truncate
	// A folder in the place of volume.json makes its rename fail.
	if err := errors.Join(os.Remove(s.state("a")), os.MkdirAll(s.state("a")+"/occupied", 0o700)); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Expand("a", Range{Required: 2 * mib}); err == nil {
		t.Errorf("got %v", got)
	}
	if info, err := os.Stat(v.File); err != nil || info.Size() != mib {
		t.Errorf("the disk is %v (%v)", info, err)
	}
	if got, err := s.Get("a"); err != nil || got != v {
		t.Errorf("the volume is %v (%v)", got, err)
	}
}

func TestAStartMendsWhatACrashLeft(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	for _, id := range []string{"whole", "lost", "torn", "other", "grown", "gone"} {
		mustCreate(t, s, id, 2*mib)
	}
	root := reopened(t, s)
	write := func(path, text string) error {
		return errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o700), os.WriteFile(filepath.Join(root, path), []byte(text), 0o600))
	}
	err := errors.Join(
		os.Remove(filepath.Join(root, "lost/volume.json")),
		write("torn/volume.json", `{"version": 1, "id`),
		write("other/volume.json", `{"version": 1, "id": "whole", "bytes": 2097152}`),
		os.Truncate(filepath.Join(root, "grown/disk.img"), 3*mib),
		os.Remove(filepath.Join(root, "gone/disk.img")),
		write(".new-half/disk.img", ""),
		write(".gone-half.1/disk.img", "data"),
		write(".new-Notes of mine/text", "not a volume"),
		write(".gone-/text", "not a volume"),
		write("whole/.volume.json-123", ""),
		write("stranger/note", "not a volume"),
		os.MkdirAll(filepath.Join(root, "linked"), 0o700),
		os.Symlink("/etc/passwd", filepath.Join(root, "linked/disk.img")),
	)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time there is nothing to mend
		s = openStore(t, root, options{})
		got := map[string]int64{}
		for _, v := range s.List() {
			got[v.ID] = v.Bytes
		}
		want := map[string]int64{
			"whole": 2 * mib, "lost": 2 * mib, "torn": 2 * mib, "other": 2 * mib, "grown": 3 * mib, "gone": 2 * mib,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		for id, bytes := range want {
			if told, err := readState(s.state(id)); err != nil || told != (state{id, bytes}) {
				t.Errorf("volume.json of %s says %v (%v)", id, told, err)
			}
		}
		for _, name := range []string{".new-half", ".gone-half.1"} {
			if _, err := os.Stat(filepath.Join(root, name)); !os.IsNotExist(err) {
				t.Errorf("there is still %s (%v)", name, err)
			}
		}
		for _, name := range []string{"stranger/note", ".new-Notes of mine/text", ".gone-/text"} {
			if _, err := os.Stat(filepath.Join(root, name)); err != nil {
				t.Errorf("what was not ours is gone: %v", err)
			}
		}
		reopened(t, s)
	}
	s = openStore(t, root, options{})
	if err := s.Delete("gone"); err != nil {
		t.Errorf("a volume that has lost its disk cannot be deleted: %v", err)
	}
}

// A folder that is named by mistake, such as /var/lib, must not be closed to its users.
func TestAFolderThatOthersMayEnterIsNotTaken(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := open(root, 0, disk(mib), slog.New(slog.DiscardHandler)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
	info, err := os.Stat(root)
	if err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the folder is now %v (%v)", info, err)
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) > 0 {
		t.Errorf("there are %v (%v)", entries, err)
	}
}

// A disk that has lost its end is no smaller volume: its health must say so, and
// growing it would hide that.
func TestADiskThatIsCutShortStaysAsLargeAsItWas(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	v := mustCreate(t, s, "a", 2*mib)
	if err := os.Truncate(v.File, mib); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s = openStore(t, reopened(t, s), options{})
		if got, err := s.Get("a"); err != nil || got != v {
			t.Errorf("after a start it is %v (%v), not %v", got, err, v)
		}
		if got, err := s.Expand("a", Range{Required: 4 * mib}); !errdefs.IsDataLoss(err) {
			t.Errorf("it was expanded: %v (%v)", got, err)
		}
	}
	if err := s.Delete("a"); err != nil {
		t.Error(err)
	}
}

func TestWhatANewerDriverWroteIsKept(t *testing.T) {
	t.Parallel()
	for _, text := range []string{`{"version": 2, "id": "a", "bytes": 2097152}`, `{"version": 7, "volume": {"id": "a"}, "bytes": "2Mi"}`} {
		s := newStore(t, options{})
		v := mustCreate(t, s, "a", 2*mib)
		if err := os.WriteFile(s.state("a"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s = openStore(t, reopened(t, s), options{})
		if got, err := s.Get("a"); err != nil || got != v {
			t.Errorf("the volume is %v (%v)", got, err)
		}
		if got, err := s.Expand("a", Range{Required: 4 * mib}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("it was expanded: %v (%v)", got, err)
		}
		if now, err := os.ReadFile(s.state("a")); err != nil || string(now) != text {
			t.Errorf("volume.json is now %q (%v)", now, err)
		}
	}
}

// Without it in the books, its pod's record would go, and it could be deleted.
func TestAVolumeWhoseStateCannotBeWrittenIsKept(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	v := mustCreate(t, s, "a", mib)
	// A folder in the place of volume.json makes its rename fail.
	if err := errors.Join(os.Remove(s.state("a")), os.MkdirAll(s.state("a")+"/occupied", 0o700)); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, reopened(t, s), options{})
	if got, err := s.Get("a"); err != nil || got != v {
		t.Errorf("after a start it is %v (%v)", got, err)
	}
}

func TestOwnsItsDisksAlone(t *testing.T) {
	t.Parallel()
	s := newStore(t, options{})
	for file, want := range map[string]bool{
		s.root + "/a/disk.img": true, s.root + "/disk.img": false, s.root + "/a/b/disk.img": false, "/other/a/disk.img": false, s.root + "/a/volume.json": false,
	} {
		if s.Owns(file) != want {
			t.Errorf("Owns(%s) is not %v", file, want)
		}
	}
}

// Many callers at once, among them for the same volumes: the sum of what is
// promised never exceeds what there is, and the books are right at the end.
func TestManyAtOnceDoNotPromiseTooMuch(t *testing.T) {
	t.Parallel()
	const most = 32 * mib
	s := newStore(t, options{capacity: most})
	var work sync.WaitGroup
	var refused atomic.Int64
	for i := range 8 {
		random := rand.New(rand.NewPCG(uint64(i), 1))
		work.Go(func() {
			for range 60 {
				id := fmt.Sprintf("v%d", random.IntN(6))
				var err error
				switch random.IntN(3) {
				case 0:
					_, err = s.Create(id, Range{Required: int64(1+random.IntN(16)) * mib})
				case 1:
					_, err = s.Expand(id, Range{Required: int64(1+random.IntN(16)) * mib})
				default:
					err = s.Delete(id)
				}
				switch {
				case err == nil:
				case errdefs.IsResourceExhausted(err), errdefs.IsAlreadyExists(err), errdefs.IsNotFound(err):
					refused.Add(1)
				default:
					t.Error(err)
				}
				var promised int64
				for _, v := range s.List() {
					promised += v.Bytes
				}
				if promised > most {
					t.Errorf("%d bytes are promised, there are %d", promised, int64(most))
				}
			}
		})
	}
	work.Wait()
	if refused.Load() == 0 {
		t.Error("nothing was ever refused, so nothing was tested")
	}
	want := s.List()
	again := openStore(t, reopened(t, s), options{capacity: most})
	if diff := cmp.Diff(want, again.List()); diff != "" {
		t.Errorf("the disk holds other volumes:\n%s", diff)
	}
}

func TestParseStateRefuses(t *testing.T) {
	t.Parallel()
	const whole = `{"version":1,"id":"a","bytes":1048576}`
	if s, err := parseState([]byte(whole)); err != nil || s != (state{"a", mib}) {
		t.Fatalf("got %v (%v)", s, err)
	}
	for name, text := range map[string]string{
		"nothing":             "",
		"half":                whole[:20],
		"null":                "null",
		"trailing data":       whole + "{}",
		"an unknown key":      `{"version":1,"id":"a","bytes":1048576,"key":"x"}`,
		"a repeated key":      `{"version":1,"id":"a","id":"a","bytes":1048576}`,
		"a key in capitals":   `{"version":1,"ID":"a","bytes":1048576}`,
		"another version":     `{"version":2,"id":"a","bytes":1048576}`,
		"no id":               `{"version":1,"bytes":1048576}`,
		"an id that climbs":   `{"version":1,"id":"../a","bytes":1048576}`,
		"no bytes":            `{"version":1,"id":"a"}`,
		"negative bytes":      `{"version":1,"id":"a","bytes":-1}`,
		"more than an int64":  `{"version":1,"id":"a","bytes":9223372036854775808}`,
		"a fraction":          `{"version":1,"id":"a","bytes":1.5}`,
		"bytes that are text": `{"version":1,"id":"a","bytes":"1"}`,
		"no UTF-8":            "{\"version\":1,\"id\":\"\xff\",\"bytes\":1}",
		"too much":            whole + strings.Repeat(" ", maxSize),
	} {
		if s, err := parseState([]byte(text)); err == nil {
			t.Errorf("%s gives %v", name, s)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: the error has several lines: %v", name, err)
		}
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"a","bytes":1048576}`))
	f.Add([]byte(`{"version":1,"id":"a","bytes":1e6}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseState(data)
		if err != nil {
			return
		}
		encoded, err := s.encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseState(encoded); err != nil || again != s {
			t.Fatalf("%v becomes %v (%v)", s, again, err)
		}
	})
}
