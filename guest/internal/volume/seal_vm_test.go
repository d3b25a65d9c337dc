//go:build vm

package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/integration/qmp"
	"github.com/sealvol/sealvol/policy"
)

// The machine has three scratch disks at these places; the file of the first letter is what the host has of it.
var (
	slots   = []string{"02/01", "02/02", "02/03"} // 256, 256 and 64 MiB
	backing = []string{"/run/vmrun/disks/0", "/run/vmrun/disks/1", "/run/vmrun/disks/2"}
)

const block = 4096

// newVM makes a manager, and at the test's end destroys it and makes sure that nothing is left of it.
func newVM(t *testing.T) *Manager {
	t.Helper()
	before := goleak.IgnoreCurrent()
	descriptors := openDescriptors(t)
	m, err := New(Config{Dir: t.TempDir(), Tools: filesystem.Tools{Ext4: "/usr/sbin/mkfs.ext4", XFS: "/usr/sbin/mkfs.xfs"}, Cryptsetup: "/usr/sbin/cryptsetup", Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := m.Destroy(ctx); err != nil {
			t.Error(err)
		}
		if left := leftOver(t); len(left) > 0 {
			t.Errorf("left over: %q", left)
		}
		if now := openDescriptors(t); !slices.Equal(now, descriptors) {
			t.Errorf("open files were %q, are %q", descriptors, now)
		}
		goleak.VerifyNone(t, before)
	})
	return m
}

// leftOver lists what sealing may not leave in the kernel.
func leftOver(t *testing.T) (left []string) {
	t.Helper()
	for _, pattern := range []string{"/sys/block/dm-*", "/sys/block/loop*/loop/backing_file", "/dev/mapper/encrypted*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	for _, file := range []string{"/proc/self/mountinfo", "/proc/keys"} {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			if strings.Contains(line, "encrypted_disk") || strings.Contains(line, "sealvol") {
				left = append(left, line)
			}
		}
	}
	return left
}

func openDescriptors(t *testing.T) (open []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		to, err := os.Readlink("/proc/self/fd/" + entry.Name())
		// Not what the runtime and the test binary open when they like.
		if err == nil && !strings.HasPrefix(to, "anon_inode:") && !strings.HasPrefix(to, "/proc/") && !strings.Contains(to, "virtio-ports") && !strings.Contains(to, "/vport") {
			open = append(open, to)
		}
	}
	slices.Sort(open)
	return open
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// seal acquires a volume for a container of its own name.
func seal(t *testing.T, m *Manager, name string, disk int, change ...func(*policy.Volume)) {
	t.Helper()
	s := spec()
	for _, change := range change {
		change(&s)
	}
	if err := m.Acquire(timeout(t, time.Minute), name, name, s, path(t, slots[disk])); err != nil {
		t.Fatal(err)
	}
}

func release(t *testing.T, m *Manager, container string) {
	t.Helper()
	if err := m.Release(timeout(t, time.Minute), container); err != nil {
		t.Fatal(err)
	}
}

// at calls do with the folder where a volume is attached meanwhile.
func at(t *testing.T, m *Manager, name string, do func(dir string)) {
	t.Helper()
	dir, err := m.Attach(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Detach(context.WithoutCancel(t.Context()), name); err != nil {
			t.Fatal(err)
		}
	}()
	do(dir)
}

// content is n blocks of text that differ from one another.
func content(seed string, n int) []byte {
	var b bytes.Buffer
	for i := range n {
		line := fmt.Sprintf("plaintext of %s, block %d. ", seed, i)
		b.Write(bytes.Repeat([]byte(line), block/len(line)+1)[:block])
	}
	return b.Bytes()
}

