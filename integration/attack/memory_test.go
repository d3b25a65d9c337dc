//go:build vm

package attack

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tagFiles opens the files in which the service keeps the tags of its volumes.
func (a *arena) tagFiles() (files []*os.File) {
	a.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", a.bed.Pid()))
	if err != nil {
		a.Fatal(err)
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(to, "/#") {
			continue
		}
		f, err := os.OpenFile(link, os.O_RDWR, 0)
		if err != nil {
			a.Fatal(err)
		}
		info, err := f.Stat()
		if err != nil {
			a.Fatal(err)
		}
		// A header of luks2 is smaller than what a store has beside the tags themselves.
		if info.Size() <= 16*mib {
			f.Close()
			continue
		}
		files = append(files, f)
	}
	if len(files) == 0 {
		a.Fatal("the service has no file of tags")
	}
	return files
}

// The service bounds the store so that this cannot happen; here somebody else has taken the memory.
func TestATagStoreThatCannotGrowIsTheVolumesEnd(t *testing.T) {
	for _, k := range kinds {
		if !k.tagsInMemory() {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			a := start(t)
			a.kind = k
			want := content("file", 64)
			a.open(a.name, attacked)
			tags := a.tagFiles()[0]
			defer tags.Close()
			a.at(a.name, func(dir string) {
				a.write(filepath.Join(dir, "f"), want)
				takeRest(t, tags)
				if err := write(filepath.Join(dir, "g"), content("more", int(a.bytes)/block/2)); !damage(err) {
					t.Errorf("written without place for tags: %v", err)
				}
				t.Logf("%d of 64 blocks fail", len(verify(t, filepath.Join(dir, "f"), want)))
			})
			a.closeLost(a.name, attacked)
			a.open(a.name+secondOf, second)
			a.works(a.name + secondOf)
		})
	}
}

// takeRest fills the file system of a file, beyond the file's end.
func takeRest(t *testing.T, f *os.File) {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	take := func(at, length int64) error {
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, at, length)
	}
	end := info.Size() + int64(st.Bavail)*st.Bsize
	if err := take(info.Size(), end-info.Size()); err != nil {
		t.Fatal(err)
	}
	// What was counted as used for a moment, while the kernel allocated it in vain.
	for err := error(nil); !errors.Is(err, unix.ENOSPC); end += st.Bsize {
		if err = take(end, st.Bsize); err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}

func TestAGuestShortOfMemoryKeepsDataAndSwapsNoSecrets(t *testing.T) {
	// A guest that swaps is refused; this one swaps to show that nothing of ours would go there.
	const swapped = 32 * mib
	swapDevice := device(t, swap)
	run(t, "mkswap", swapDevice)
	a := start(t)
	disks := []int{attacked, second, beside, small, large} // of all sizes; the last kind, xfs, takes 64 MiB
	for i, k := range kinds {
		a.open(k.name, disks[i])
	}
	run(t, "swapon", swapDevice)
	t.Cleanup(func() { run(t, "swapoff", swapDevice) })
	ballast := press(t, swapped)
	var wg sync.WaitGroup
	for _, k := range kinds {
		wg.Go(func() {
			want := content(k.name, int(k.bytes)/block/2)
			a.at(k.name, func(dir string) {
				a.write(filepath.Join(dir, "f"), want)
				a.same("short of memory", verify(t, filepath.Join(dir, "f"), want), nil)
			})
		})
	}
	wg.Wait()
	ballast.free(t)
	a.pageOut()
	keys := secrets(t, a.bed.Pid())
	for _, tags := range a.tagFiles() {
		keys = append(keys, sample(t, tags)...)
		tags.Close()
	}
	if text := searchSwap(t, swapDevice, keys, "package agent_policy\n"); !text {
		t.Error("the service's memory was not swapped")
	}
}

// pageOut has all memory of the service swapped that may be.
func (a *arena) pageOut() {
	a.Helper()
	process, err := unix.PidfdOpen(a.bed.Pid(), 0)
	if err != nil {
		a.Fatal(err)
	}
	defer unix.Close(process)
	for _, r := range regions(a.T, a.bed.Pid()) {
		if !r.writable || r.locked {
			continue
		}
		memory := struct{ start, length uint64 }{r.start, r.end - r.start}
		if _, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(process), uintptr(unsafe.Pointer(&memory)), 1, unix.MADV_PAGEOUT, 0, 0); errno != 0 {
			a.Fatalf("page out %x: %v", r.start, errno)
		}
	}
}

// searchSwap looks for secrets in what is swapped, where they would be as they are in memory, and for a text that is no secret.
func searchSwap(t *testing.T, device string, keys []secret, text string) (found bool) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for piece := aligned(mib); ; {
		n, err := f.Read(piece)
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		found = found || bytes.Contains(piece[:n], []byte(text))
		if has(piece[:n], keys) {
			t.Error("a secret was swapped")
		}
	}
}

// sample takes one tag from each page that a file of tags has.
func sample(t *testing.T, f *os.File) (tags []secret) {
	t.Helper()
	for at := int64(0); ; at += block {
		var err error
		if at, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA); err != nil {
			break
		}
		var tag secret
		if _, err := f.ReadAt(tag[:], at+32*17); err != nil {
			t.Fatal(err)
		}
		if tag != (secret{}) {
			tags = append(tags, tag)
		}
	}
	if len(tags) == 0 {
		t.Error("no tags to look for")
	}
	return tags
}

// ballast is memory that is taken away.
type ballast [][]byte

// press takes memory until some of it is swapped.
func press(t *testing.T, swapped int64) (b ballast) {
	t.Helper()
	for free := meminfo(t, "SwapFree"); free-meminfo(t, "SwapFree") < swapped; {
		piece, err := unix.Mmap(-1, 0, 8*mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, piece)
	}
	return b
}

func (b ballast) free(t *testing.T) {
	t.Helper()
	for _, piece := range b {
		if err := unix.Munmap(piece); err != nil {
			t.Error(err)
		}
	}
}

// meminfo is a line of /proc/meminfo, in bytes.
func meminfo(t *testing.T, key string) int64 {
	t.Helper()
	for line := range strings.Lines(string(file(t, "/proc/meminfo"))) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatalf("meminfo has no %s", key)
	return 0
}
