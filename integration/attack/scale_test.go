//go:build vm

package attack

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/sealvol/sealvol/integration/testbed"
)

// each calls do for the small volumes, each on its disk, n at a time, and returns how long that took.
func each(n int, do func(volume string, disk int) error) (time.Duration, error) {
	errs := make([]error, smalls)
	var wg sync.WaitGroup
	turn := make(chan struct{}, n)
	start := time.Now()
	for i := range smalls {
		turn <- struct{}{}
		wg.Go(func() {
			errs[i] = do(smallName(i), small+i)
			<-turn
		})
	}
	wg.Wait()
	return time.Since(start), errors.Join(errs...)
}

func TestSixtyFourVolumesOpenWorkAndClose(t *testing.T) {
	a := start(t)
	acquire := func(volume string, disk int) error { return a.acquire(volume, disk) }
	release := func(volume string, disk int) error { return a.bed.Release(a.within(), volume) }
	work := func(volume string, disk int) error {
		return a.bed.At(volume, func(dir string) error { return write(filepath.Join(dir, "f"), content(volume, 16)) })
	}
	check := func(volume string, disk int) error {
		return a.bed.At(volume, func(dir string) error {
			if failed := verify(t, filepath.Join(dir, "f"), content(volume, 16)); failed != nil {
				return fmt.Errorf("volume %s: blocks %v do not read", volume, failed)
			}
			return nil
		})
	}
	step := func(what string, n int, do func(volume string, disk int) error) time.Duration {
		t.Helper()
		took, err := each(n, do)
		if err != nil {
			t.Fatalf("%s, %d at a time: %v", what, n, err)
		}
		t.Logf("%s, %d at a time: %v", what, n, took)
		return took
	}
	step("sealed", smalls, acquire)
	step("written", smalls, work)
	step("verified", smalls, check)
	step("closed", smalls, release)
	alone := step("opened again", 1, acquire)
	step("verified", smalls, check)
	step("closed", smalls, release)
	together := step("opened again", smalls, acquire)
	t.Logf("together %.2f times faster than one after the other", alone.Seconds()/together.Seconds())
	step("verified", smalls, check)
	// The end finds them open.
}

func TestADiskThatHangsHoldsNoOtherVolumeUpWhileTheyAreSealed(t *testing.T) {
	a := start(t)
	const hung = smalls / 2
	resume := a.stall(small + hung)
	waiting := make(chan error, 1)
	took, err := each(smalls, func(volume string, disk int) error {
		if disk == small+hung {
			go func() { waiting <- a.acquire(volume, disk) }()
			return nil
		}
		return a.acquire(volume, disk)
	})
	if err != nil {
		resume() // or the end would wait for the disk
		t.Fatal(err)
	}
	t.Logf("all others were sealed in %v", took)
	a.is(smallName(hung), "sealing")
	select {
	case err := <-waiting:
		t.Errorf("sealed on a disk that hangs: %v", err)
	default:
	}
	resume()
	if err := <-waiting; err != nil {
		t.Errorf("a disk that hung for a while: %v", err)
	}
}

func TestTwoHundredRoundsLeaveNothing(t *testing.T) {
	a := start(t)
	const lives, rounds, workers = 10, 5, 4 // of a sandbox; of a volume in it
	const tolerated = 8 * mib               // of the whole machine, where the tags of a few volumes would be as much
	life := func() {
		t.Helper()
		var wg sync.WaitGroup
		for i := range workers {
			wg.Go(func() {
				volume := smallName(i)
				for round := range rounds {
					if err := a.round(volume, small+i, round); err != nil {
						t.Errorf("round %d: %v", round, err)
						return
					}
				}
			})
		}
		wg.Wait()
		if err := a.bed.Destroy(a.within()); err != nil {
			t.Fatal(err)
		}
	}
	life() // what is loaded and allocated once
	// What is left over of each round grows in each series. What the kernel happens to keep for itself, for its processors and slabs, does not.
	const series = 3
	for n := range series {
		before, heldBefore := a.holds()
		for range lives {
			life()
		}
		after, heldAfter := a.holds()
		// The kernel frees some of it later: what processors keep for themselves, what waits for RCU.
		for tries := 0; heldAfter-heldBefore > tolerated && tries < 30; tries++ {
			time.Sleep(time.Second)
			after, heldAfter = a.holds()
		}
		t.Logf("%d rounds: %+v and %d MiB in use before, %+v and %d MiB after", lives*rounds*workers, before.memory, heldBefore/mib, after.memory, heldAfter/mib)
		// The mount below which volumes are attached, which each sandbox makes.
		if len(after.kernel) != 1 || len(before.kernel) != 1 {
			t.Errorf("left over: %q, before: %q", after.kernel, before.kernel)
		}
		if after.memory.Goroutines > before.memory.Goroutines || after.memory.Files > before.memory.Files {
			t.Errorf("the service holds %+v, before: %+v", after.memory, before.memory)
		}
		if grown := after.memory.Heap - before.memory.Heap; grown > mib {
			t.Errorf("the service's heap grew by %d KiB", grown>>10)
		}
		grown := heldAfter - heldBefore
		if grown <= tolerated {
			return
		}
		if n == series-1 {
			t.Errorf("the machine has %d MiB more in use after each of %d series", grown/mib, series)
		}
	}
}

// round opens a volume, writes to it, verifies what the round before wrote, and closes it.
func (a *arena) round(volume string, disk, round int) error {
	if err := a.acquire(volume, disk); err != nil {
		return err
	}
	err := a.bed.At(volume, func(dir string) error {
		if round > 0 {
			if failed := verify(a.T, filepath.Join(dir, "f"), content(fmt.Sprint(round-1), 4)); failed != nil {
				return fmt.Errorf("volume %s: blocks %v do not read", volume, failed)
			}
		}
		return write(filepath.Join(dir, "f"), content(fmt.Sprint(round), 4))
	})
	return errors.Join(err, a.bed.Release(a.within(), volume))
}

// holding is what a service without volumes holds.
type holding struct {
	kernel []string
	memory testbed.Memory
}

// holds is what the service holds, and the memory that the machine has in use and could not free.
func (a *arena) holds() (holding, int64) {
	a.Helper()
	kernel, err := testbed.LeftOver()
	if err != nil {
		a.Fatal(err)
	}
	memory, err := a.bed.Memory()
	if err != nil {
		a.Fatal(err)
	}
	debug.FreeOSMemory() // The test's own is of the same machine.
	dropCaches(a.T)
	return holding{kernel, memory}, meminfo(a.T, "MemTotal") - meminfo(a.T, "MemFree")
}
