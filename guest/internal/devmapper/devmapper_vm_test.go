//go:build vm

package devmapper_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/tagstore"
)

const (
	diskNode = "/dev/vda" // the machine's first scratch disk
	prefix   = "encrypted_disk_"
	name     = prefix + "vmtest"
	length   = 16 << 20
	block    = 4096
)

// The test binary, started again with these, makes a volume, attaches it in the folder, and stops at a step until it is killed.
const (
	ownerDir  = "DEVMAPPER_TEST_DIR"
	ownerStep = "DEVMAPPER_TEST_STEP"
)

var steps = []string{"linear", "integrity", "crypt", "file system", "mount", "attach"}

func TestMain(m *testing.M) {
	dir := os.Getenv(ownerDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	fmt.Println(own(dir, func(step string) {
		if step == os.Getenv(ownerStep) {
			fmt.Println(step)
			time.Sleep(time.Hour)
		}
	}))
}

func own(dir string, done func(step string)) error {
	ctx := context.Background()
	volume, err := seal(ctx, diskNode, done)
	if err != nil {
		return err
	}
	image, err := filesystem.Ext4.Make(ctx, filesystem.Tools{Ext4: "/usr/sbin/mkfs.ext4"}, length)
	if err != nil {
		return err
	}
	if err := image.CopyTo(ctx, volume.crypt.Node()); err != nil {
		return err
	}
	done("file system")
	mount, err := filesystem.Ext4.Open(ctx, volume.crypt.Link(), volume.crypt.Node(), volume.crypt.Number, filesystem.Options{})
	if err != nil {
		return err
	}
	done("mount")
	if err := mount.Attach(dir); err != nil {
		return err
	}
	done("attach")
	return nil
}

// volume is a stack as guest/internal/volume makes it.
type volume struct {
	dm    *devmapper.Control
	tags  *tagstore.Store
	crypt devmapper.Device
}

// close lets go of what a killed owner lets go of.
func (v volume) close(t *testing.T) {
	t.Helper()
	if err := errors.Join(v.tags.Close(), v.dm.Close()); err != nil {
		t.Error(err)
	}
}

func seal(ctx context.Context, disk string, done func(step string)) (v volume, err error) {
	var st unix.Stat_t
	if err := unix.Stat(disk, &st); err != nil {
		return v, err
	}
	if v.dm, err = devmapper.Open(); err != nil {
		return v, err
	}
	if v.tags, err = tagstore.New(ctx, length); err != nil {
		return v, err
	}
	key, err := keyring.New(16)
	if err != nil {
		return v, err
	}
	defer key.Destroy()
	add := func(step, suffix string, target devmapper.Target) (d devmapper.Device) {
		if err == nil {
			d, err = v.dm.Create(ctx, name+suffix, "CRYPT-SEALVOL-"+name+suffix, length, target)
		}
		if err == nil {
			done(step)
		}
		return d
	}
	cut := add("linear", "_cut", devmapper.Linear{Device: blockdev.FromDev(st.Rdev)})
	dif := add("integrity", "_dif", devmapper.Integrity{Data: cut.Number, Meta: v.tags.Number(), TagBytes: tagstore.TagBytes, BlockBytes: block, JournalSectors: 64, BufferSectors: 8})
	lendErr := key.Lend("sealvol:vmtest", func() error {
		v.crypt = add("crypt", "", devmapper.Crypt{Cipher: "capi:aegis128-random", KeyBytes: 16, Description: "sealvol:vmtest", Device: dif.Number, TagBytes: tagstore.TagBytes, BlockBytes: block})
		return nil
	})
	return v, errors.Join(err, lendErr)
}

func control(t *testing.T) *devmapper.Control {
	t.Helper()
	dm, err := devmapper.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// For the next test, if this one failed.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := dm.Sweep(ctx, prefix); err != nil {
			t.Error(err)
		}
		dm.Close()
	})
	return dm
}

func timeout(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// leftOver lists what there is of volumes in the kernel and under /dev.
func leftOver(t *testing.T, dm *devmapper.Control) (left []string) {
	t.Helper()
	list, err := dm.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range list {
		if strings.HasPrefix(m.Name, prefix) {
			left = append(left, m.Name)
		}
	}
	for _, pattern := range []string{"/sys/block/loop*/loop/backing_file", "/dev/mapper/" + prefix + "*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	return left
}

// eventually waits for what the kernel does by itself, as long as it takes.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for ctx := timeout(t, time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatalf("not %s", what)
		}
	}
}

