//go:build vm

package luks2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/loop"
)

const (
	cryptsetup = "/usr/sbin/cryptsetup"
	// cutBytes is how much of a scratch disk is used: as much as the machine looks through in a moment.
	cutBytes = 8 << 20
	minute   = time.Minute
)

// The machine's first two scratch disks: where they are, and what the host has of them.
var (
	slots   = []string{"02/01", "02/02"}
	backing = []string{"/run/vmrun/disks/0", "/run/vmrun/disks/1"}
)

// vm is a Tool of the real cryptsetup and the devices below its volumes.
type vm struct {
	*Tool
	t       *testing.T
	control *devmapper.Control
}

// newVM makes sure at the test's end that nothing is left.
func newVM(t *testing.T) *vm {
	t.Helper()
	control, err := devmapper.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		control.Close()
		if left := leftOver(t); len(left) > 0 {
			t.Errorf("left over: %q", left)
		}
	})
	return &vm{Tool: New(cryptsetup, control), t: t, control: control}
}

func leftOver(t *testing.T) (left []string) {
	t.Helper()
	for _, pattern := range []string{"/sys/block/dm-*", "/sys/block/loop*/loop/backing_file", "/dev/mapper/[^c]*", "/run/cryptsetup"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	keys, err := os.ReadFile("/proc/keys")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(keys)) {
		if strings.Contains(line, "cryptsetup") || strings.Contains(line, "logon") {
			left = append(left, line)
		}
	}
	return left
}

func (m *vm) timeout() context.Context {
	ctx, cancel := context.WithTimeout(m.t.Context(), minute)
	m.t.Cleanup(cancel)
	return ctx
}

// cut makes a device of the first bytes of a disk until the test's end, and fills it with what the host likes.
func (m *vm) cut(disk int) devmapper.Device {
	m.t.Helper()
	address, err := device.Parse("blk", slots[disk])
	if err != nil {
		m.t.Fatal(err)
	}
	found, err := device.Find("/sys", address)
	if err != nil {
		m.t.Fatal(err)
	}
	put(m.t, m.host(disk), bytes.Repeat([]byte("host"), cutBytes/4), 0)
	return m.linear(fmt.Sprintf("cut%d", disk), found.Number, cutBytes)
}

func (m *vm) linear(name string, below blockdev.Number, length uint64) devmapper.Device {
	m.t.Helper()
	device, err := m.control.Create(m.timeout(), name, "", length, devmapper.Linear{Device: below})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { m.remove(name) })
	return device
}

func (m *vm) remove(names ...string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), minute)
	defer cancel()
	for _, name := range names {
		if err := m.control.Remove(ctx, name); err != nil {
			m.t.Error(err)
		}
	}
}

// host is the host's hand on a disk.
func (m *vm) host(disk int) *os.File {
	m.t.Helper()
	f, err := os.OpenFile(backing[disk], os.O_RDWR, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { f.Close() })
	return f
}

func snapshot(t *testing.T, disk *os.File) []byte {
	t.Helper()
	b := make([]byte, cutBytes)
	if _, err := disk.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func (m *vm) format(device devmapper.Device, key *keyring.Key) *Header {
	m.t.Helper()
	start := time.Now()
	header, err := m.Format(m.timeout(), device, key)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { header.Close() })
	m.t.Logf("formatted %d MiB in %v", device.Bytes>>20, time.Since(start))
	return header
}

func (m *vm) open(device devmapper.Device, header *Header, key *keyring.Key) Mappings {
	m.t.Helper()
	start := time.Now()
	mappings, err := m.Open(m.timeout(), "v", device, header, key)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Logf("opened in %v", time.Since(start))
	return mappings
}

// close is what who uses the package does to close a volume.
func (m *vm) close() { m.t.Helper(); m.remove("v", "v_dif") }

