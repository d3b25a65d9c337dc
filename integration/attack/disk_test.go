//go:build vm

package attack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// halve gives the place on the disk behind which half of a file's blocks are, and these.
func (a *arena) halve(file string, blocks int) (cut int64, beyond []int) {
	offsets := a.places(file, span(0, blocks))
	cut = slices.Sorted(slices.Values(offsets))[blocks/2]
	for i, offset := range offsets {
		if offset >= cut {
			beyond = append(beyond, i)
		}
	}
	return cut, beyond
}

func TestATruncatedBackingFileIsErrorsBeyondItsEnd(t *testing.T) {
	play(t, ext4InMemory, func(a *arena) {
		want := content("file", 512)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			cut, beyond := a.halve(file, 512)
			// What is read there is short, and QEMU gives zeros for the rest.
			a.truncate(attacked, cut)
			a.same("truncated", verify(a.T, file, want), beyond)
			a.truncate(attacked, diskBytes)
			a.same("as large as before", verify(a.T, file, want), beyond)
			a.write(file, want)
			a.same("rewritten", verify(a.T, file, want), nil)
		})
	})
}

func TestADiskThatShrinksAndGrows(t *testing.T) {
	play(t, ext4InMemory, func(a *arena) {
		want := content("file", 512)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			a.resize(attacked, 2*diskBytes)
			a.same("grown", verify(a.T, file, want), nil)
			cut, beyond := a.halve(file, 512)
			a.resize(attacked, cut)
			a.same("shrunk", verify(a.T, file, want), beyond)
			a.resize(attacked, diskBytes)
			a.same("as large as before", verify(a.T, file, want), beyond)
			a.write(file, want)
		})
		a.close(a.name)
		image := a.read(attacked, 0, int(a.bytes))
		a.unplug(attacked)
		a.resize(attacked, int64(a.bytes)-block)
		a.plug(attacked, pathOf(attacked))
		if err := a.acquire(a.name, attacked); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "volume "+a.name+":") {
			a.Errorf("opened on a disk that is too small: %v", err)
		}
		a.unplug(attacked)
		a.resize(attacked, diskBytes)
		a.plug(attacked, pathOf(attacked))
		a.put(attacked, 0, image)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) { a.same("opened again", verify(a.T, filepath.Join(dir, "f"), want), nil) })
	})
}

func TestReadErrorsOfTheDiskAreReadErrors(t *testing.T) {
	play(t, all, func(a *arena) {
		want := content("file", 64)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			lift := a.fault(attacked, failing(reads, int(unix.EIO), false))
			a.same("failing", verify(a.T, file, want), span(0, 64))
			lift()
			a.same("failing no longer", verify(a.T, file, want), nil)
		})
	})
}

// An ext4 that cannot read its own blocks gives up, and what it had not yet written with it.
func TestAReadErrorInTheFileSystemsOwnBlocksLosesNothingSilently(t *testing.T) {
	play(t, onExt4, func(a *arena) {
		before, after := content("before", 64), content("after", 64)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, before)
			// So many that the folder has a block of its own.
			if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
				a.Fatal(err)
			}
			for i := range 64 {
				a.write(filepath.Join(dir, "d", fmt.Sprint(i)), nil)
			}
			dropCaches(a.T)
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err != nil {
				a.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(after, 0); err != nil {
				a.Fatal(err)
			}
			lift := a.fault(attacked, failing(reads, int(unix.EIO), false))
			if _, err := os.Stat(filepath.Join(dir, "d", "60")); !damage(err) {
				a.Errorf("what is on a disk that does not read: %v", err)
			}
			lift()
		})
		a.closeLost(a.name, attacked)
	})
}

func TestAFailedWriteIsAnErrorUntilTheBlockIsRewritten(t *testing.T) {
	play(t, all, func(a *arena) {
		want := content("old", 64)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			lift := a.fault(attacked, failing(writes, int(unix.EIO), true))
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				a.Fatal(err)
			}
			defer f.Close()
			renewed := content("new", 64)[9*block:][:block]
			if _, err := f.WriteAt(renewed, 9*block); err != nil {
				a.Fatal(err)
			}
			if err := f.Sync(); !errors.Is(err, unix.EIO) {
				a.Errorf("fsync after a failed write: %v", err)
			}
			lift()
			// It holds neither: the ciphertext is the old one, the tag the new one's.
			a.same("failed", verifyCold(a.T, file, want), []int{9})
			if _, err := f.WriteAt(renewed, 9*block); err != nil {
				a.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				a.Fatal(err)
			}
			copy(want[9*block:], renewed)
			a.same("rewritten", verify(a.T, file, want), nil)
		})
		a.isLoss(a.name, a.bed.Release(a.within(), a.name))
	})
}

