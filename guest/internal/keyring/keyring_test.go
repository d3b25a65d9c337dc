package keyring

import (
	"bytes"
	"testing"

	"github.com/containerd/errdefs"
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
	}
	if _, err := New(0); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}