// write writes a file and has it on the disk.
func write(t *testing.T, file string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// dropCaches makes the guest read everything from the disk again.
func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// verify reads a file block by block. Each read gives the right bytes or EIO; the blocks of the errors are returned.
func verify(t *testing.T, file string, want []byte) (failed []int) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// One block at a time, or readahead fails what is not asked for.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, block)
	for i := range len(want) / block {
		_, err := f.ReadAt(buffer, int64(i)*block)
		switch {
		case errors.Is(err, unix.EIO):
			failed = append(failed, i)
		case err != nil:
			t.Fatalf("block %d of %s: %v", i, file, err)
		case !bytes.Equal(buffer, want[i*block:][:block]):
			t.Fatalf("block %d of %s reads WRONG DATA without an error", i, file)
		}
	}
	return failed
}

// where finds the place of a file's block on the disk, which is the same in every layer.
func where(t *testing.T, file string, index int) int64 {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	number := int32(index)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 1 /* FIBMAP */, uintptr(unsafe.Pointer(&number))); errno != 0 || number == 0 {
		t.Fatalf("FIBMAP: %d, %v", number, errno)
	}
	return int64(number) * block
}

// host is the host's hand on a disk.
func host(t *testing.T, disk int) *os.File {
	t.Helper()
	f, err := os.OpenFile(backing[disk], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func read(t *testing.T, f *os.File, offset int64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, offset); err != nil {
		t.Fatal(err)
	}
	return b
}

func put(t *testing.T, f *os.File, offset int64, b []byte) {
	t.Helper()
	if _, err := f.WriteAt(b, offset); err != nil {
		t.Fatal(err)
	}
}

// small makes a volume of which the machine can look at every byte in a moment.
func small(v *policy.Volume) { v.Size.Max = smallBytes }

const smallBytes = 4 << 20

func eachSuite(t *testing.T, do func(t *testing.T, m *Manager, suite func(*policy.Volume))) {
	for name := range suites {
		t.Run(string(name), func(t *testing.T) {
			do(t, newVM(t), func(v *policy.Volume) { v.Suites = []policy.Suite{name} })
		})
	}
}

func TestVMDataComesBackAndTheDiskHoldsCiphertext(t *testing.T) {
	eachSuite(t, func(t *testing.T, m *Manager, suite func(*policy.Volume)) {
		start := time.Now()
		seal(t, m, "v", 2, suite, small)
		t.Logf("sealed in %v, of it %v without the disk", time.Since(start), m.volumes["v"].ready)
		want := content("needle", 128)
		at(t, m, "v", func(dir string) {
			write(t, filepath.Join(dir, "needle.py"), want)
			dropCaches(t)
			if failed := verify(t, filepath.Join(dir, "needle.py"), want); failed != nil {
				t.Errorf("blocks %v do not read", failed)
			}
		})
		disk := read(t, host(t, 2), 0, smallBytes)
		// Text, the file's name, and what an ext4 superblock has at byte 1024+0x38 and as its last mount point.
		for _, plain := range []string{"plaintext of", "needle", "lost+found", "/volumes/v"} {
			if bytes.Contains(disk, []byte(plain)) {
				t.Errorf("the disk shows %q", plain)
			}
		}
		if binary.LittleEndian.Uint16(disk[1024+0x38:]) == 0xef53 {
			t.Error("the disk shows a superblock")
		}
		status := m.Status()[0]
		t.Log(status)
		at(t, m, "v", func(dir string) {
			var df unix.Statfs_t
			if err := unix.Statfs(dir, &df); err != nil {
				t.Fatal(err)
			}
			if got := status.Usage; got.GetTotalBytes() != df.Blocks*uint64(df.Bsize) || got.UsedBytes < 128*4096 || got.TotalInodes != df.Files {
				t.Errorf("usage %v is not what df shows, %+v", got, df)
			}
		})
		// "aegis128-aesni", "authenc(hmac(sha256-…),xts-aes-aesni)": of what the suite is, whatever the processor has.
		if cipher, _, _ := strings.Cut(status.Suite, "-"); !strings.Contains(status.CipherDriver, cipher) {
			t.Errorf("suite %s has the driver %q", status.Suite, status.CipherDriver)
		}
		if !regexp.MustCompile(`^0 \d+ crypt capi:\S+ :(16|96):logon:sealvol:\w+ 0 253:\d+ 0 2 integrity:32:aead sector_size:4096$`).MatchString(status.Mappings[0].Table) {
			t.Errorf("table %s", status.Mappings[0].Table)
		}
		start = time.Now()
		release(t, m, "v")
		t.Logf("closed in %v", time.Since(start))
	})
}

func TestVMAFlippedBitIsAnError(t *testing.T) {
	eachSuite(t, func(t *testing.T, m *Manager, suite func(*policy.Volume)) {
		seal(t, m, "v", 0, suite)
		seal(t, m, "other", 1, suite)
		want, others := content("v", 64), content("other", 64)
		at(t, m, "other", func(dir string) { write(t, filepath.Join(dir, "f"), others) })
		var first uint64 // sector that fails first
		at(t, m, "v", func(dir string) {
			file := filepath.Join(dir, "f")
			write(t, file, want)
			disk := host(t, 0)
			first = uint64(where(t, file, 33)) / 512
			for _, bit := range []int{0, 8*block/2 + 3, 8*block - 1} {
				offset := where(t, file, 33)
				good := read(t, disk, offset, block)
				bad := bytes.Clone(good)
				bad[bit/8] ^= 1 << (bit % 8)
				put(t, disk, offset, bad)
				dropCaches(t)
				if failed := verify(t, file, want); !slices.Equal(failed, []int{33}) {
					t.Errorf("bit %d flipped: blocks %v fail", bit, failed)
				}
				put(t, disk, offset, good)
				dropCaches(t)
				if failed := verify(t, file, want); failed != nil {
					t.Errorf("bit %d flipped back: blocks %v fail", bit, failed)
				}
			}
		})
		at(t, m, "other", func(dir string) {
			dropCaches(t)
			if failed := verify(t, filepath.Join(dir, "f"), others); failed != nil {
				t.Errorf("blocks %v of another volume fail", failed)
			}
		})
		other, v := m.Status()[0], m.Status()[1]
		if other.State != "open" || other.Faults != nil {
			t.Errorf("another volume: %v", other)
		}
		if f := v.Faults; v.State != "degraded" || f.GetCount() < 3 || f.FirstOperation != "read" || f.FirstSector != first {
			t.Errorf("three flips in the block at sector %d: %s, %v", first, v.State, f)
		}
		release(t, m, "v")
		release(t, m, "other")
	})
}

func TestVMAReplayedOrMovedBlockIsAnError(t *testing.T) {
	eachSuite(t, func(t *testing.T, m *Manager, suite func(*policy.Volume)) {
		seal(t, m, "v", 0, suite)
		before, after := content("yesterday", 64), content("today", 64)
		at(t, m, "v", func(dir string) {
			file := filepath.Join(dir, "f")
			write(t, file, before)
			disk := host(t, 0)
			offset := where(t, file, 7)
			old := read(t, disk, offset, block)
			write(t, file, after)
			if now := where(t, file, 7); now != offset {
				t.Fatalf("block moved from %d to %d", offset, now)
			}
			current := read(t, disk, offset, block)
			if bytes.Equal(old, current) {
				t.Fatal("block is the same ciphertext")
			}
			put(t, disk, offset, old)
			dropCaches(t)
			if failed := verify(t, file, after); !slices.Equal(failed, []int{7}) {
				t.Errorf("replayed: blocks %v fail", failed)
			}
			// Another block's ciphertext, of the same age.
			put(t, disk, offset, read(t, disk, where(t, file, 8), block))
			dropCaches(t)
			if failed := verify(t, file, after); !slices.Equal(failed, []int{7}) {
				t.Errorf("moved: blocks %v fail", failed)
			}
			put(t, disk, offset, current)
		})
		release(t, m, "v")
	})
}

func TestVMOpensAgainWithItsData(t *testing.T) {
	m := newVM(t)
	want := content("v", 128)
	seal(t, m, "v", 2, small)
	at(t, m, "v", func(dir string) {
		// Not synced: closing does that.
		if err := os.WriteFile(filepath.Join(dir, "f"), want, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	for range 3 {
		release(t, m, "v")
		if got := m.Status()[0]; got.State != "closed" || got.Counters.TagBytes == 0 || len(got.Mappings) != 0 {
			t.Errorf("status %v", got)
		}
		start := time.Now()
		seal(t, m, "v", 2, small)
		t.Logf("opened again in %v", time.Since(start))
		at(t, m, "v", func(dir string) {
			if failed := verify(t, filepath.Join(dir, "f"), want); failed != nil {
				t.Errorf("blocks %v do not read", failed)
			}
		})
	}
	release(t, m, "v")
	disk := host(t, 2)
	image := read(t, disk, 0, smallBytes)

	t.Run("data changed meanwhile", func(t *testing.T) {
		seal(t, m, "v", 2, small)
		var offset int64
		at(t, m, "v", func(dir string) { offset = where(t, filepath.Join(dir, "f"), 77) })
		release(t, m, "v")
		changed := read(t, disk, offset, block)
		changed[17] ^= 4
		put(t, disk, offset, changed)
		seal(t, m, "v", 2, small)
		at(t, m, "v", func(dir string) {
			if failed := verify(t, filepath.Join(dir, "f"), want); !slices.Equal(failed, []int{77}) {
				t.Errorf("blocks %v fail", failed)
			}
		})
		release(t, m, "v")
	})

	t.Run("whole disk rolled back meanwhile", func(t *testing.T) {
		put(t, disk, 0, image)
		s := spec()
		small(&s)
		for range 2 { // neither now nor later, whatever the disk holds
			err := m.Acquire(timeout(t, time.Minute), "v", "v", s, path(t, slots[2]))
			if !errdefs.IsDataLoss(err) {
				t.Errorf("opened: %v", err)
			}
			t.Log(err)
		}
		if !bytes.Equal(read(t, disk, 0, smallBytes), image) {
			t.Error("a disk that did not open was written to")
		}
	})
}

func TestVMSizeIsThePolicys(t *testing.T) {
	m := newVM(t)
	const limit = 32 << 20
	disk := host(t, 0)
	rest := bytes.Repeat([]byte("beyond"), 10000)
	put(t, disk, limit, rest)
	seal(t, m, "v", 0, func(v *policy.Volume) { v.Size.Max = limit })
	at(t, m, "v", func(dir string) {
		f, err := os.Create(filepath.Join(dir, "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		n, err := f.ReadFrom(io.LimitReader(zeros{}, 2*limit))
		if !errors.Is(err, unix.ENOSPC) || n > limit || n < limit*95/100 {
			t.Errorf("%d bytes fit: %v", n, err)
		}
	})
	release(t, m, "v")
	if !bytes.Equal(read(t, disk, limit, len(rest)), rest) {
		t.Error("written beyond the limit")
	}
	if err := m.Acquire(t.Context(), "w", "w", func() policy.Volume { s := spec(); s.Size.Min = 1 << 30; return s }(), path(t, slots[1])); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a disk that is too small: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

func TestVMVolumesAreSealedTogether(t *testing.T) {
	m := newVM(t)
	seal(t, m, "warm", 2) // modules, mkfs and its libraries
	release(t, m, "warm")
	start := time.Now()
	seal(t, m, "one", 0)
	alone := time.Since(start)
	release(t, m, "one")
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	m = newVM(t)
	start = time.Now()
	var wg sync.WaitGroup
	for i, name := range []string{"a", "b", "c"} {
		wg.Go(func() {
			if err := m.Acquire(timeout(t, time.Minute), "c", name, spec(), path(t, slots[i])); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("one volume alone %v, three together %v", alone, time.Since(start))
	start = time.Now()
	release(t, m, "c")
	t.Logf("three closed together in %v", time.Since(start))
}

func TestVMRoundsLeaveNothing(t *testing.T) {
	m := newVM(t)
	var lap []time.Duration
	for i := range 20 {
		name := fmt.Sprintf("v%d", i)
		start := time.Now()
		seal(t, m, name, 2)
		lap = append(lap, m.volumes[name].ready)
		at(t, m, name, func(dir string) { write(t, filepath.Join(dir, "f"), content(name, 16)) })
		release(t, m, name)
		t.Logf("round %d: %v, ready in %v", i, time.Since(start), lap[i])
		if left := leftOver(t); slices.ContainsFunc(left, func(s string) bool {
			return !strings.Contains(s, "loop") && !strings.Contains(s, "volumes") // the tags of closed volumes, and the place
		}) {
			t.Fatalf("round %d left %q", i, left)
		}
	}
	slices.Sort(lap)
	t.Logf("ready: median %v, least %v, most %v", lap[len(lap)/2], lap[0], lap[len(lap)-1])
}

func TestVMTakesTheNextSuiteWhenTheKernelHasNot(t *testing.T) {
	m := newVM(t)
	v, err := m.volume("v", spec())
	if err != nil {
		t.Fatal(err)
	}
	v.plan.suites = []suite{{"none", "capi:nosuchcipher-random", 16}, {"neither", "capi:authenc(hmac(nosuchhash),xts(aes))-random", 96}}
	if err := m.Acquire(timeout(t, time.Minute), "v", "v", spec(), path(t, slots[0])); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("none of the suites: %v", err)
	}
	v.plan.suites = append(v.plan.suites, suites[policy.AESXTSRandomHMACSHA256])
	seal(t, m, "v", 0)
	if got := m.Status()[0].Suite; got != string(policy.AESXTSRandomHMACSHA256) {
		t.Errorf("suite %s", got)
	}
	release(t, m, "v")
}

func TestVMTheEndOfTheContextLeavesNothing(t *testing.T) {
	m := newVM(t)
	place := leftOver(t)
	for after := time.Millisecond; ; after += after / 2 {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		err := m.Acquire(ctx, "v", "v", spec(), path(t, slots[0]))
		cancel()
		if err == nil {
			t.Logf("sealed within %v", after)
			break
		}
		if left := leftOver(t); !slices.Equal(left, place) {
			t.Fatalf("after %v, left over: %q", after, left)
		}
		if !errdefs.IsUnavailable(err) {
			t.Errorf("after %v: %v", after, err)
		}
	}
	release(t, m, "v")
}

func TestVMNoPathLeadsToADetachedVolume(t *testing.T) {
	m := newVM(t)
	seal(t, m, "v", 0)
	major, minor, err := m.Number(t.Context(), "v")
	if err != nil {
		t.Fatal(err)
	}
	number := fmt.Sprintf(" %d:%d ", major, minor)
	// mounts counts the volume's mounts in the namespace of a process.
	mounts := func(process any) int {
		table, err := os.ReadFile(fmt.Sprintf("/proc/%v/mountinfo", process))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(table), number)
	}
	container := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(container, 0o700); err != nil {
		t.Fatal(err)
	}
	var elsewhere *exec.Cmd
	for round := range 3 {
		if mounts("self") != round {
			t.Fatalf("round %d: %d mounts", round, mounts("self"))
		}
		at(t, m, "v", func(dir string) {
			table, _ := os.ReadFile("/proc/self/mountinfo")
			if !regexp.MustCompile(regexp.QuoteMeta(" "+dir+" rw,nosuid,nodev,relatime - ext4 /dev/mapper/encrypted_disk_") + `\w{5} `).Match(table) {
				t.Errorf("mount table:\n%s", table)
			}
			// What the agent does, and a mount namespace that is made meanwhile and lives on.
			if err := unix.Mount(dir, container, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			if round > 0 {
				return
			}
			elsewhere = exec.Command("unshare", "--mount", "sh", "-c", "umount "+container+"; echo; exec sleep 1000")
			out, err := elsewhere.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := elsewhere.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := out.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if mounts(elsewhere.Process.Pid) != 1 {
				t.Error("the other namespace has no copy to lose")
			}
		})
		if mounts(elsewhere.Process.Pid) != 0 {
			t.Error("another namespace keeps the mount")
		}
		write(t, filepath.Join(container, "f"), content("v", 4)) // still there
	}
	elsewhere.Process.Kill()
	elsewhere.Wait()
	for range 2 {
		if err := unix.Unmount(container, 0); err != nil {
			t.Fatal(err)
		}
	}

	// A container that does not go.
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err = m.Release(ctx, "v")
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "still mounted by process ") || strings.Contains(err.Error(), "\n") {
		t.Errorf("closed a volume that is mounted elsewhere: %v", err)
	}
	t.Logf("%v after %v", err, time.Since(start))
	if got := m.Status()[0]; got.State != "failed" {
		t.Errorf("status %v", got)
	}
	if err := unix.Unmount(container, 0); err != nil {
		t.Fatal(err)
	}
}

func TestVMAnUnpluggedDiskIsTheVolumesEnd(t *testing.T) {
	m := newVM(t)
	seal(t, m, "other", 0)
	seal(t, m, "v", 1)
	at(t, m, "v", func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "f"), content("v", 256), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	unplug(t, 1)
	start := time.Now()
	err := m.Release(timeout(t, time.Minute), "v")
	if !errdefs.IsDataLoss(err) {
		t.Errorf("closed: %v", err)
	}
	t.Logf("%v after %v", err, time.Since(start))
	plug(t, 1, slots[1])
	if err := m.Acquire(timeout(t, time.Minute), "v", "v", spec(), path(t, slots[1])); !errdefs.IsDataLoss(err) {
		t.Errorf("opened again: %v", err)
	}
	at(t, m, "other", func(dir string) { write(t, filepath.Join(dir, "f"), content("other", 256)) })
	release(t, m, "other")
}

func TestVMWaitsForTheDiskAndFindsItElsewhereAndBigger(t *testing.T) {
	m := newVM(t)
	want := content("v", 64)
	seal(t, m, "v", 1)
	at(t, m, "v", func(dir string) { write(t, filepath.Join(dir, "f"), want) })
	release(t, m, "v")
	unplug(t, 1)
	if err := qemu(t).Execute("block_resize", map[string]any{"node-name": qmp.ID(1), "size": 320 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := m.Acquire(timeout(t, 500*time.Millisecond), "v", "v", spec(), path(t, slots[1])); !errdefs.IsUnavailable(err) {
		t.Errorf("no disk: %v", err)
	}
	plugged := make(chan time.Time)
	go func() {
		time.Sleep(300 * time.Millisecond)
		plug(t, 1, "02/09")
		plugged <- time.Now()
	}()
	err := m.Acquire(timeout(t, time.Minute), "v", "v", spec(), path(t, "02/09"))
	ready := time.Now()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("open %v after QEMU had plugged it in", ready.Sub(<-plugged))
	if v := m.volumes["v"]; v.disk.Bytes != 320<<20 || v.bytes != 256<<20 {
		t.Errorf("volume of %d bytes on a disk of %d", v.bytes, v.disk.Bytes)
	}
	at(t, m, "v", func(dir string) {
		if failed := verify(t, filepath.Join(dir, "f"), want); failed != nil {
			t.Errorf("blocks %v do not read", failed)
		}
	})
	release(t, m, "v")
	unplug(t, 1)
	plug(t, 1, slots[1])
}

// qemu is the host that plugs disks in.
func qemu(t *testing.T) *qmp.Monitor {
	t.Helper()
	monitor, err := qmp.Open()
	if err != nil {
		t.Fatal(err)
	}
	return monitor
}

func unplug(t *testing.T, disk int) {
	t.Helper()
	if err := qemu(t).Unplug(disk); err != nil {
		t.Error(err)
	}
}

func plug(t *testing.T, disk int, path string) {
	t.Helper()
	if err := qemu(t).Plug(disk, path); err != nil {
		t.Error(err)
	}
}
