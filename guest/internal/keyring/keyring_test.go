package keyring

import (
	"bytes"
	"io"
	"os/exec"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestKeysAreRandomAndGoneAfterDestroy(t *testing.T) {
	t.Parallel()
	var keys []*Key
	for range 4 {
		key, err := New(96)
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range keys {
			if bytes.Equal(key.memory[:32], other.memory[:32]) || bytes.Equal(key.memory[64:], make([]byte, 32)) {
				t.Error("a key is not random")
			}
		}
		keys = append(keys, key)
	}
	for _, key := range keys {
		for range 2 {
			if err := key.Destroy(); err != nil || key.memory != nil {
				t.Errorf("%v, %d bytes left", err, len(key.memory))
			}
		}
		if err := key.Lend("sealvol:test", func() error { t.Error("lent"); return nil }); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
		if _, err := key.Pipe(); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	}
	if _, err := New(0); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

func TestAnUnseededGeneratorIsAnError(t *testing.T) {
	t.Parallel()
	_, err := newKey(32, func(_ []byte, flags int) (int, error) {
		if flags&unix.GRND_NONBLOCK == 0 {
			t.Error("waits for a host that may give no entropy at all")
		}
		return 0, unix.EAGAIN
	})
	if !errdefs.IsUnavailable(err) {
		t.Errorf("made a key of nothing random: %v", err)
	}
}

func TestAKeyIsFilledWhateverTheGeneratorGivesAtOnce(t *testing.T) {
	t.Parallel()
	calls := 0
	key, err := newKey(32, func(b []byte, _ int) (int, error) {
		if calls++; calls == 2 {
			return 0, unix.EINTR
		}
		b[0] = byte(calls)
		return 1, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	if bytes.Contains(key.memory, []byte{0}) || calls != 33 {
		t.Errorf("after %d calls: %x", calls, key.memory)
	}
}

func TestPipeHoldsTheKeyAndEnds(t *testing.T) {
	t.Parallel()
	key, err := New(maxPipe)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	for range 2 {
		pipe, err := key.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer pipe.Close()
		if got, err := io.ReadAll(pipe); err != nil || !bytes.Equal(got, key.memory) {
			t.Errorf("%d bytes of another key, %v", len(got), err)
		}
	}
	pipe, err := key.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	cat := exec.Command("cat")
	cat.Stdin = pipe
	if got, err := cat.Output(); err != nil || !bytes.Equal(got, key.memory) {
		t.Errorf("a process reads %d bytes of another key, %v", len(got), err)
	}
	long, err := New(maxPipe + 1)
	if err != nil {
		t.Fatal(err)
	}
	defer long.Destroy()
	if _, err := long.Pipe(); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}
