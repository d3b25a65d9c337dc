//go:build vm

package volume

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/tagstore"
	"github.com/sealvol/sealvol/policy"
)

// perVolume is what a volume may take beside its tags, in bytes.
const perVolume = 8 << 20

func tagBytes(t *testing.T, m *Manager, volume int) uint64 {
	t.Helper()
	return m.Status()[volume].Counters.TagBytes
}

func TestVMTagsTakeMemoryAsBlocksAreWritten(t *testing.T) {
	m := newVM(t)
	seal(t, m, "v", 0)
	size := m.volumes["v"].bytes
	at(t, m, "v", func(dir string) {
		const written = 32 << 20
		write(t, filepath.Join(dir, "sequential"), content("v", written/block))
		if got, most := tagBytes(t, m, 0), uint64(written/128+perVolume); got > most {
			t.Errorf("%d bytes of tags after %d in sequence, more than %d", got, written, most)
		}
		// Scattered, each block may want a page of tags.
		f, err := os.Create(filepath.Join(dir, "scattered"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		random := rand.New(rand.NewPCG(1, 2))
		for range 2000 {
			if _, err := f.WriteAt(content("v", 1), random.Int64N(150<<20/block)*block); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if got, most := tagBytes(t, m, 0), tagstore.MaxBytes(size)+perVolume; got > most {
			t.Errorf("%d bytes of tags, more than 1/128 of the volume and %d", got, perVolume)
		}
	})
	release(t, m, "v")
}

func TestVMTagsAllocatedBeforehandNeverWantForMemory(t *testing.T) {
	m := newVM(t)
	seal(t, m, "v", 2, func(v *policy.Volume) { v.PreallocateTags = true })
	size := m.volumes["v"].bytes
	before := tagBytes(t, m, 0)
	if before < tagstore.MaxBytes(size) || before > tagstore.MaxBytes(size)+perVolume {
		t.Errorf("%d bytes allocated for a volume of %d", before, size)
	}
	at(t, m, "v", func(dir string) {
		want := content("v", int(size*8/10/block))
		write(t, filepath.Join(dir, "f"), want)
		dropCaches(t)
		if failed := verify(t, filepath.Join(dir, "f"), want); failed != nil {
			t.Errorf("blocks %v do not read", failed)
		}
	})
	if after := tagBytes(t, m, 0); after != before {
		t.Errorf("%d bytes of tags before anything was written, %d after: not everything was allocated", before, after)
	}
	release(t, m, "v")
}

func TestVMTagsThatTheGuestHasNoMemoryForAreRefusedBeforehand(t *testing.T) {
	place := leftOver(t)
	store, err := tagstore.New(t.Context(), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	// Of 8 TiB: more than the machine has.
	if err := store.Preallocate(8 << 40); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "68720525312") {
		t.Errorf("allocated 64 GiB: %v", err)
	}
	if err := store.Close(); err != nil {
		t.Error(err)
	}
	if left := leftOver(t); len(left) != len(place) {
		t.Errorf("left over: %q", left)
	}
}
