//go:build vm

package ioerror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/ioerror"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/tagstore"
)

// The machine's first scratch disk.
const diskNode = "/dev/vda"

const block = 4096

// asOwner makes the test binary hold a Watcher until it is killed.
const asOwner = "IOERROR_TEST_OWNER"

func TestMain(m *testing.M) {
	if os.Getenv(asOwner) != "" {
		if _, err := ioerror.Open(slog.Default()); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("open")
		time.Sleep(time.Hour)
	}
	os.Exit(m.Run())
}

func open(t *testing.T) *ioerror.Watcher {
	t.Helper()
	before := goleak.IgnoreCurrent()
	w, err := ioerror.Open(slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if left := instances(t); len(left) != 0 {
			t.Errorf("trace instances left: %q", left)
		}
		goleak.VerifyNone(t, before)
	})
	return w
}

// instances are the trace instances that the kernel has.
func instances(t *testing.T) (names []string) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	entries, err := os.ReadDir(dir + "/instances")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// mapping makes a device by dmsetup, for targets that are for tests only.
func mapping(t *testing.T, name, table string) blockdev.Number {
	t.Helper()
	dmsetup(t, "create", name, "--table", table)
	t.Cleanup(func() { dmsetup(t, "remove", "--retry", name) })
	return number(t, "/dev/mapper/"+name)
}

func dmsetup(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("dmsetup", args...).CombinedOutput(); err != nil {
		t.Errorf("dmsetup %q: %v: %s", args, err, out)
	}
}

func number(t *testing.T, node string) blockdev.Number {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		t.Fatal(err)
	}
	return blockdev.FromDev(st.Rdev)
}

func device(t *testing.T, node string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(node, flags, 0)
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

func check(t *testing.T, what string, got, want ioerror.Report) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %+v, want %+v", what, got, want)
	}
}

