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
	t   testing.TB
	dir string
}

func newProc(t testing.TB) proc {
	p := proc{t: t, dir: t.TempDir()}
	p.add("self", "mnt:[1]", "0::/init.scope\n", guest)
	p.add("1", "mnt:[1]", "0::/init.scope\n", guest)
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
	guest = "1 1 0:2 / / rw - rootfs rootfs rw\n2 1 0:20 / /proc rw - proc proc rw\n3 1 0:21 / /sys rw - sysfs sysfs rw\n" +
		"4 1 0:6 / /dev rw - devtmpfs dev rw\n5 1 0:22 / /run rw - tmpfs tmpfs rw\n6 3 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n" +
		"7 5 0:30 / /run/kata-containers/shared/containers rw,nodev - 9p kataShared rw\n" +
		"8 5 0:24 / /run/kata-containers/sandbox/shm rw - tmpfs shm rw\n"
	root   = "10 9 0:30 /c1/rootfs / rw,nodev - 9p kataShared rw\n"
	pseudo = "11 10 0:50 / /proc rw,nosuid - proc proc rw\n12 11 0:50 /sys /proc/sys ro - proc proc rw\n" +
		"13 10 0:51 / /dev rw - tmpfs tmpfs rw\n14 13 0:52 / /dev/pts rw - devpts devpts rw\n" +
		"15 10 0:21 / /sys ro - sysfs sysfs rw\n16 15 0:23 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n" +
		"17 13 0:24 / /dev/shm rw - tmpfs shm rw\n18 11 0:51 /null /proc/kcore rw - tmpfs tmpfs rw\n" +
		"19 10 0:30 /c1-hosts /etc/hosts rw,nodev - 9p kataShared rw\n"
	volume = "20 10 253:7 / /mnt/data rw,nosuid,nodev,relatime - ext4 /dev/mapper/x rw\n"
)

var shared = []string{"/run/kata-containers/shared/containers", "/run/kata-containers/sandbox/shm"}

var want = []Mount{{Path: "/mnt/data", Major: 253, Minor: 7, Options: []string{"rw", "nosuid", "nodev", "strictatime"}}}

func TestCheckMounts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		mounts string
		words  string // of the error; "" is fine
	}{
		"as wanted":                  {root + volume, ""},
		"other mounts beside it":     {root + pseudo + volume + "21 10 0:60 / /mnt/dataset rw - tmpfs t rw\n", ""},
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
		"parent of itself":           {"10 10 0:30 / / rw - 9p s rw\n" + volume, "no root"},
		"circle":                     {root + "20 21 0:1 / /mnt rw - t t rw\n21 20 0:1 / /mnt rw - t t rw\n", "nothing is mounted"},
		"escaped name, not the same": {root + strings.Replace(volume, "/mnt/data", `/mnt/data\040`, 1), "nothing is mounted"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProc(t)
			p.add("7", "mnt:[2]", "0::/kata/c1\n", c.mounts)
			err := Processes{Proc: p.dir, Shared: shared}.Check("c1", want)
			if c.words == "" && err != nil || c.words != "" && (!errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), c.words)) {
				t.Errorf("got %v, want %q", err, c.words)
			}
		})
	}
}

func TestMountsThatLeadOutOfTheContainerAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		mounts, words string
	}{
		"what every container has": {root + pseudo + volume, ""},
		"files of a share that is not served by the host": {root + pseudo + volume +
			"30 10 0:22 /kata-containers/shared/containers/hosts /etc/hosts rw - tmpfs tmpfs rw\n", "leads out"}, // the share is mounted over it
		"a submount of the share":                  {strings.Replace(root, "9p", "virtiofs", 1) + pseudo + volume, ""},
		"link to the agent's socket":               {root + pseudo + volume + "30 10 0:22 /sealvol/agent /etc/hosts rw - tmpfs tmpfs rw\n", "leads out"},
		"link to the guest's /proc":                {root + pseudo + volume + "30 10 0:20 / /etc/hosts rw - proc proc rw\n", "leads out"},
		"link to the guest's /proc, read-only":     {root + pseudo + volume + "30 10 0:20 / /etc/hosts ro - proc proc rw\n", "leads out"},
		"link to the guest's devices":              {root + pseudo + volume + "30 10 0:6 / /etc/hosts rw - devtmpfs dev rw\n", "leads out"},
		"link to a single device":                  {root + pseudo + volume + "30 10 0:6 /dm-2 /etc/hosts rw - devtmpfs dev rw\n", "leads out"},
		"link to the guest's /sys":                 {root + pseudo + volume + "30 10 0:21 / /etc/hosts rw - sysfs sysfs rw\n", "leads out"},
		"link to the guest's root":                 {"10 9 0:2 / / rw - rootfs rootfs rw\n" + pseudo + volume, "leads out"},
		"link to the attached volume":              {root + pseudo + volume + "30 10 253:7 / /etc/hosts rw - ext4 x rw\n", "leads out"},
		"link to a folder of the attached volume":  {root + pseudo + volume + "30 10 253:7 /sub /etc/hosts rw - ext4 x rw\n", "leads out"},
		"volume as the root":                       {strings.Replace(root, "0:30 /c1/rootfs", "253:7 /", 1) + pseudo + volume, "leads out"},
		"a file system that nobody asked for":      {root + pseudo + volume + "30 10 0:70 / /x rw - fuse x rw\n", "leads out"},
		"kernel settings writable":                 {root + strings.Replace(pseudo, "/proc/sys ro", "/proc/sys rw", 1) + volume, "leads out"},
		"kernel settings as they are":              {root + "11 10 0:50 / /proc rw - proc proc rw\n" + volume, "leads out"},
		"kernel settings of a second /proc":        {root + pseudo + volume + "30 10 0:50 / /x rw - proc proc rw\n", "leads out"},
		"kernel settings on top of read-only ones": {root + pseudo + volume + "30 12 0:50 /sys /proc/sys rw - proc proc rw\n", "leads out"},
		"writable /sys":                            {root + strings.Replace(pseudo, "/sys ro - sysfs", "/sys rw - sysfs", 1) + volume, "leads out"},
		"writable cgroups":                         {root + strings.Replace(pseudo, "/sys/fs/cgroup ro", "/sys/fs/cgroup rw", 1) + volume, "leads out"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProc(t)
			p.add("7", "mnt:[2]", "0::/kata/c1\n", c.mounts)
			err := Processes{Proc: p.dir, Shared: shared}.Check("c1", want)
			if c.words == "" && err != nil || c.words != "" && (!errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), c.words)) {
				t.Errorf("got %v, want %q", err, c.words)
			}
		})
	}
}

func TestShareWithinAnotherMountGivesNothingBesideIt(t *testing.T) {
	t.Parallel()
	p := newProc(t)
	file := filepath.Join(p.dir, "self/mountinfo")
	if err := os.WriteFile(file, []byte("1 1 0:2 / / rw - rootfs rootfs rw\n5 1 0:22 / /run rw - tmpfs tmpfs rw\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		folder string
		ok     bool
	}{
		{"/kata-containers/shared/containers", true},
		{"/kata-containers/shared/containers/hosts", true},
		{"/kata-containers/shared/containers2", false},
		{"/kata-containers/shared", false},
		{"/", false},
	} {
		id := "c" + string(rune('a'+i))
		p.add(string(rune('1'+i))+"0", "mnt:[2]", "0::/kata/"+id+"\n", root+"30 10 0:22 "+c.folder+" /etc/hosts rw - tmpfs tmpfs rw\n")
		err := Processes{Proc: p.dir, Shared: []string{"/run/kata-containers/shared/containers"}}.Check(id, nil)
		if c.ok && err != nil || !c.ok && !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", c.folder, err)
		}
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
	p := newProc(f)
	p.add("7", "mnt:[2]", "0::/kata/c1\n", "")
	f.Fuzz(func(t *testing.T, mounts string) {
		// The rest is the same each time, and folders are slow to make.
		if err := os.WriteFile(filepath.Join(p.dir, "7/mountinfo"), []byte(mounts), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Processes{Proc: p.dir}.Check("c1", want)
		if err == nil && !strings.Contains(mounts, "253:7") {
			t.Errorf("accepted %q", mounts)
		}
	})
}
