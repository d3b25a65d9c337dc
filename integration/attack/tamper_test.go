//go:build vm

package attack

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

// strides is in how many turns every block is reached: every strides-th at once, so that a turn also shows that the others are not
// disturbed.
const strides = 4

func TestAFlippedBitAnywhereIsAnErrorThere(t *testing.T) {
	play(t, onExt4, func(a *arena) {
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) { fill(a.T, filepath.Join(dir, "f")) })
		dropCaches(a.T)
		device := a.direct(a.name)
		defer device.Close()
		good, unwritten := readAll(a, device)
		a.Logf("%d of %d blocks were never written and do not read", len(unwritten), len(good)/block)
		blocks := int(a.bytes / block)
		touched := 0
		for turn := range strides {
			var offsets []int64
			var flipped []int
			for i := turn; i < blocks; i += strides {
				offsets = append(offsets, int64(i)*block)
				flipped = append(flipped, i)
			}
			a.flip(attacked, offsets)
			failed := verifyDevice(a, device, good, unwritten)
			if a.tagsInMemory() {
				a.same("flipped", failed, without(flipped, unwritten))
			}
			touched += len(failed)
			a.flip(attacked, offsets)
		}
		a.Logf("%d blocks failed", touched)
		if touched == 0 {
			a.Error("no flipped bit was noticed")
		}
		a.same("all flipped back", verifyDevice(a, device, good, unwritten), nil)
	})
}

// readAll reads a device block by block: what it holds, and the blocks that do not read.
func readAll(a *arena, device *os.File) (held []byte, unwritten []int) {
	a.Helper()
	end, err := device.Seek(0, 2)
	if err != nil {
		a.Fatal(err)
	}
	held = make([]byte, end)
	buffer := aligned(block)
	for i := range int(end) / block {
		if _, err := device.ReadAt(buffer, int64(i)*block); damage(err) {
			unwritten = append(unwritten, i)
		} else if err != nil {
			a.Fatal(err)
		} else {
			copy(held[i*block:], buffer)
		}
	}
	return held, unwritten
}

// verifyDevice reads a device again: the blocks that fail beside those that were never written.
func verifyDevice(a *arena, device *os.File, good []byte, unwritten []int) (failed []int) {
	a.Helper()
	buffer := aligned(block)
	for i := range len(good) / block {
		_, err := device.ReadAt(buffer, int64(i)*block)
		never := slices.Contains(unwritten, i)
		switch {
		case damage(err) && !never:
			failed = append(failed, i)
		case damage(err):
		case err != nil:
			a.Fatal(err)
		case never || !bytes.Equal(buffer, good[i*block:][:block]):
			a.Fatalf("block %d reads WRONG DATA without an error", i)
		}
	}
	return failed
}

func without(list, those []int) (rest []int) {
	for _, i := range list {
		if !slices.Contains(those, i) {
			rest = append(rest, i)
		}
	}
	return rest
}

func TestFlippedBitsInAFileAreErrorsAndTheRestReads(t *testing.T) {
	play(t, ext4InMemory, func(a *arena) {
		want := content("file", 256)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			flipped := []int{0, 1, 77, 128, 255}
			offsets := a.places(file, flipped)
			a.flip(attacked, offsets)
			a.same("flipped", verifyCold(a.T, file, want), flipped)
			a.same("flipped, read directly", verify(a.T, file, want), flipped)
			// What is written anew is whole again.
			a.write(file, want[:2*block])
			a.same("two rewritten", verify(a.T, file, want), flipped[2:])
			a.flip(attacked, offsets[2:])
			a.same("the others flipped back", verify(a.T, file, want), nil)
		})
		// What went wrong is seen from outside, and no reason to give the volume up.
		status := a.status(a.name)
		if status.State != "degraded" || status.Faults.GetCount() == 0 || status.Faults.FirstOperation != "read" {
			a.Errorf("status %v", status)
		}
	})
}

func TestBitsFlippedWhileTheVolumeIsClosed(t *testing.T) {
	play(t, onExt4, func(a *arena) {
		want := content("file", 512)
		a.open(a.name, attacked)
		var offsets []int64
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			if a.tagsInMemory() {
				offsets = a.places(file, span(0, 512))
			}
		})
		a.close(a.name)
		if a.tagsInMemory() {
			// Every block of the file and none of the file system's own.
			a.flip(attacked, offsets)
			a.open(a.name, attacked)
			a.at(a.name, func(dir string) { a.same("flipped", verify(a.T, filepath.Join(dir, "f"), want), span(0, 512)) })
			a.close(a.name)
			a.flip(attacked, offsets)
			a.open(a.name, attacked)
			a.at(a.name, func(dir string) { a.same("flipped back", verify(a.T, filepath.Join(dir, "f"), want), nil) })
			a.close(a.name)
		}
		var everywhere []int64
		for i := range int64(a.bytes) / block {
			everywhere = append(everywhere, i*block)
		}
		a.flip(attacked, everywhere)
		disk := a.read(attacked, 0, int(a.bytes))
		a.isLoss(a.name, a.acquire(a.name, attacked))
		a.flip(attacked, everywhere)
		a.isLoss(a.name, a.acquire(a.name, attacked)) // lost is lost
		a.flip(attacked, everywhere)
		if !bytes.Equal(a.read(attacked, 0, len(disk)), disk) {
			a.Error("a disk that did not open was written to")
		}
	})
}

