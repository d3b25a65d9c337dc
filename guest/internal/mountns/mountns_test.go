package mountns

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// proc is a fake proc file system.
type proc struct {
	t   *testing.T
	dir string
}

func newProc(t *testing.T) proc {
	p := proc{t: t, dir: t.TempDir()}
	p.add("self", "mnt:[1]", "0::/init.scope\n", "")
	p.add("1", "mnt:[1]", "0::/init.scope\n", "1 0 0:1 / / rw - rootfs rootfs rw\n")
	return p
}

func (p proc) add(pid, namespace, cgroup, mounts string) {
	p.t.Helper()
	dir := filepath.Join(p.dir, pid)
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "ns"), 0o700),
		os.Symlink(namespace, filepath.Join(dir, "ns/mnt")),
		os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o600),
		os.WriteFile(filepath.Join(dir, "mountinfo"), []byte(mounts), 0o600),
	} {
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

const (
	root   = "10 9 0:30 / / rw - overlay overlay rw\n"
	volume = "20 10 253:7 / /mnt/data rw,nosuid,nodev,relatime - ext4 /dev/mapper/x rw\n"
)

var want = []Mount{{Path: "/mnt/data", Major: 253, Minor: 7, Options: []string{"rw", "nosuid", "nodev", "strictatime"}}}

func TestCheckMounts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		mounts string
		words  string // of the error; "" is fine
	}{
		"as wanted":                  {root + volume, ""},
		"other mounts beside it":     {root + "11 10 0:5 / /proc rw - proc proc rw\n" + volume + "21 10 0:6 / /mnt/dataset rw - tmpfs t rw\n", ""},
		"parent is a mount too":      {root + "12 10 0:8 / /mnt rw - tmpfs t rw\n" + strings.Replace(volume, "20 10", "20 12", 1), ""},
		"not there":                  {root, "nothing is mounted"},
		"elsewhere":                  {root + strings.Replace(volume, "/mnt/data", "/mnt/evil", 1), "nothing is mounted"},
		"another device":             {root + strings.Replace(volume, "253:7", "253:8", 1), "not its volume"},
		"a folder of the volume":     {root + strings.Replace(volume, "/ /mnt", "/sub /mnt", 1), "not its volume"},
		"read-only":                  {root + strings.Replace(volume, "rw,nosuid", "ro,nosuid", 1), "not rw"},
		"setuid allowed":             {root + strings.Replace(volume, "nosuid,", "", 1), "not nosuid"},
		"mounted over":               {root + volume + "21 20 0:9 / /mnt/data rw - tmpfs t rw\n", "not its volume"},
		"parent mounted over later":  {root + volume + "21 10 0:9 / /mnt rw - tmpfs t rw\n", "hidden"},
		"root mounted over later":    {root + volume + "21 10 0:9 / / rw - tmpfs t rw\n", "hidden"},
		"over the mount over it":     {root + volume + "21 20 0:9 / /mnt/data rw - tmpfs t rw\n22 21 253:7 / /mnt/data rw,nosuid,nodev - ext4 x rw\n", ""},
		"something inside of it":     {root + volume + "21 20 0:9 / /mnt/data/keys rw - tmpfs t rw\n", "inside a volume"},
		"inside of it, but hidden":   {root + "19 10 0:9 / /mnt/data/keys rw - tmpfs t rw\n" + volume, "inside a volume"},
		"two on one parent":          {root + volume + strings.Replace(volume, "20 10", "21 10", 1), "two mounts"},
		"two roots":                  {root + "13 8 0:31 / / rw - tmpfs t rw\n" + volume, "two root"},
		"no root":                    {volume, "no root"},
		"parent of itself":           {"10 10 0:30 / / rw - overlay overlay rw\n" + volume, "no root"},
		"circle":                     {root + "20 21 0:1 / /mnt rw - t t rw\n21 20 0:1 / /mnt rw - t t rw\n", "nothing is mounted"},
		"escaped name, not the same": {root + strings.Replace(volume, "/mnt/data", `/mnt/data\040`, 1), "nothing is mounted"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProc(t)
			p.add("7", "mnt:[2]", "0::/kata/c1\n", c.mounts)
			err := Processes{Proc: p.dir}.Check("c1", want)
			if c.words == "" && err != nil || c.words != "" && (!errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), c.words)) {
				t.Errorf("got %v, want %q", err, c.words)
			}
		})
	}
}

