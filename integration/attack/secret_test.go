//go:build vm

package attack

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// secret is a piece of a volume's key as the test finds it where it must be, in locked memory of the service: 16 bytes, the smallest key.
type secret [16]byte

// region is a range of a process's memory.
type region struct {
	start, end       uint64
	writable, locked bool // locked: neither swapped nor dumped
}

// regions reads /proc/PID/smaps.
func regions(t *testing.T, pid int) (list []region) {
	t.Helper()
	for line := range strings.Lines(string(file(t, fmt.Sprintf("/proc/%d/smaps", pid)))) {
		var r region
		var permissions string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &r.start, &r.end, &permissions); n == 3 {
			r.writable = strings.HasPrefix(permissions, "rw")
			list = append(list, r)
		} else if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok {
			words := strings.Fields(flags)
			list[len(list)-1].locked = slices.Contains(words, "lo") && slices.Contains(words, "dd")
		}
	}
	return list
}

// memory is what a process has in a range. Root may read it; a core dump may not.
func memory(t *testing.T, pid int, r region) []byte {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, r.end-r.start)
	n, err := f.ReadAt(b, int64(r.start))
	if err != nil && !errors.Is(err, unix.EIO) {
		t.Fatal(err)
	}
	return b[:n]
}

// secrets are the keys of the open volumes, each cut into pieces of 16 bytes.
func secrets(t *testing.T, pid int) (found []secret) {
	t.Helper()
	for _, r := range regions(t, pid) {
		if !r.locked {
			continue
		}
		for piece := range slices.Chunk(memory(t, pid, r), len(secret{})) {
			if s := secret(piece); s != (secret{}) {
				found = append(found, s)
			}
		}
	}
	return found
}

// has reports whether memory, or what was written from memory, has a secret, which then is where words are.
func has(memory []byte, keys []secret) bool {
	isKey := map[secret]bool{}
	for _, key := range keys {
		isKey[key] = true
	}
	for at := 0; at+len(secret{}) <= len(memory); at += 8 {
		if s := secret(memory[at:]); s != (secret{}) && isKey[s] {
			return true
		}
	}
	return false
}

// shows complains of text that has a secret, as bytes or in hex.
func (a *arena) shows(where string, in []byte, keys []secret) {
	a.Helper()
	for _, key := range keys {
		text := hex.EncodeToString(key[:])
		for _, form := range [][]byte{key[:], []byte(text), []byte(strings.ToUpper(text))} {
			if bytes.Contains(in, form) {
				a.Errorf("%s shows a key", where)
			}
		}
	}
}

func TestKeysAreInLockedMemoryAndNowhereElse(t *testing.T) {
	a := start(t)
	for pair := range slices.Chunk(kinds, 2) {
		for i, k := range pair {
			a.open(k.name, attacked+i)
			a.works(k.name)
		}
		pid := a.bed.Pid()
		keys := secrets(t, pid)
		t.Logf("%d pieces of keys", len(keys))
		if len(keys) < len(pair) {
			t.Fatalf("%d pieces of the keys of %d volumes", len(keys), len(pair))
		}
		a.search(pid, keys)
		for _, k := range pair {
			a.close(k.name)
		}
		a.search(pid, keys) // kept, to open them again
		if now := secrets(t, pid); !slices.Equal(now, keys) {
			t.Error("the keys of closed volumes are not those that they were")
		}
		if err := a.bed.Destroy(a.within()); err != nil {
			t.Fatal(err)
		}
		a.search(pid, keys)
		if now := secrets(t, pid); len(now) > 0 {
			t.Errorf("%d pieces of keys are there after the end", len(now))
		}
	}
}

// search looks for keys wherever they could have got to.
func (a *arena) search(pid int, keys []secret) {
	a.Helper()
	for _, name := range []string{
		fmt.Sprintf("/proc/%d/cmdline", pid), fmt.Sprintf("/proc/%d/environ", pid), "/proc/keys", "/proc/self/mountinfo", "/proc/crypto",
	} {
		a.shows(name, file(a.T, name), keys)
	}
	a.shows("the log", []byte(a.log.String()), keys)
	mappings, err := filepath.Glob("/dev/mapper/encrypted*")
	if err != nil {
		a.Fatal(err)
	}
	for _, mapping := range mappings {
		for _, flags := range []uint32{0, unix.DM_STATUS_TABLE_FLAG, unix.DM_STATUS_TABLE_FLAG | unix.DM_IMA_MEASUREMENT_FLAG} {
			a.shows("the table of "+mapping, table(a.T, filepath.Base(mapping), flags), keys)
		}
	}
	for _, r := range regions(a.T, pid) {
		if r.writable && !r.locked {
			if has(memory(a.T, pid, r), keys) {
				a.Errorf("memory that is not locked, at %x, has a key", r.start)
			}
		}
	}
	for _, disk := range []int{attacked, second} {
		if has(a.read(disk, 0, 4*mib), keys) {
			a.Errorf("disk %s has a key", pathOf(disk))
		}
	}
	if swaps := string(file(a.T, "/proc/swaps")); strings.Count(swaps, "\n") != 1 {
		a.Errorf("the guest swaps:\n%s", swaps)
	}
}

// table asks the kernel for a mapping's table by the bare ioctl, and returns all that it answers.
func table(t *testing.T, name string, flags uint32) []byte {
	t.Helper()
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	buffer := aligned(16 * block)
	header := (*unix.DmIoctl)(unsafe.Pointer(&buffer[0]))
	*header = unix.DmIoctl{
		Version: [3]uint32{unix.DM_VERSION_MAJOR, 0, 0}, Flags: flags | unix.DM_NOFLUSH_FLAG,
		Data_size: uint32(len(buffer)), Data_start: uint32(unsafe.Sizeof(*header)),
	}
	copy(header.Name[:], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.DM_TABLE_STATUS, uintptr(unsafe.Pointer(header))); errno != 0 {
		t.Fatalf("table of %s: %v", name, errno)
	}
	return buffer
}

func TestAServiceThatCrashesIsNotDumped(t *testing.T) {
	was := file(t, "/proc/sys/kernel/core_pattern")
	t.Cleanup(func() { setCorePattern(t, was) })
	setCorePattern(t, []byte("/run/tmp/dumped.%p"))
	// That a process without the service's care is dumped shows that the test would see it.
	run(t, "sh", "-c", "ulimit -c unlimited; sh -c 'kill -SEGV $$'; rm /run/tmp/dumped.*")

	// Else Go's runtime ends the process without the kernel's help.
	t.Setenv("GOTRACEBACK", "crash")
	dir := t.TempDir()
	a := launch(t, dir)
	// Closed, so that the key is there and nothing outlives the crash but the mount.
	a.open(kinds[0].name, attacked)
	a.close(kinds[0].name)
	if len(secrets(t, a.bed.Pid())) == 0 {
		t.Error("there is no key to lose")
	}
	if err := unix.Kill(a.bed.Pid(), unix.SIGABRT); err != nil {
		t.Fatal(err)
	}
	if status := a.bed.Wait().Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGABRT || status.CoreDump() {
		t.Errorf("ended with %v", status)
	}
	if dumped, err := filepath.Glob("/run/tmp/dumped.*"); err != nil || len(dumped) > 0 {
		t.Errorf("dumped: %q, %v", dumped, err)
	}
	if err := unix.Unmount(filepath.Join(dir, "volumes"), 0); err != nil {
		t.Error(err)
	}
	nothingLeft(t)
}

func setCorePattern(t *testing.T, pattern []byte) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/kernel/core_pattern", pattern, 0); err != nil {
		t.Fatal(err)
	}
}
