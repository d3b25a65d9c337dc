//go:build vm

package noswap

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFileTakesMemoryAsItIsWritten(t *testing.T) {
	file, err := File("test", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if n, err := Allocated(file); err != nil || n != 0 {
		t.Errorf("%d bytes, %v before anything is written", n, err)
	}
	if _, err := file.WriteAt([]byte("x"), 1<<30-1); err != nil {
		t.Error(err)
	}
	if n, err := Allocated(file); err != nil || n != 4096 {
		t.Errorf("%d bytes, %v after one byte is written", n, err)
	}
}

func TestFileHasNoPathAndOpensByDescriptor(t *testing.T) {
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	file, err := File("test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	after, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("mounts were\n%s, are\n%s, %v", before, after, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil || st.Nlink != 0 || st.Size != 4096 {
		t.Errorf("%d links, %d bytes, %v", st.Nlink, st.Size, err)
	}
	// As a child does that is handed the descriptor.
	again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
}