func TestEachProcessOfTheContainerIsChecked(t *testing.T) {
	t.Parallel()
	p := newProc(t)
	p.add("7", "mnt:[2]", "0::/kata/c1\n", root+volume)
	p.add("8", "mnt:[3]", "0::/kata/c1\n", root)
	if err := (Processes{Proc: p.dir}).Check("c1", want); !errdefs.IsPermissionDenied(err) {
		t.Errorf("got %v", err)
	}
}

func TestProcessInOurMountNamespaceIsRefused(t *testing.T) {
	t.Parallel()
	p := newProc(t)
	p.add("7", "mnt:[1]", "0::/kata/c1\n", root)
	if err := (Processes{Proc: p.dir}).Check("c1", nil); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "namespace of its own") {
		t.Errorf("got %v", err)
	}
}

func TestContainerWithoutProcessesIsRefused(t *testing.T) {
	t.Parallel()
	p := newProc(t)
	if err := (Processes{Proc: p.dir}).Check("c1", nil); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "no process") {
		t.Errorf("got %v", err)
	}
	if alive, err := (Processes{Proc: p.dir}).Alive("c1"); err != nil || alive {
		t.Errorf("alive: %v, %v", alive, err)
	}
}

func TestProcessesAreFoundByTheLastElementOfTheirCgroup(t *testing.T) {
	t.Parallel()
	for cgroup, found := range map[string]bool{
		"0::/k8s.io/c1\n":                           true,
		"0::/pod.slice/cri-containerd-c1.scope\n":   true,
		"4:memory:/x/c1\n0::/\n":                    true,
		"0::/k8s.io/c10\n":                          false,
		"0::/k8s.io/xc1\n":                          false,
		"0::/k8s.io/c1/child\n":                     false,
		"0::/pod.slice/cri-containerd-xc1.scope\n":  false,
		"0::/pod.slice/cri-containerd-c1.scope/x\n": false,
		"0::/\n": false,
		"":       false,
	} {
		t.Run(cgroup, func(t *testing.T) {
			t.Parallel()
			p := newProc(t)
			p.add("7", "mnt:[2]", cgroup, root)
			if alive, err := (Processes{Proc: p.dir}).Alive("c1"); err != nil || alive != found {
				t.Errorf("got %v, %v", alive, err)
			}
		})
	}
}

func TestProcessThatEndsMeanwhileIsPassedOver(t *testing.T) {
	t.Parallel()
	p := newProc(t)
	p.add("7", "mnt:[2]", "0::/kata/c1\n", root+volume)
	p.add("8", "mnt:[2]", "0::/kata/c1\n", "")
	if err := os.Remove(filepath.Join(p.dir, "8/ns/mnt")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(p.dir, "9"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := (Processes{Proc: p.dir}).Check("c1", want); err != nil {
		t.Error(err)
	}
}

func FuzzCheckMounts(f *testing.F) {
	f.Add(root + volume)
	f.Add(root + volume + "21 20 0:9 / /mnt/data rw - tmpfs t rw\n")
	f.Add("10 10 0:30 / / rw - t t rw\n20 21 0:1 / /mnt rw - t t rw\n21 20 0:1 / /mnt rw - t t rw\n")
	f.Fuzz(func(t *testing.T, mounts string) {
		p := newProc(t)
		p.add("7", "mnt:[2]", "0::/kata/c1\n", mounts)
		err := Processes{Proc: p.dir}.Check("c1", want)
		if err == nil && !strings.Contains(mounts, "253:7") {
			t.Errorf("accepted %q", mounts)
		}
	})
}