func TestSwappedSectorsAreErrors(t *testing.T) {
	play(t, ext4InMemory, func(a *arena) {
		a.open(a.name, attacked)
		a.open(a.name+secondOf, second)
		want := content("file", 64)
		var others []byte
		a.at(a.name+secondOf, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			others = a.read(second, where(a.T, file, 5), block)
		})
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, want)
			two := a.places(file, []int{5, 40})
			one, other := a.read(attacked, two[0], block), a.read(attacked, two[1], block)
			a.put(attacked, two[0], other)
			a.put(attacked, two[1], one)
			a.same("swapped", verifyCold(a.T, file, want), []int{5, 40})
			a.put(attacked, two[0], others)
			a.put(attacked, two[1], other)
			a.same("another volume's block of the same content", verify(a.T, file, want), []int{5})
			a.put(attacked, two[0], make([]byte, block))
			a.same("zeros", verify(a.T, file, want), []int{5})
			a.put(attacked, two[0], one)
			a.same("put back", verify(a.T, file, want), nil)
		})
	})
}

func TestSwappedDisksDoNotOpen(t *testing.T) {
	play(t, onExt4, func(a *arena) {
		pair := map[string]int{a.name: attacked, a.name + secondOf: second}
		for volume, disk := range pair {
			a.open(volume, disk)
			a.at(volume, func(dir string) { a.write(filepath.Join(dir, "f"), content(volume, 64)) })
			a.close(volume)
		}
		a.unplug(attacked)
		a.unplug(second)
		a.plug(attacked, pathOf(second))
		a.plug(second, pathOf(attacked))
		for volume, disk := range pair {
			a.isLoss(volume, a.acquire(volume, disk))
		}
		a.unplug(attacked)
		a.unplug(second)
		a.plug(attacked, pathOf(attacked))
		a.plug(second, pathOf(second))
	})
}

func TestReplayedBlocksOfAnOpenVolumeAreErrors(t *testing.T) {
	play(t, ext4InMemory, func(a *arena) {
		before, after := content("yesterday", 64), content("today", 64)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			file := filepath.Join(dir, "f")
			a.write(file, before)
			offsets := a.places(file, span(0, 64))
			old := a.read(attacked, 0, int(a.bytes))
			a.write(file, after)
			if now := a.places(file, span(0, 64)); !slices.Equal(now, offsets) {
				a.Fatal("the file moved")
			}
			current := a.read(attacked, 0, int(a.bytes))
			for _, i := range offsets {
				if bytes.Equal(old[i:][:block], current[i:][:block]) {
					a.Fatalf("the block at %d is the same ciphertext", i)
				}
			}
			replay := func(what string, blocks []int) {
				for _, i := range blocks {
					a.put(attacked, offsets[i], old[offsets[i]:][:block])
				}
				a.same(what, verifyCold(a.T, file, after), blocks)
				for _, i := range blocks {
					a.put(attacked, offsets[i], current[offsets[i]:][:block])
				}
				a.same(what+", put back", verify(a.T, file, after), nil)
			}
			replay("one block", []int{7})
			replay("a part", span(16, 16))
			replay("the whole file", span(0, 64))

			a.put(attacked, 0, old)
			a.same("the whole disk", verifyCold(a.T, file, after), span(0, 64))
		})
		// Blocks of ext4's own are replayed too, and it may have met one by now.
		if err := a.bed.Release(a.within(), a.name); err != nil && !errdefs.IsDataLoss(err) {
			a.Error(err)
		}
	})
}

func TestAReplayedDiskDoesNotOpen(t *testing.T) {
	play(t, ext4InMemory, func(a *arena) {
		yesterday, today := content("yesterday", 64), content("today", 64)
		old := writeTwice(a, yesterday, today)
		a.put(attacked, 0, old)
		a.isLoss(a.name, a.acquire(a.name, attacked))
	})
}

func TestAReplayedExtentOfAClosedVolumeIsAnError(t *testing.T) {
	play(t, ext4InMemory, func(a *arena) {
		yesterday, today := content("yesterday", 64), content("today", 64)
		old := writeTwice(a, yesterday, today)
		a.open(a.name, attacked)
		var offsets []int64
		a.at(a.name, func(dir string) { offsets = a.places(filepath.Join(dir, "f"), span(0, 64)) })
		a.close(a.name)
		for _, offset := range offsets {
			a.put(attacked, offset, old[offset:][:block])
		}
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			a.same("replayed", verify(a.T, filepath.Join(dir, "f"), today), span(0, 64))
		})
	})
}

// writeTwice leaves a closed volume with the second content in its file f, and returns what the disk held when it was closed with the first.
func writeTwice(a *arena, first, then []byte) (old []byte) {
	a.Helper()
	for _, data := range [][]byte{first, then} {
		old = a.read(attacked, 0, int(a.bytes)) // the first time it is of no use
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) { a.write(filepath.Join(dir, "f"), data) })
		a.close(a.name)
	}
	return old
}

// Where tags are on the disk, the disk of another day has the tags of that day: this is what luks2 cannot stop.
func TestAReplayedDiskOpensWhereTagsAreOnIt(t *testing.T) {
	play(t, func(k kind) bool { return !k.tagsInMemory() }, func(a *arena) {
		yesterday, today := content("yesterday", 64), content("today", 64)
		old := writeTwice(a, yesterday, today)
		a.put(attacked, 0, old)
		a.open(a.name, attacked)
		a.at(a.name, func(dir string) {
			got, err := os.ReadFile(filepath.Join(dir, "f"))
			if err != nil || !bytes.Equal(got, yesterday) {
				a.Errorf("the old disk does not read as it did: %v; SECURITY.md says that it does", err)
			}
		})
	})
}
