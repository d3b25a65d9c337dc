//go:build node

package node

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

const block = 4096

// TestHostThatDamagesTheDiskGetsAnErrorAndNotOneWrongByte changes the blocks of
// a mounted volume: through the device that QEMU reads, since the host's page
// cache would hide a change of the file behind it. The application reads past
// the guest's page cache.
func TestHostThatDamagesTheDiskGetsAnErrorAndNotOneWrongByte(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(128 * mib)
	pod := sealedPod("tampered")
	container := s.start(s.pod(pod), pod, sealedContainer(device))
	const path, size = "/mnt/encrypted/data", 2 * mib
	write := func(letter string) {
		s.exec(container, "sh", "-c", fmt.Sprintf(`yes %s | head -c %d | dd of=%s bs=%d conv=notrunc,fsync 2>/dev/null`, letter, size, path, mib))
	}
	read := func() (string, error) {
		return s.node.Exec(s.ctx, container, "dd", "if="+path, fmt.Sprintf("bs=%d", block), "iflag=direct", "status=none")
	}
	fresh := s.snapshot(device)
	write("a")
	old := s.snapshot(device)
	at := longestChange(fresh, old, size)
	if at < 0 {
		t.Fatalf("%d bytes were written but no such stretch of the disk has changed", size)
	}
	if got, err := read(); err != nil || len(got) != size-1 {
		t.Fatalf("before the attack the file must be whole, got %d bytes, %v", len(got), err)
	}

	victim := at + size/2
	t.Run("bit flip", func(t *testing.T) {
		s := &scene{T: t, ctx: s.ctx, node: s.node}
		s.overwrite(device, victim, []byte{old[victim] ^ 0x10})
		s.wantIOError("a\n", size, read)
		s.overwrite(device, victim, old[victim:victim+1])
		if got, err := read(); err != nil || len(got) != size-1 {
			t.Errorf("with the bit put back the file must be whole again, got %d bytes, %v", len(got), err)
		}
	})
	t.Run("replay of an old block", func(t *testing.T) {
		s := &scene{T: t, ctx: s.ctx, node: s.node}
		write("b")
		s.overwrite(device, victim, old[victim:victim+block])
		s.wantIOError("b\n", size, read)
	})
	t.Run("replay of the whole extent", func(t *testing.T) {
		s := &scene{T: t, ctx: s.ctx, node: s.node}
		s.overwrite(device, at, old[at:at+size])
		s.wantIOError("b\n", size, read)
	})
}

// wantIOError says that a read failed, and that every byte before the failure
// was the one written last.
func (s *scene) wantIOError(pattern string, size int, read func() (string, error)) {
	s.Helper()
	got, err := read()
	if err == nil {
		s.Fatalf("the damaged file was read without an error (%d bytes)", len(got))
	}
	if !strings.Contains(strings.ToLower(err.Error()), "i/o error") && !strings.Contains(err.Error(), "Invalid or incomplete multibyte") {
		s.Errorf("the application must see an I/O error, got %v", err)
	}
	if want := strings.TrimSpace(strings.Repeat(pattern, size/len(pattern))[:len(got)]); got != want && got+"\n" != strings.Repeat(pattern, size/len(pattern))[:len(got)+1] {
		s.Errorf("%d bytes were read before the error, and some are wrong", len(got))
	}
}

func (s *scene) snapshot(device string) []byte {
	s.Helper()
	text, err := os.ReadFile(device)
	if err != nil {
		s.Fatal(err)
	}
	return text
}

func (s *scene) overwrite(device string, at int, p []byte) {
	s.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		s.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, int64(at)); err != nil {
		s.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		s.Fatal(err)
	}
}

// longestChange gives the offset of the longest stretch of blocks that differ
// between two states of a disk, -1 if it is shorter than atLeast bytes. A file
// that was just written is that stretch; metadata changes are short.
func longestChange(before, after []byte, atLeast int) int {
	best, bestLen, begin := -1, 0, -1
	for at := 0; at <= len(after); at += block {
		differs := at < len(after) && string(before[at:at+block]) != string(after[at:at+block])
		switch {
		case differs && begin < 0:
			begin = at
		case !differs && begin >= 0:
			if at-begin > bestLen {
				best, bestLen = begin, at-begin
			}
			begin = -1
		}
	}
	if bestLen < atLeast {
		return -1
	}
	return best
}