// seal makes a crypt mapping with its tags in memory over the first megabytes of the scratch disk.
func seal(t *testing.T) devmapper.Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	const length = 4 << 20
	dm, err := devmapper.Open()
	if err != nil {
		t.Fatal(err)
	}
	tags, err := tagstore.New(ctx, length)
	if err != nil {
		t.Fatal(err)
	}
	key, err := keyring.New(16)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(key.Destroy(), tags.Close(), dm.Close()); err != nil {
			t.Error(err)
		}
	})
	add := func(name string, target devmapper.Target) devmapper.Device {
		d, err := dm.Create(ctx, name, "", length, target)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := dm.Remove(ctx, name); err != nil {
				t.Error(err)
			}
		})
		return d
	}
	cut := add("ioerror_cut", devmapper.Linear{Device: number(t, diskNode)})
	dif := add("ioerror_dif", devmapper.Integrity{Data: cut.Number, Meta: tags.Number(), TagBytes: tagstore.TagBytes, BlockBytes: block, JournalSectors: 64, BufferSectors: 8})
	var crypt devmapper.Device
	if err := key.Lend("sealvol:ioerror", func() error {
		crypt = add("ioerror", devmapper.Crypt{Cipher: "capi:aegis128-random", KeyBytes: 16, Description: "sealvol:ioerror", Device: dif.Number, TagBytes: tagstore.TagBytes, BlockBytes: block})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return crypt
}

func TestVMABlockThatFailsItsTagIsAFault(t *testing.T) {
	w := open(t)
	crypt := seal(t)
	file := device(t, crypt.Node(), os.O_RDWR|unix.O_DIRECT)
	buffer := aligned(t, 64*block)
	if _, err := file.WriteAt(buffer, 0); err != nil {
		t.Fatal(err)
	}
	told := make(chan ioerror.Fault, 1)
	w.Watch(crypt.Number, func(f ioerror.Fault) { told <- f })
	if _, err := file.ReadAt(buffer, 0); err != nil {
		t.Fatal(err)
	}
	check(t, "sound", w.Faults(crypt.Number), ioerror.Report{})

	// The host changes two blocks.
	for _, i := range []int64{7, 9} {
		if _, err := device(t, "/run/vmrun/disks/0", os.O_RDWR).WriteAt([]byte("changed"), i*block); err != nil {
			t.Fatal(err)
		}
	}
	first := ioerror.Fault{Op: ioerror.Read, Sector: 7 * 8, Sectors: 8, Errno: unix.EILSEQ}
	for i := range int64(12) {
		_, err := file.ReadAt(buffer[:block], i*block)
		if bad := i == 7 || i == 9; errors.Is(err, unix.EILSEQ) != bad {
			t.Errorf("block %d: %v", i, err)
		}
	}
	check(t, "two bad blocks", w.Faults(crypt.Number), ioerror.Report{Count: 2, First: first})
	if got := <-told; got != first {
		t.Errorf("told of %v", got)
	}

	w.Forget(crypt.Number)
	w.Watch(crypt.Number, nil)
	check(t, "watched anew", w.Faults(crypt.Number), ioerror.Report{})
	// One read of many blocks, of which one is bad.
	if _, err := file.ReadAt(buffer[:16*block], 0); !errors.Is(err, unix.EILSEQ) {
		t.Error(err)
	}
	got := w.Faults(crypt.Number)
	t.Logf("a read of 16 blocks: %+v", got)
	if got.Count == 0 || got.First.Sector > 7*8 || got.First.Sector+got.First.Sectors <= 7*8 {
		t.Errorf("the bad block is not in %v", got.First)
	}
}

func TestVMReadaheadIsNoFault(t *testing.T) {
	w := open(t)
	crypt := seal(t)
	buffer := aligned(t, 64*block)
	if _, err := device(t, crypt.Node(), os.O_RDWR|unix.O_DIRECT).WriteAt(buffer, 0); err != nil {
		t.Fatal(err)
	}
	// All but the first blocks go bad.
	if _, err := device(t, "/run/vmrun/disks/0", os.O_RDWR).WriteAt(bytes.Repeat([]byte("changed"), 40*block/7), 24*block); err != nil {
		t.Fatal(err)
	}
	w.Watch(crypt.Number, nil)
	file := device(t, crypt.Node(), os.O_RDONLY)
	if err := unix.Fadvise(int(file.Fd()), 0, 64*block, unix.FADV_WILLNEED); err != nil {
		t.Fatal(err)
	}
	// What is read ahead is read by the kernel: the pages of the good blocks can be had when that is over.
	if _, err := io.CopyN(io.Discard, file, 20*block); err != nil {
		t.Fatal(err)
	}
	check(t, "readahead", w.Faults(crypt.Number), ioerror.Report{})
	if _, err := file.ReadAt(make([]byte, block), 30*block); !errors.Is(err, unix.EIO) {
		t.Errorf("a bad block: %v", err)
	}
	if got := w.Faults(crypt.Number); got.Count != 1 || got.First.Sector != 30*8 {
		t.Errorf("a read that somebody waits for: %+v", got)
	}
}

func TestVMWritesAndFlushesThatFailAreFaults(t *testing.T) {
	w := open(t)
	buffer := aligned(t, 4*block)
	failing := mapping(t, "ioerror_error", "0 2048 error")
	sound := mapping(t, "ioerror_sound", "0 2048 linear "+diskNode+" 0")
	lying := mapping(t, "ioerror_flakey", "0 2048 flakey "+diskNode+" 0 0 1000 1 error_writes")
	for _, n := range []blockdev.Number{failing, sound, lying} {
		w.Watch(n, nil)
	}
	for name, isSound := range map[string]bool{"ioerror_error": false, "ioerror_sound": true} {
		if _, err := device(t, "/dev/mapper/"+name, os.O_WRONLY|unix.O_DIRECT).WriteAt(buffer, 8*block); (err == nil) != isSound {
			t.Errorf("write to %s: %v", name, err)
		}
	}
	check(t, "dm-error", w.Faults(failing), ioerror.Report{Count: 1, First: ioerror.Fault{Op: ioerror.Write, Sector: 64, Sectors: 32, Errno: unix.EIO}})
	check(t, "a sound device", w.Faults(sound), ioerror.Report{})

	file := device(t, "/dev/mapper/ioerror_flakey", os.O_WRONLY)
	if err := file.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("flush: %v", err)
	}
	check(t, "flush", w.Faults(lying), ioerror.Report{Count: 1, First: ioerror.Fault{Op: ioerror.Flush, Errno: unix.EIO}})
	// Written by the kernel, some time later.
	if _, err := file.WriteAt(make([]byte, block), 0); err != nil {
		t.Error(err)
	}
	if err := file.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("fsync: %v", err)
	}
	if got := w.Faults(lying); got.Count < 2 || got.Incomplete {
		t.Errorf("a page written back: %+v", got)
	}
}