func openFile(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned is memory for direct I/O.
func aligned(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// startOwner starts an owner and waits until it has done a step and stopped there. The result kills it.
func startOwner(t *testing.T, dir, step string) (kill func()) {
	t.Helper()
	owner := exec.Command("/proc/self/exe")
	owner.Env = append(os.Environ(), ownerDir+"="+dir, ownerStep+"="+step)
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != step+"\n" {
		t.Fatalf("the owner says %q, %v", line, err)
	}
	return func() {
		t.Helper()
		if err := owner.Process.Kill(); err != nil {
			t.Error(err)
		}
		owner.Wait() // it always says that it was killed
	}
}

func TestVMMappingsAreListed(t *testing.T) {
	dm := control(t)
	before, err := dm.List()
	if err != nil {
		t.Fatal(err)
	}
	v, err := seal(timeout(t, time.Minute), diskNode, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	list, err := dm.List()
	if err != nil || len(list) != len(before)+3 {
		t.Errorf("%v, %v", list, err)
	}
	if !slices.Contains(list, devmapper.Mapping{Name: name, UUID: "CRYPT-SEALVOL-" + name, Number: v.crypt.Number}) {
		t.Errorf("%v is not in %v", v.crypt, list)
	}
	v.close(t)
	if _, err := dm.Sweep(timeout(t, time.Minute), prefix); err != nil {
		t.Error(err)
	}
	if after, err := dm.List(); err != nil || !slices.Equal(after, before) {
		t.Errorf("%v, %v", after, err)
	}
}

func TestVMNothingIsLeftOfAnOwnerThatIsKilled(t *testing.T) {
	dm := control(t)
	for _, step := range steps[:len(steps)-1] { // but the last, which another test is about
		t.Run(step, func(t *testing.T) {
			kill := startOwner(t, filepath.Join(t.TempDir(), "v"), step)
			kill()
			t.Logf("left by the owner: %q", leftOver(t, dm))
			start := time.Now()
			swept, err := dm.Sweep(timeout(t, time.Minute), prefix)
			t.Logf("swept %v in %v", swept, time.Since(start))
			if err != nil || len(swept) == 0 || slices.ContainsFunc(swept, func(s devmapper.Swept) bool { return s.Held }) {
				t.Errorf("%v, %v", swept, err)
			}
			// The kernel lets go of a loop device a moment after its last user.
			eventually(t, "swept", func() bool { return len(leftOver(t, dm)) == 0 })
		})
	}
}

func TestVMAMountThatOutlivesItsOwnerGetsErrors(t *testing.T) {
	dm := control(t)
	place, err := filesystem.NewPlace(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := place.Close(); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(t.TempDir(), "v")
	kill := startOwner(t, dir, "attach")
	mounted := true
	t.Cleanup(func() {
		if mounted {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	// What a container has open: one file that is read, one that is written.
	read, write := openFile(t, filepath.Join(dir, "read"), os.O_RDWR|os.O_CREATE), openFile(t, filepath.Join(dir, "write"), os.O_WRONLY|os.O_CREATE)
	if _, err := read.Write(make([]byte, 64*block)); err != nil {
		t.Fatal(err)
	}
	if err := read.Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := write.Write(make([]byte, 64*block)); err != nil { // not synced
		t.Fatal(err)
	}
	kill()

	swept, err := dm.Sweep(timeout(t, time.Minute), prefix)
	if want := []devmapper.Swept{{Name: name, Held: true}, {Name: name + "_dif"}, {Name: name + "_cut"}}; err != nil || !slices.Equal(swept, want) {
		t.Errorf("%v, %v", swept, err)
	}
	eventually(t, "swept but for the mapping", func() bool { return slices.Equal(leftOver(t, dm), []string{name}) })
	if table, err := dm.Table(name); err != nil || table != fmt.Sprintf("0 %d error ", length/512) {
		t.Errorf("table %q, %v", table, err)
	}

	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := read.ReadAt(make([]byte, block), 32*block); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v", err)
	}
	if err := write.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("fsync: %v", err)
	}
	// Without a journal a file system takes into its cache what it can, and tells who asks for the disk.
	_, err = write.WriteAt(make([]byte, block), 128*block)
	t.Logf("write after that: %v", err)
	if err := write.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("fsync after that: %v", err)
	}
	if made, err := os.Create(filepath.Join(dir, "new")); err == nil {
		err = made.Sync()
		t.Logf("fsync of a new file: %v", err)
		made.Close()
	} else {
		t.Logf("a new file: %v", err)
	}
	raw := openFile(t, fmt.Sprintf("/dev/dm-%d", minor(t, dir)), os.O_RDWR|unix.O_DIRECT)
	buffer := aligned(t, block)
	if _, err := raw.ReadAt(buffer, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("raw read: %v", err)
	}
	if _, err := raw.WriteAt(buffer, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("raw write: %v", err)
	}
	for _, f := range []*os.File{raw, read, write} {
		f.Close()
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	eventually(t, "gone with its last user", func() bool { return len(leftOver(t, dm)) == 0 })
}

func minor(t *testing.T, dir string) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	return unix.Minor(st.Dev)
}

// dmsetup makes a disk that can be stopped: a linear mapping that is suspended without a flush takes I/O and does not answer.
func dmsetup(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("dmsetup", args...).CombinedOutput(); err != nil {
		t.Errorf("dmsetup %q: %v: %s", args, err, out)
	}
}

func newStoppable(t *testing.T) (disk string) {
	t.Helper()
	dmsetup(t, "create", "disk", "--table", fmt.Sprintf("0 %d linear %s 0", length/512, diskNode))
	t.Cleanup(func() { dmsetup(t, "remove", "--retry", "disk") })
	return "/dev/mapper/disk"
}

func TestVMADiskThatDoesNotAnswerIsNotWaitedForLongerThanItMay(t *testing.T) {
	dm := control(t)
	v, err := seal(timeout(t, time.Minute), newStoppable(t), func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	user := openFile(t, v.crypt.Node(), os.O_RDWR|unix.O_DIRECT)
	buffer := aligned(t, block)
	if _, err := user.WriteAt(buffer, 0); err != nil {
		t.Fatal(err)
	}
	v.close(t)
	dmsetup(t, "suspend", "--noflush", "disk")
	read := make(chan error)
	go func() {
		_, err := user.ReadAt(buffer, 0)
		read <- err
	}()
	// Until it is under way.
	eventually(t, "reading", func() bool {
		inflight, err := os.ReadFile(fmt.Sprintf("/sys/block/dm-%d/inflight", v.crypt.Number.Minor))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(inflight))[0] == "1"
	})
	if held, err := dm.Kill(timeout(t, 200*time.Millisecond), name); !held || !errdefs.IsUnavailable(err) {
		t.Errorf("kill: %v, %v", held, err)
	}
	swept, err := dm.Sweep(timeout(t, 200*time.Millisecond), prefix)
	if len(swept) != 0 || !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "\n") {
		t.Errorf("sweep: %v, %v", swept, err)
	}
	t.Log(err)
	for _, mapping := range []string{name, name + "_cut"} {
		if table, err := dm.Table(mapping); err != nil || strings.HasSuffix(table, " error ") {
			t.Errorf("table of %s: %s, %v", mapping, table, err)
		}
	}
	dmsetup(t, "resume", "disk")
	if err := <-read; err != nil {
		t.Errorf("the read that had to wait: %v", err)
	}
	for _, mapping := range []string{name, name + "_cut"} {
		eventually(t, "failing", func() bool {
			table, err := dm.Table(mapping)
			return err == nil && strings.HasSuffix(table, " error ")
		})
	}
	swept, err = dm.Sweep(timeout(t, time.Minute), prefix)
	if err != nil || len(swept) != 3 {
		t.Errorf("sweep: %v, %v", swept, err)
	}
	if _, err := user.ReadAt(buffer, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v", err)
	}
	user.Close()
	eventually(t, "gone with its last user", func() bool { return len(leftOver(t, dm)) == 0 })
}

func TestVMADiskThatHangsWithNothingUnderWayIsSweptAtOnce(t *testing.T) {
	dm := control(t)
	v, err := seal(timeout(t, time.Minute), newStoppable(t), func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	user := openFile(t, v.crypt.Node(), os.O_RDWR|unix.O_DIRECT)
	buffer := aligned(t, block)
	if _, err := user.WriteAt(buffer, 0); err != nil {
		t.Fatal(err)
	}
	v.close(t)
	dmsetup(t, "suspend", "--noflush", "disk")
	t.Cleanup(func() { dmsetup(t, "resume", "disk") })
	swept, err := dm.Sweep(timeout(t, time.Minute), prefix)
	if err != nil || len(swept) != 3 {
		t.Errorf("sweep: %v, %v", swept, err)
	}
	if _, err := user.ReadAt(buffer, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v", err)
	}
	t.Logf("a flush: %v", user.Sync())
	user.Close()
	eventually(t, "gone with its last user", func() bool { return len(leftOver(t, dm)) == 0 })
}