func TestTheHostsDiskIsFull(t *testing.T) {
	play(t, all, func(a *arena) {
		want := content("file", 64)
		a.open(a.name, attacked)
		a.open(a.name+secondOf, second)
		a.at(a.name, func(dir string) {
			a.write(filepath.Join(dir, "f"), want)
			lift := a.fault(attacked, failing(writes, int(unix.ENOSPC), false))
			if err := write(filepath.Join(dir, "g"), want); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
				a.Errorf("written to a disk that is full: %v", err)
			}
			a.same("what was there", verify(a.T, filepath.Join(dir, "f"), want), nil)
			lift()
		})
		a.closeLost(a.name, attacked)

		// Full when it is closed, and not before.
		a.at(a.name+secondOf, func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "f"), want, 0o600); err != nil {
				a.Fatal(err)
			}
		})
		lift := a.fault(second, failing(writes, int(unix.ENOSPC), false))
		a.isLoss(a.name+secondOf, a.bed.Release(a.within(), a.name+secondOf))
		lift()
		a.isLoss(a.name+secondOf, a.acquire(a.name+secondOf, second))
	})
}

func TestAFailedFlushIsTheVolumesEnd(t *testing.T) {
	play(t, all, func(a *arena) {
		want := content("file", 64)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			lift := a.fault(attacked, failing(flushes, int(unix.EIO), true))
			if err := write(filepath.Join(dir, "g"), want); !errors.Is(err, unix.EIO) {
				a.Errorf("fsync after a failed flush: %v", err)
			}
			lift()
			// Right or an error: nobody knows what is on the disk.
			a.Logf("%d of 64 blocks fail", len(verify(a.T, file, want)))
		})
		a.closeLost(a.name, attacked)
	})
}

func TestUnpluggedWhileItIsWritten(t *testing.T) {
	play(t, all, func(a *arena) {
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			data := content("file", 16)
			a.write(filepath.Join(dir, "f"), data)
			ended := make(chan error)
			go func() {
				for {
					if err := write(filepath.Join(dir, "f"), data); err != nil {
						ended <- err
						return
					}
				}
			}()
			a.unplug(attacked)
			if err := <-ended; !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EROFS) {
				a.Errorf("written to a disk that is not there: %v", err)
			}
		})
		a.isLoss(a.name, a.bed.Release(a.within(), a.name))
		a.plug(attacked, pathOf(attacked))
		a.isLoss(a.name, a.acquire(a.name, attacked))
		a.is(a.name, "failed")
	})
}

func TestUnpluggedWithADirtyCache(t *testing.T) {
	play(t, all, func(a *arena) {
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "f"), content("file", 256), 0o600); err != nil {
				a.Fatal(err)
			}
			a.unplug(attacked)
		})
		a.isLoss(a.name, a.bed.Release(a.within(), a.name))
		a.plug(attacked, pathOf(attacked))
		a.isLoss(a.name, a.acquire(a.name, attacked))
	})
}

func TestADiskThatStallsHoldsNobodyElseUp(t *testing.T) {
	play(t, onExt4, func(a *arena) {
		want := content("file", 64)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			resume := a.stall(attacked)
			stalled := make(chan error)
			go func() { stalled <- write(filepath.Join(dir, "f"), want) }()
			// Not by dropCaches, whose sync waits for every file system.
			a.at(bystander, func(dir string) {
				for i := range 10 {
					a.write(filepath.Join(dir, "beside"), content(fmt.Sprint("round ", i), 16))
				}
			})
			a.is(bystander, "open")
			select {
			case err := <-stalled:
				a.Errorf("written to a disk that stalls: %v", err)
			default:
			}
			resume()
			if err := <-stalled; err != nil {
				a.Errorf("a disk that only stalled: %v", err)
			}
			a.same("resumed", verify(a.T, filepath.Join(dir, "f"), want), nil)
		})
	})
}

// On one kind: what waits is the same for all, and it takes a while.
func TestADiskThatHangsWhileItsVolumeIsClosed(t *testing.T) {
	play(t, func(k kind) bool { return k == kinds[0] }, func(a *arena) {
		want := content("file", 64)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "f"), want, 0o600); err != nil {
				a.Fatal(err)
			}
		})
		resume := a.stall(attacked)
		ctx, cancel := context.WithTimeout(a.Context(), time.Second)
		defer cancel()
		err := a.bed.Release(ctx, a.name)
		if err == nil || !strings.Contains(err.Error(), "volume "+a.name+": the disk does not answer") {
			a.Errorf("closed on a disk that hangs: %v", err)
		}
		a.is(a.name, "closing")
		a.at(bystander, func(dir string) { a.write(filepath.Join(dir, "beside"), want) })
		resume()
		// The first to come after the closing.
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			got, err := os.ReadFile(filepath.Join(dir, "f"))
			if err != nil || !bytes.Equal(got, want) {
				a.Errorf("after a closing that hung: %v", err)
			}
		})
	})
}