// direct opens the plaintext past the page cache.
func direct(t *testing.T, mappings Mappings) *os.File {
	t.Helper()
	f, err := os.OpenFile(mappings.Crypt.Node(), os.O_RDWR|unix.O_DIRECT|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// page is memory of whole blocks, aligned as O_DIRECT wants it.
func page(t *testing.T, blocks int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, blocks*BlockBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// content is n blocks of text that differ from one another.
func content(t *testing.T, seed string, n int) []byte {
	t.Helper()
	b := page(t, n)
	for i := range n {
		line := fmt.Sprintf("plaintext of %s, block %d. ", seed, i)
		copy(b[i*BlockBytes:], bytes.Repeat([]byte(line), BlockBytes/len(line)+1)[:BlockBytes])
	}
	return b
}

func write(t *testing.T, mappings Mappings, data []byte) {
	t.Helper()
	f := direct(t, mappings)
	defer f.Close()
	put(t, f, data, 0)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// verify reads block by block. Each read gives the right bytes or EILSEQ; the blocks of the errors are returned.
func verify(t *testing.T, mappings Mappings, want []byte) (failed []int) {
	t.Helper()
	f := direct(t, mappings)
	defer f.Close()
	buffer := page(t, 1)
	for i := range len(want) / BlockBytes {
		_, err := f.ReadAt(buffer, int64(i)*BlockBytes)
		switch {
		case errors.Is(err, unix.EILSEQ):
			failed = append(failed, i)
		case err != nil:
			t.Fatalf("block %d: %v", i, err)
		case !bytes.Equal(buffer, want[i*BlockBytes:][:BlockBytes]):
			t.Fatalf("block %d reads WRONG DATA without an error", i)
		}
	}
	return failed
}

func TestVMDataComesBackAndTheDiskHoldsCiphertext(t *testing.T) {
	m := newVM(t)
	device, disk := m.cut(0), m.host(0)
	key := newKey(t, KeyBytes)
	header := m.format(device, key)
	want := content(t, "v", 64)
	mappings := m.open(device, header, key)
	if failed := verify(t, mappings, want); len(failed) != 64 {
		t.Errorf("of 64 blocks that were never written %d fail", len(failed))
	}
	write(t, mappings, want)
	for range 2 {
		if failed := verify(t, mappings, want); failed != nil {
			t.Errorf("blocks %v fail", failed)
		}
		m.close()
		raw := snapshot(t, disk)
		for _, plain := range []string{"plaintext of", "LUKS", "aes-xts"} {
			if bytes.Contains(raw, []byte(plain)) {
				t.Errorf("the disk shows %q", plain)
			}
		}
		mappings = m.open(device, header, key)
	}
	m.close()
	t.Logf("%d of %d bytes are the volume's", mappings.Crypt.Bytes, device.Bytes)
}

func TestVMIsWhatCryptsetupShows(t *testing.T) {
	m := newVM(t)
	device, key := m.cut(0), newKey(t, KeyBytes)
	header := m.format(device, key)
	mappings := m.open(device, header, key)
	defer m.close()

	lower, err := m.control.Table("v_dif")
	if err != nil || !regexp.MustCompile(`^0 \d+ integrity `+device.Number.String()+` 0 32 D \d block_size:4096 `).MatchString(lower) {
		t.Errorf("%q, %v", lower, err)
	}
	upper, err := m.control.Table("v")
	if err != nil || !strings.Contains(upper, " :96:logon:cryptsetup:"+header.Metadata().UUID()+"-d0 0 "+mappings.Integrity.Number.String()+" 0 ") {
		t.Errorf("%q, %v", upper, err)
	}
	t.Log(lower, "\n", upper)

	// Without a header cryptsetup has only the tables to look at.
	status := exec.CommandContext(m.timeout(), cryptsetup, "status", "--disable-locks", "--header="+headerFile, "v")
	status.ExtraFiles = []*os.File{header.file}
	output, err := status.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	for _, line := range []string{"type: LUKS2", "cipher: aes-xts-plain64", "integrity: hmac(sha256)", "sector size: 4096", "key location: keyring", "device: /dev/mapper/v_dif"} {
		if !strings.Contains(strings.Join(strings.Fields(string(output)), " "), line) {
			t.Errorf("no %q in\n%s", line, output)
		}
	}
	dump := exec.CommandContext(m.timeout(), cryptsetup, "luksDump", "--disable-locks", headerFile)
	dump.ExtraFiles = []*os.File{header.file}
	if output, err := dump.CombinedOutput(); err != nil || !bytes.Contains(output, []byte(header.Metadata().UUID())) {
		t.Errorf("%v\n%s", err, output)
	}
}

func TestVMAFlippedBitIsAnError(t *testing.T) {
	m := newVM(t)
	device, disk, key := m.cut(0), m.host(0), newKey(t, KeyBytes)
	header := m.format(device, key)
	mappings := m.open(device, header, key)
	want := content(t, "v", 8)
	write(t, mappings, want)
	before := snapshot(t, disk)
	again := page(t, 1)
	copy(again, want[5*BlockBytes:])
	again[0] ^= 1
	f := direct(t, mappings)
	put(t, f, again, 5*BlockBytes)
	f.Close()
	copy(want[5*BlockBytes:], again)
	m.close()
	// What changed on the disk: the block's ciphertext and the tags around its own.
	after := snapshot(t, disk)
	var changed []int
	for at := 0; at < cutBytes; at += BlockBytes {
		if !bytes.Equal(before[at:][:BlockBytes], after[at:][:BlockBytes]) {
			changed = append(changed, at)
		}
	}
	if len(changed) != 2 {
		t.Fatalf("%v changed on the disk, want a block and its tag", changed)
	}
	for _, at := range changed {
		for _, offset := range firstDifferences(before[at:][:BlockBytes], after[at:][:BlockBytes]) {
			bad := []byte{after[at+offset] ^ 0x10}
			put(t, disk, bad, int64(at+offset))
			mappings = m.open(device, header, key)
			if failed := verify(t, mappings, want); !slices.Equal(failed, []int{5}) {
				t.Errorf("bit of byte %d flipped: blocks %v fail", at+offset, failed)
			}
			m.close()
			put(t, disk, after[at+offset:][:1], int64(at+offset))
		}
	}
	// Back to what it was in the ciphertext alone, and in the tag alone.
	for _, at := range changed {
		put(t, disk, before[at:][:BlockBytes], int64(at))
		mappings = m.open(device, header, key)
		if failed := verify(t, mappings, want); !slices.Equal(failed, []int{5}) {
			t.Errorf("old bytes at %d: blocks %v fail", at, failed)
		}
		m.close()
		put(t, disk, after[at:][:BlockBytes], int64(at))
	}
	mappings = m.open(device, header, key)
	if failed := verify(t, mappings, want); failed != nil {
		t.Errorf("all as it was: blocks %v fail", failed)
	}
	m.close()
}

// firstDifferences are the first and the last byte in which two blocks differ.
func firstDifferences(a, b []byte) []int {
	var at []int
	for i := range a {
		if a[i] != b[i] {
			at = append(at, i)
		}
	}
	return []int{at[0], at[len(at)-1]}
}

// What this layering cannot stop, and what memory-tags is for: the host puts back the disk of yesterday, tags and all, and nobody notices.
func TestVMAReplayedDiskIsAccepted(t *testing.T) {
	m := newVM(t)
	device, disk, key := m.cut(0), m.host(0), newKey(t, KeyBytes)
	header := m.format(device, key)
	yesterday, today := content(t, "yesterday", 16), content(t, "today", 16)
	mappings := m.open(device, header, key)
	write(t, mappings, yesterday)
	old := snapshot(t, disk)
	write(t, mappings, today)
	if failed := verify(t, mappings, today); failed != nil {
		t.Fatalf("blocks %v fail", failed)
	}
	m.close()
	put(t, disk, old, 0)
	mappings = m.open(device, header, key)
	if failed := verify(t, mappings, yesterday); failed != nil {
		t.Errorf("replay is detected in blocks %v: say so in SECURITY.md", failed)
	}
	m.close()
}

func TestVMAnotherVolumesDiskIsAnError(t *testing.T) {
	m := newVM(t)
	one, other := m.cut(0), m.cut(1)
	key, otherKey := newKey(t, KeyBytes), newKey(t, KeyBytes)
	header, otherHeader := m.format(one, key), m.format(other, otherKey)
	want := content(t, "v", 8)
	write(t, m.open(one, header, key), want)
	m.close()
	write(t, m.open(other, otherHeader, otherKey), want)
	m.close()
	mappings := m.open(other, header, key)
	if failed := verify(t, mappings, want); len(failed) != 8 {
		t.Errorf("only blocks %v fail", failed)
	}
	m.close()
	if _, err := m.Open(m.timeout(), "v", one, header, otherKey); !errdefs.IsUnauthorized(err) {
		t.Errorf("another volume's key: %v", err)
	}
}

func TestVMAHeaderThatWasChangedIsNotOpened(t *testing.T) {
	m := newVM(t)
	device, key := m.cut(0), newKey(t, KeyBytes)
	header := m.format(device, key)
	raw := make([]byte, metadataBytes)
	if _, err := header.file.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	// This one cryptsetup would open, and write plaintext with it.
	null := strings.Replace(jsonText(t, raw), `"encryption":"aes-xts-plain64","sector`, `"encryption":"cipher_null-ecb","sector`, 1)
	put(t, header.file, withJSON(t, bytes.Clone(raw), null), 0)
	if _, err := m.Open(m.timeout(), "v", device, header, key); !errors.Is(err, ErrCipher) || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("null cipher: %v", err)
	}
	put(t, header.file, raw, 0)
	// A keyslot that does not hold the key of the digest is a wrong key.
	put(t, header.file, []byte("damaged"), metadataBytes+1000)
	if _, err := m.Open(m.timeout(), "v", device, header, key); !errdefs.IsUnauthorized(err) {
		t.Errorf("damaged keyslot: %v", err)
	}
}

// The superblock is on the disk: its fields are the host's.
func TestVMASuperblockThatWasChangedIsRefusedOrHarmless(t *testing.T) {
	const (
		atTagSize, atJournal, atLength, atFlags, atBlock = 10, 12, 16, 24, 28 // struct superblock of dm-integrity
	)
	m := newVM(t)
	device, disk, key := m.cut(0), m.host(0), newKey(t, KeyBytes)
	header := m.format(device, key)
	mappings := m.open(device, header, key)
	want := content(t, "v", 4)
	write(t, mappings, want)
	m.close()
	good := snapshot(t, disk)
	for name, change := range map[string]func(b []byte){
		"zeros":                  func(b []byte) { clear(b) },
		"flag: MAC of a journal": func(b []byte) { b[atFlags] |= 0x01 },
		"flag: recalculate":      func(b []byte) { b[atFlags] |= 0x02 },
		"flag: bitmap":           func(b []byte) { b[atFlags] |= 0x04 },
		"flag: padding":          func(b []byte) { b[atFlags] &^= 0x08 },
		"flag: HMAC":             func(b []byte) { b[atFlags] |= 0x10 },
		"flag: inline":           func(b []byte) { b[atFlags] |= 0x20 },
		"version":                func(b []byte) { b[8] = 5 },
		"interleaving":           func(b []byte) { b[9] = 3 },
		"size of a tag":          func(b []byte) { b[atTagSize] = 4 },
		"no journal":             func(b []byte) { clear(b[atJournal:][:4]) },
		"longer journal":         func(b []byte) { b[atJournal+1]++ },
		"shorter":                func(b []byte) { b[atLength]-- },
		"longer than the disk":   func(b []byte) { b[atLength+4]++ },
		"size of a block":        func(b []byte) { b[atBlock] = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			bad := bytes.Clone(good[:BlockBytes])
			change(bad)
			put(t, disk, bad, 0)
			defer func() { put(t, disk, good, 0) }()
			mappings, err := m.Open(m.timeout(), "v", device, header, key)
			if err != nil {
				t.Log(err)
				return
			}
			t.Logf("opened; blocks %v fail", verify(t, mappings, want)) // and none reads wrong data
			m.close()
		})
	}
	mappings = m.open(device, header, key)
	if failed := verify(t, mappings, want); failed != nil {
		t.Errorf("all as it was: blocks %v fail", failed)
	}
	m.close()
}

func TestVMFormatRemovesWhatAKilledOneLeft(t *testing.T) {
	m := newVM(t)
	device, key := m.cut(0), newKey(t, KeyBytes)
	if _, err := m.control.Create(m.timeout(), "temporary-cryptsetup-test", "", cutBytes, devmapper.Linear{Device: device.Number}); err != nil {
		t.Fatal(err)
	}
	// It is in the way of this one, which fails.
	if _, err := m.Format(m.timeout(), device, key); err == nil {
		t.Error("formatted a device that is in use")
	}
	m.format(device, key)
}

func TestVMTheEndOfTheContextLeavesNothing(t *testing.T) {
	m := newVM(t)
	device, key := m.cut(0), newKey(t, KeyBytes)
	header := m.format(device, key)
	for i := range 12 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*50*time.Millisecond)
		if h, err := m.Format(ctx, device, key); err == nil {
			h.Close()
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		cancel()
		ctx, cancel = context.WithTimeout(t.Context(), time.Duration(i)*50*time.Millisecond)
		if _, err := m.Open(ctx, "v", device, header, key); err == nil {
			m.close()
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		cancel()
		if left, err := filepath.Glob("/sys/block/dm-*"); err != nil || len(left) != 1 {
			t.Fatalf("after %d: %v, %v; want the one under the volume", i, left, err)
		}
	}
}

func TestVMReadyTimeOfASparseGibibyte(t *testing.T) {
	m := newVM(t)
	file, err := os.CreateTemp("/dev/shm", "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if err := file.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	disk, err := loop.Attach(m.timeout(), file, BlockBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Close() })
	device, key := m.linear("cut", disk.Number, 1<<30), newKey(t, KeyBytes)
	for range 3 {
		header := m.format(device, key)
		mappings := m.open(device, header, key)
		t.Logf("%d of %d bytes are the volume's", mappings.Crypt.Bytes, device.Bytes)
		m.close()
	}
}
