//go:build vm

package image

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The tools that seal a volume must have their libraries in the image: they run here with nothing else to load.
func TestGuestsToolsRunInIt(t *testing.T) {
	const program = "/bin/busybox" // any
	tree, err := Guest{Service: program, Agent: program}.Tree()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	var archive bytes.Buffer
	if err := tree.WriteCPIO(&archive); err != nil {
		t.Fatal(err)
	}
	unpack := exec.Command("cpio", "-i", "--quiet")
	unpack.Dir, unpack.Stdin = root, &archive
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		target := filepath.Join(root, dir)
		if err := unix.Mount(dir, target, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}
	const size = 32 << 20
	for _, name := range []string{"disk", "header"} {
		file, err := os.Create(filepath.Join(root, "tmp", name))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := file.Truncate(size); err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range []string{
		"/usr/sbin/cryptsetup luksFormat --batch-mode --type=luks2 --header=/tmp/header --key-file=- --integrity=hmac-sha256 --integrity-no-wipe --sector-size=4096 --pbkdf=pbkdf2 --pbkdf-force-iterations=1000 --disable-locks /tmp/disk",
		"/usr/sbin/cryptsetup open --batch-mode --type=luks2 --header=/tmp/header --key-file=- --integrity-no-journal --disable-locks /tmp/disk image-test",
		"/usr/sbin/cryptsetup close --header=/tmp/header --disable-locks image-test",
		"/usr/sbin/mkfs.ext4 -F -q /tmp/disk",
	} {
		args := strings.Fields(line)
		cmd := exec.Command(args[0], args[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		cmd.Dir, cmd.Env = "/", []string{"DM_DISABLE_UDEV=1"}
		cmd.Stdin = strings.NewReader("of no secrecy")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	modules, err := os.ReadFile("/proc/modules")
	if err != nil {
		t.Fatal(err)
	}
	// The kernel would load these here, and a guest does not have them.
	for _, name := range []string{"algif_skcipher", "algif_hash", "af_alg"} {
		if strings.Contains(string(modules), name+" ") {
			t.Errorf("cryptsetup makes the kernel load %s, which the guest lacks", name)
		}
	}
}
