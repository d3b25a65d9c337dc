//go:build vm

package mountns_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/mountns"
)

// contain runs a shell as a container does: a cgroup and a mount namespace of its own, where
// script is run, and waits until that is done.
func contain(t *testing.T, id, script string, namespaces uintptr) {
	t.Helper()
	cgroup := filepath.Join("/sys/fs/cgroup", id)
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(cgroup) })
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("sh", "-ec", script+"\necho done; exec sleep 1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: namespaces, UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "done\n" {
		t.Fatalf("%q, %v", line, err)
	}
}

func device(t *testing.T, dir string) mountns.Mount {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	return mountns.Mount{Major: unix.Major(st.Dev), Minor: unix.Minor(st.Dev)}
}

// mountPoints are all that there are now.
func mountPoints(t *testing.T) (points []string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	return points
}

func TestRealContainers(t *testing.T) {
	source := t.TempDir()
	if err := unix.Mount("sealed", source, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(source, unix.MNT_DETACH) })
	point := t.TempDir()
	want := device(t, source)
	want.Path, want.Options = point, []string{"nosuid", "nodev"}
	bind := fmt.Sprintf("mount --bind %s %s", source, point)
	// These containers have the guest's whole tree, and what is wanted is that nothing else be
	// refused than what a case is about.
	processes := mountns.Processes{Proc: "/proc", Shared: mountPoints(t)}
	secret := t.TempDir()
	if err := unix.Mount("secret", secret, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(secret, unix.MNT_DETACH) })
	hide := "umount " + secret + " || :" // it may be hidden with its parent

	for i, c := range []struct {
		name, script string
		namespaces   uintptr
		words        string
	}{
		{"as wanted", bind, unix.CLONE_NEWNS, ""},
		{"nothing mounted", ":", unix.CLONE_NEWNS, "nothing is mounted"},
		{"mounted over", bind + "; mount -t tmpfs t " + point, unix.CLONE_NEWNS, "not its volume"},
		{"parent mounted over", bind + "; mount -t tmpfs t " + filepath.Dir(point), unix.CLONE_NEWNS, "hidden"},
		{"another file system", "mount -t tmpfs t " + point, unix.CLONE_NEWNS, "not its volume"},
		{"a folder of it", "mkdir -p " + source + "/sub; mount --bind " + source + "/sub " + point, unix.CLONE_NEWNS, "not its volume"},
		{"a mount inside", bind + "; mkdir -p " + point + "/in; mount -t tmpfs t " + point + "/in", unix.CLONE_NEWNS, "inside a volume"},
		{"our namespace", ":", 0, "namespace of its own"},
		{"a folder of the guest's", bind + "; mkdir -p /tmp/in; mount --bind " + secret + " /tmp/in", unix.CLONE_NEWNS, "leads out"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := "c" + strconv.Itoa(i)
			if c.namespaces != 0 {
				c.script = c.script + "; " + hide
			}
			contain(t, id, c.script, c.namespaces)
			err := processes.Check(id, []mountns.Mount{want})
			if c.words == "" && err != nil || c.words != "" && (!errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), c.words)) {
				t.Errorf("got %v, want %q", err, c.words)
			}
			if alive, err := processes.Alive(id); err != nil || !alive {
				t.Errorf("alive: %v, %v", alive, err)
			}
			space, inodes, err := processes.Usage(id, want)
			if c.words == "" && (err != nil || space.Total != 4<<20 || inodes.Total == 0) {
				t.Errorf("usage: %+v, %+v, %v", space, inodes, err)
			}
			if c.name == "nothing mounted" && !errdefs.IsNotFound(err) {
				t.Errorf("usage of nothing: %v", err)
			}
		})
	}
}