// More faults than there is room for, while nobody reads what is recorded.
func TestVMManyFaultsBlockNobodyAndAreNotLostSilently(t *testing.T) {
	const faults = 10000
	w := open(t)
	failing := mapping(t, "ioerror_error", "0 2048 error")
	file := device(t, "/dev/mapper/ioerror_error", os.O_RDONLY|unix.O_DIRECT)
	buffer := aligned(t, block)
	fail := func() {
		t.Helper()
		for i := range int64(faults) {
			if _, err := file.ReadAt(buffer, i%128*block); !errors.Is(err, unix.EIO) {
				t.Fatalf("read %d: %v", i, err)
			}
		}
	}
	w.Watch(failing, nil)
	fail()
	got := w.Faults(failing)
	t.Logf("read meanwhile: %+v", got)
	if got.Count > faults || got.Count < faults && !got.Incomplete || got.First.Sector != 0 {
		t.Errorf("read meanwhile: %+v", got)
	}

	// The first fault's callback keeps the Watcher from reading on.
	told, goOn := make(chan bool), make(chan bool)
	w.Watch(failing, func(ioerror.Fault) {
		told <- true
		<-goOn
	})
	if _, err := file.ReadAt(buffer, 64*block); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	<-told
	fail()
	close(goOn)
	got = w.Faults(failing)
	t.Logf("read afterwards: %+v", got)
	if got.Count >= faults || !got.Incomplete || got.Count < 100 || got.First.Sector != 64*8 {
		t.Errorf("read afterwards: %+v", got)
	}
	// It goes on.
	w.Watch(failing, nil)
	if _, err := file.ReadAt(buffer, 0); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if got := w.Faults(failing); got.Count != 1 || got.Incomplete {
		t.Errorf("the next fault: %+v", got)
	}
}

func TestVMANumberThatIsUsedAgain(t *testing.T) {
	w := open(t)
	buffer := aligned(t, block)
	for round := range 20 {
		name := fmt.Sprintf("ioerror_round%d", round)
		dmsetup(t, "create", name, "--table", "0 2048 error")
		n := number(t, "/dev/mapper/"+name)
		w.Watch(n, nil)
		check(t, "new", w.Faults(n), ioerror.Report{})
		file, err := os.OpenFile("/dev/mapper/"+name, os.O_RDONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		for range round {
			if _, err := file.ReadAt(buffer, 0); !errors.Is(err, unix.EIO) {
				t.Error(err)
			}
		}
		if got := w.Faults(n); got.Count != uint64(round) || got.Incomplete {
			t.Errorf("round %d: %+v", round, got)
		}
		file.Close()
		w.Forget(n)
		dmsetup(t, "remove", "--retry", name)
	}
}

func TestVMWhatAKilledProcessLeftIsTakenOver(t *testing.T) {
	owner := exec.Command("/proc/self/exe")
	owner.Env = append(os.Environ(), asOwner+"=1")
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 100)
	n, err := out.Read(line)
	if err != nil || string(line[:n]) != "open\n" {
		t.Fatalf("%q, %v", line[:n], err)
	}
	if _, err := ioerror.Open(slog.Default()); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "\n") {
		t.Errorf("a second one: %v", err)
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	owner.Wait()
	if left := instances(t); len(left) != 1 {
		t.Errorf("the killed process left %q", left)
	}
	w := open(t)
	failing := mapping(t, "ioerror_error", "0 2048 error")
	w.Watch(failing, nil)
	if _, err := device(t, "/dev/mapper/ioerror_error", os.O_RDONLY|unix.O_DIRECT).ReadAt(aligned(t, block), 0); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if got := w.Faults(failing); got.Count != 1 {
		t.Errorf("got %+v", got)
	}
}
