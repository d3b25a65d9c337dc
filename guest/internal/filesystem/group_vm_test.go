//go:build vm

package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const group = 4711

func setGroupOf(t *testing.T, m *Mount, policy ChangePolicy) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	must(t, m.SetGroup(ctx, group, policy))
}

func lstat(t *testing.T, name string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return st
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newMount is a new file system, mounted, with room for 131072 files.
func newMount(t *testing.T, kind Type) *Mount {
	t.Helper()
	v := sealed(t, 2<<30)
	format(t, kind, v)
	return open(t, kind, v)
}

func TestVMAGroupGetsEveryKindOfFile(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		m := newMount(t, kind)
		outside := filepath.Join(t.TempDir(), "outside")
		must(t, os.WriteFile(outside, nil, 0o600))
		at := func(name string) string { return dir(m) + "/" + name }
		must(t, os.MkdirAll(at("a/b/c"), 0o700))
		must(t, os.WriteFile(at("a/b/c/file"), nil, 0o604))
		must(t, os.WriteFile(at("a/program"), nil, 0o755))
		must(t, unix.Chmod(at("a/program"), 0o6755))
		must(t, os.WriteFile(at("a/others"), nil, 0o600))
		must(t, unix.Lchown(at("a/others"), 1000, 1000))
		must(t, os.Link(at("a/b/c/file"), at("a/hard link")))
		must(t, os.Symlink(outside, at("a/link to a file outside")))
		must(t, os.Symlink(filepath.Dir(outside), at("a/link to a folder outside")))
		must(t, os.Symlink("nowhere", at("a/link to nothing")))
		must(t, os.Symlink("..", at("a/link up")))
		must(t, unix.Mkfifo(at("a/pipe"), 0o600))
		must(t, unix.Mknod(at("a/socket"), unix.S_IFSOCK|0o600, 0))
		must(t, unix.Mknod(at("a/null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		must(t, unix.Mknod(at("a/no such device"), unix.S_IFBLK|0o600, int(unix.Mkdev(240, 240))))
		setGroupOf(t, m, OnRootMismatch)
		for name, mode := range map[string]uint32{
			".": unix.S_IFDIR | 0o2775, "a": unix.S_IFDIR | 0o2770, "a/b": unix.S_IFDIR | 0o2770, "a/b/c": unix.S_IFDIR | 0o2770,
			"a/b/c/file": unix.S_IFREG | 0o664, "a/hard link": unix.S_IFREG | 0o664, "a/others": unix.S_IFREG | 0o660,
			"a/program":                unix.S_IFREG | 0o6775,
			"a/link to a file outside": unix.S_IFLNK | 0o777, "a/link to a folder outside": unix.S_IFLNK | 0o777,
			"a/link to nothing": unix.S_IFLNK | 0o777, "a/link up": unix.S_IFLNK | 0o777,
			"a/pipe": unix.S_IFIFO | 0o660, "a/socket": unix.S_IFSOCK | 0o660, "a/null": unix.S_IFCHR | 0o660, "a/no such device": unix.S_IFBLK | 0o660,
		} {
			st := lstat(t, at(name))
			wantUID := uint32(0)
			if name == "a/others" {
				wantUID = 1000
			}
			if st.Mode != mode || st.Gid != group || st.Uid != wantUID {
				t.Errorf("%s is %#o of %d:%d, want %#o", name, st.Mode, st.Uid, st.Gid, mode)
			}
		}
		for _, name := range []string{outside, filepath.Dir(outside)} {
			if st := lstat(t, name); st.Gid != 0 {
				t.Errorf("%s is not in the volume and got the group", name)
			}
		}
		// New files are the group's.
		must(t, os.WriteFile(at("a/b/new"), nil, 0o600))
		if st := lstat(t, at("a/b/new")); st.Gid != group {
			t.Errorf("a new file has group %d", st.Gid)
		}
	})
}

func TestVMARootThatIsTheGroupsIsEnoughUnlessAlways(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		m := newMount(t, kind)
		file := filepath.Join(dir(m), "file")
		for name, c := range map[string]struct {
			spoil   func() error
			policy  ChangePolicy
			changed bool
		}{
			"as it should be":         {func() error { return nil }, OnRootMismatch, false},
			"always":                  {func() error { return nil }, Always, true},
			"another group":           {func() error { return os.Chown(dir(m), 0, 8) }, OnRootMismatch, true},
			"no setgid":               {func() error { return unix.Chmod(dir(m), 0o775) }, OnRootMismatch, true},
			"not writable":            {func() error { return unix.Chmod(dir(m), 0o2755) }, OnRootMismatch, true},
			"more than it should be":  {func() error { return unix.Chmod(dir(m), 0o3777) }, OnRootMismatch, false},
			"for nobody but the root": {func() error { return unix.Chmod(dir(m), 0) }, OnRootMismatch, true},
		} {
			setGroupOf(t, m, Always)
			os.Remove(file)
			must(t, os.WriteFile(file, nil, 0o600))
			must(t, os.Chown(file, 0, 0))
			must(t, c.spoil())
			setGroupOf(t, m, c.policy)
			if got := lstat(t, file).Gid == group; got != c.changed {
				t.Errorf("%s: the file is changed: %v, want %v", name, got, c.changed)
			}
			if st := lstat(t, dir(m)+"/."); st.Gid != group || st.Mode&0o2770 != 0o2770 {
				t.Errorf("%s: root folder is %#o of %d", name, st.Mode, st.Gid)
			}
		}
	})
}

