//go:build vm

package attack

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const block = 4096

// content is n blocks of text that differ from one another.
func content(seed string, n int) []byte {
	var b bytes.Buffer
	for i := range n {
		line := fmt.Sprintf("plaintext of %s, block %d. ", seed, i)
		b.Write(bytes.Repeat([]byte(line), block/len(line)+1)[:block])
	}
	return b.Bytes()
}

// write writes a file, over what is there, and has it on the disk.
func write(file string, data []byte) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(data, 0); err != nil {
		return err
	}
	return f.Sync()
}

// fill writes a file into all the space that there is, and returns what it holds.
func fill(t *testing.T, file string) []byte {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var held []byte
	for {
		piece := content(fmt.Sprint("piece ", len(held)), 64)
		n, err := f.Write(piece)
		held = append(held, piece[:n-n%block]...)
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(len(held))); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return held
}

// dropCaches makes the guest read everything from the disk again, the file system's own blocks, too. It is slow: programs are also read again.
func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// damage are the errors by which a program learns of damage: from the page cache, from the bare device, from the file system's own checks, and
// when there was no place for a tag.
func damage(err error) bool {
	for _, errno := range []unix.Errno{unix.EIO, unix.EILSEQ, unix.EBADMSG, unix.EUCLEAN, unix.ENOSPC} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// verify reads a file from the disk, block by block. Each read gives the right bytes or an error; the blocks of the errors are returned, all
// of them if the file does not even open. It may be called from any goroutine.
func verify(t *testing.T, file string, want []byte) (failed []int) {
	t.Helper()
	return verifyFile(t, file, unix.O_DIRECT, want)
}

// verifyCold does so by the page cache, as most programs read, after everything was dropped from it.
func verifyCold(t *testing.T, file string, want []byte) (failed []int) {
	t.Helper()
	dropCaches(t)
	return verifyFile(t, file, 0, want)
}

func verifyFile(t *testing.T, file string, flags int, want []byte) (failed []int) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDONLY|flags, 0)
	if damage(err) {
		return span(0, len(want)/block)
	}
	if err != nil {
		t.Error(err)
		return nil
	}
	defer f.Close()
	// One block at a time, or readahead fails what is not asked for.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		t.Error(err)
	}
	return verifyBlocks(t, f, want)
}

func verifyBlocks(t *testing.T, f io.ReaderAt, want []byte) (failed []int) {
	t.Helper()
	buffer := aligned(block)
	for i := range len(want) / block {
		_, err := f.ReadAt(buffer, int64(i)*block)
		switch {
		case damage(err):
			failed = append(failed, i)
		case err != nil:
			t.Errorf("block %d: %v", i, err)
		case !bytes.Equal(buffer, want[i*block:][:block]):
			t.Errorf("block %d reads WRONG DATA without an error", i)
		}
	}
	return failed
}

// span is the numbers from first on.
func span(first, n int) (numbers []int) {
	for i := range n {
		numbers = append(numbers, first+i)
	}
	return numbers
}

// aligned is memory for O_DIRECT.
func aligned(n int) []byte {
	b := make([]byte, n+block)
	return b[block-int(uintptr(unsafe.Pointer(&b[0]))%block):][:n]
}

// direct opens a volume's block device below the page cache and the file system.
func (a *arena) direct(volume string) *os.File {
	a.Helper()
	f, err := os.OpenFile(filepath.Join("/dev/mapper", a.status(volume).Mappings[0].Name), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		a.Fatal(err)
	}
	return f
}

// where finds the place of a file's block in the volume.
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

// same compares lists of blocks.
func (a *arena) same(what string, got, want []int) {
	a.Helper()
	if !slices.Equal(got, want) {
		a.Errorf("%s: blocks %v fail, want %v", what, got, want)
	}
}
