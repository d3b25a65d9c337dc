//go:build vm

package attack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tagFile opens the file in which the service keeps the tags of its only volume.
func (a *arena) tagFile() *os.File {
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
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			a.Fatal(err)
		}
		if st.Type == unix.TMPFS_MAGIC {
			return f
		}
		f.Close()
	}
	a.Fatal("the service has no file of tags")
	return nil
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
			tags := a.tagFile()
			defer tags.Close()
			a.at(a.name, func(dir string) {
				a.write(filepath.Join(dir, "f"), want)
				takeRest(t, tags)
				if err := write(filepath.Join(dir, "g"), content("more", 512)); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EROFS) {
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
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, info.Size(), int64(st.Bavail)*st.Bsize); err != nil {
		t.Fatal(err)
	}
}

func TestAGuestShortOfMemoryKeepsDataAndSwapsNoSecrets(t *testing.T) {
	// A guest that swaps is refused; this one swaps to show that nothing of ours would go there.
	const swapped = 32 * mib
	swapDevice := device(t, swap)
	run(t, "mkswap", swapDevice)
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			a := start(t)
			a.kind = k
			a.open(a.name+largeOf, large)
			run(t, "swapon", swapDevice)
			t.Cleanup(func() { run(t, "swapoff", swapDevice) })
			want := content("file", 24*mib/block)
			a.at(a.name+largeOf, func(dir string) {
				ballast := press(t, swapped)
				a.write(filepath.Join(dir, "f"), want)
				a.same("short of memory", verifyCold(t, filepath.Join(dir, "f"), want), nil)
				ballast.free(t)
			})
			image := file(t, hostFile(swap))
			if !bytes.Contains(image, []byte(ballastText)) {
				t.Error("nothing was swapped")
			}
			a.shows("the swap area", image, secrets(t, a.bed.Pid()))
			if a.tagsInMemory() {
				tags := a.tagFile()
				defer tags.Close()
				a.shows("the swap area", image, sample(t, tags))
			}
			a.close(a.name + largeOf)
		})
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

// ballastText is what the memory holds that is taken away.
const ballastText = "ballast in a guest that is short of memory"

type ballast [][]byte

// press takes memory until some of it is swapped.
func press(t *testing.T, swapped int64) (b ballast) {
	t.Helper()
	for free := meminfo(t, "SwapFree"); free-meminfo(t, "SwapFree") < swapped; {
		piece, err := unix.Mmap(-1, 0, 8*mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		for page := 0; page < len(piece); page += block {
			copy(piece[page:], ballastText)
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