// TestVMAGroupGetsMuchAndDeep has more files than names are held of at once, and folders whose path no system call takes.
func TestVMAGroupGetsMuchAndDeep(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		m := newMount(t, kind)
		const depth = 3000
		many := map[Type]int{Ext4: 20_000, XFS: 5_000}[kind]
		must(t, os.Mkdir(filepath.Join(dir(m), "many"), 0o700))
		start := time.Now()
		for i := range many {
			must(t, unix.Mknod(filepath.Join(dir(m), "many", fmt.Sprint(i)), unix.S_IFREG|0o600, 0))
		}
		deep, err := os.OpenRoot(dir(m))
		must(t, err)
		defer func() { deep.Close() }()
		for range depth {
			must(t, deep.Mkdir("deeper", 0o700))
			next, err := deep.OpenRoot("deeper")
			must(t, err)
			must(t, deep.Close())
			deep = next
		}
		must(t, deep.WriteFile("bottom", nil, 0o600))
		t.Logf("made in %v", time.Since(start))
		dropCaches(t)
		start = time.Now()
		setGroupOf(t, m, OnRootMismatch)
		t.Logf("set in %v", time.Since(start))
		bottom, err := deep.Stat("bottom")
		must(t, err)
		if bottom.Sys().(*syscall.Stat_t).Gid != group {
			t.Error("what is at the bottom was not changed")
		}
		for _, i := range []int{0, many / 2, many - 1} {
			if st := lstat(t, filepath.Join(dir(m), "many", fmt.Sprint(i))); st.Gid != group {
				t.Errorf("file %d was not changed", i)
			}
		}
		setGroupOf(t, m, OnRootMismatch)
		setGroupOf(t, m, Always)

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := m.SetGroup(ctx, group+1, OnRootMismatch); !errors.Is(err, context.Canceled) {
			t.Errorf("context has ended: %v", err)
		}
		if st := lstat(t, dir(m)+"/."); st.Gid != group {
			t.Error("the root folder was changed before what is in it")
		}
	})
}

func TestVMAGroupDoesNotReachAnotherFileSystem(t *testing.T) {
	m := newMount(t, Ext4)
	must(t, os.Mkdir(filepath.Join(dir(m), "over"), 0o700))
	place, err := NewPlace(t.TempDir())
	must(t, err)
	undo(t, func(context.Context) error { return place.Close() })
	at := filepath.Join(place.dir, "v")
	must(t, m.Attach(at))
	other := filepath.Join(at, "over")
	must(t, unix.Mount("tmpfs", other, "tmpfs", 0, ""))
	if err := m.SetGroup(t.Context(), group, Always); !errors.Is(err, unix.EXDEV) || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
	if st := lstat(t, other); st.Gid != 0 {
		t.Error("another file system got the group")
	}
	must(t, unix.Unmount(other, 0))
	setGroupOf(t, m, Always)
	must(t, m.Detach())
	setGroupOf(t, m, OnRootMismatch)
}

func TestVMAGroupOfADamagedVolumeIsAnError(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		v := sealed(t, 1<<30)
		format(t, kind, v)
		m := open(t, kind, v)
		if err := work(filepath.Join(dir(m), "w"), 0); err != nil {
			t.Fatal(err)
		}
		must(t, closed(t, m))
		dropCaches(t)
		m, err := kind.Open(t.Context(), v.Link(), v.Node(), v.Number, Options{})
		must(t, err)
		v.damage(t)
		if err := m.SetGroup(t.Context(), group, Always); err == nil {
			t.Error("the group was set")
		} else {
			t.Log(err)
		}
		closed(t, m)
	})
}
