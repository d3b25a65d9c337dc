package backing

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
)

// folder is an emptyDir as kubelet makes it.
func folder(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pods/1/volumes/kubernetes.io~empty-dir/scratch")
	if err := os.MkdirAll(path, 0o777); err != nil {
		t.Fatal(err)
	}
	return path
}

// made makes the file of an emptyDir and keeps it until the test's end.
func made(t *testing.T, path string, size uint64) (*os.File, error) {
	t.Helper()
	dir, err := openFolder(hotplug.EmptyDir{Path: path, Size: size})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { dir.Close() })
	file, err := makeDisk(dir, size)
	if err == nil {
		t.Cleanup(func() { file.Close() })
	}
	return file, err
}

func TestTheFileOfAnEmptyDirIsSparseAndNobodyElses(t *testing.T) {
	t.Parallel()
	path := folder(t)
	if _, err := made(t, path, 3<<30); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(filepath.Join(path, diskName))
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	if info.Mode() != 0o600 || info.Size() != 3<<30 || stat.Blocks != 0 {
		t.Errorf("got %v of %d bytes with %d blocks", info.Mode(), info.Size(), stat.Blocks)
	}
	if _, err := made(t, path, 1<<20); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), diskName+" is that of another pod") {
		t.Errorf("a second sandbox got the file that the first one has: %v", err)
	}
}

// Kubelet makes a new sandbox for a pod whose sandbox was killed, and keeps its emptyDirs.
func TestAFileThatAKilledSandboxLeftGivesWay(t *testing.T) {
	t.Parallel()
	path := folder(t)
	left := filepath.Join(path, diskName)
	if err := os.WriteFile(left, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Open(left)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	file, err := made(t, path, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	now, _ := file.Stat()
	if old, _ := before.Stat(); os.SameFile(old, now) || old.Size() != 3 {
		t.Error("the file of the old sandbox was used again")
	}
}

// What lies in an emptyDir may be a container's work, of a time when it was not sealed.
func TestTricksInTheFolderLeadNowhere(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		plant func(path, disk, victim string) error
		is    func(error) bool
		want  string
	}{
		"a link to a file of the node": {
			func(_, disk, victim string) error { return os.Symlink(victim, disk) }, errdefs.IsFailedPrecondition, "in the way, remove it",
		},
		"a link to a file that is not there": {
			func(_, disk, victim string) error { return os.Symlink(victim+"-new", disk) }, errdefs.IsFailedPrecondition, "in the way, remove it",
		},
		"a folder": {
			func(_, disk, _ string) error { return os.Mkdir(disk, 0o700) }, errdefs.IsFailedPrecondition, "in the way, remove it",
		},
		"a pipe": {
			func(_, disk, _ string) error { return unix.Mkfifo(disk, 0o600) }, errdefs.IsFailedPrecondition, "in the way, remove it",
		},
		"a second name of a file of the node": {
			func(_, disk, victim string) error { return os.Link(victim, disk) }, func(err error) bool { return err == nil }, "",
		},
		"a link in the folder's place": {
			func(path, _, victim string) error {
				return errors.Join(os.Remove(path), os.Symlink(filepath.Dir(victim), path))
			}, errdefs.IsInvalidArgument, "a link is in the way",
		},
		"a link above the folder": {
			func(path, _, victim string) error {
				above, elsewhere := filepath.Dir(path), filepath.Dir(victim)
				return errors.Join(os.RemoveAll(above), os.Mkdir(filepath.Join(elsewhere, "scratch"), 0o700), os.Symlink(elsewhere, above))
			}, errdefs.IsInvalidArgument, "a link is in the way",
		},
		"a link in the place of kubelet's root": {
			func(path, _, _ string) error {
				root := strings.TrimSuffix(path, "/pods/1/volumes/kubernetes.io~empty-dir/scratch")
				return errors.Join(os.Rename(root, root+"-moved"), os.Symlink(root+"-moved", root))
			}, func(err error) bool { return err == nil }, "",
		},
		"a file in the folder's place": {
			func(path, _, _ string) error { return errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)) }, errdefs.IsInvalidArgument, "no folder",
		},
		"no folder": {
			func(path, _, _ string) error { return os.Remove(path) }, errdefs.IsNotFound, "is not there",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := folder(t)
			victim := filepath.Join(t.TempDir(), "victim")
			if err := os.WriteFile(victim, []byte("the node's"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := test.plant(path, filepath.Join(path, diskName), victim); err != nil {
				t.Fatal(err)
			}
			_, err := made(t, path, 1<<20)
			if !test.is(err) || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v", err)
			}
			if got, err := os.ReadFile(victim); err != nil || string(got) != "the node's" {
				t.Errorf("the node's file was touched: %q (%v)", got, err)
			}
			filepath.WalkDir(filepath.Dir(victim), func(path string, entry fs.DirEntry, _ error) error {
				if !entry.IsDir() && path != victim {
					t.Errorf("%s was made", path)
				}
				return nil
			})
		})
	}
}

func TestAFileWithoutADeviceIsRemoved(t *testing.T) {
	t.Parallel()
	path, want := folder(t), errors.New("no loop device")
	_, err := openEmptyDir(hotplug.EmptyDir{Path: path, Size: 1 << 20}, func(file *os.File) (Device, error) {
		if info, err := os.Lstat(filepath.Join(path, diskName)); err != nil || info.Size() != 1<<20 {
			t.Errorf("it is not there to be attached: %v (%v)", info, err)
		}
		return Device{}, want
	})
	if !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
	if entries, err := os.ReadDir(path); err != nil || len(entries) > 0 {
		t.Errorf("%v is left behind (%v)", entries, err)
	}
}

func TestAFileThatCannotHaveItsSizeIsRemoved(t *testing.T) {
	t.Parallel()
	path := folder(t)
	if _, err := made(t, path, 1<<63); err == nil {
		t.Fatal("no error")
	}
	if _, err := os.Lstat(filepath.Join(path, diskName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is left behind (%v)", err)
	}
}
