//go:build vm

// Package attack plays the host that attacks sealed volumes, from below, and the container that uses them, from above. Each test is one
// attack, on every kind of volume that claims to stop it. Whatever the host does: no read that succeeds gives a wrong byte, the error
// names the volume, the service stays up, other volumes keep working, and in the end nothing is left over.
//
// The volumes are sealed by guest/testbed, in the same machine; the host's hand is the folder where vmrun keeps the disks' files, and the
// monitor of the machine's QEMU.
package attack

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/integration/qmp"
	"github.com/sealvol/sealvol/integration/testbed"
)

// kind is a way to seal a volume.
type kind struct {
	name                string // in the names of its volumes
	layering, suite, fs string
	bytes               uint64 // the least that it is good for
}

// kinds are those that the attacks are played on: each layering, the default suites and one file system, in five minutes; every
// one with SEALVOL_ATTACK=all (`make test-attack KINDS=all`).
var kinds = chosen(os.Getenv("SEALVOL_ATTACK"))

func chosen(which string) []kind {
	chosen := []kind{
		{"aegis", "memory-tags", "aegis128-random", "ext4", 4 << 20},
		{"xts", "memory-tags", "aes-xts-random+hmac-sha256", "ext4", 4 << 20},
		{"luks2", "luks2", "aes-xts-plain64+hmac-sha256", "ext4", 4 << 20},
	}
	if which == "all" {
		chosen = append(chosen,
			kind{"xts-plain64", "memory-tags", "aes-xts-plain64+hmac-sha256", "ext4", 4 << 20},
			kind{"xfs", "memory-tags", "aegis128-random", "xfs", 64 << 20})
	}
	return chosen
}

// tagsInMemory says that nothing but ciphertext is on the disk, block for block in the volume's order, so that an old block, too, is an
// error. Where tags are on the disk, the host can put them back with their block.
func (k kind) tagsInMemory() bool { return k.layering == "memory-tags" }

func (k kind) volume(bytes uint64) testbed.Volume {
	return testbed.Volume{Layering: k.layering, Suites: []string{k.suite}, FSType: k.fs, Max: bytes}
}

const (
	// The machine's disks: three that are attacked or stand beside, one larger than its memory, one to swap to, and many small ones.
	attacked, second, beside = 0, 1, 2
	large, swap              = 3, 4
	small, smalls            = 5, 64

	// A volume of each kind K has the name K; a second one of the same size and a large one these names.
	secondOf, largeOf = "-second", "-large"
	bystander         = "bystander"

	mib        = 1 << 20
	diskBytes  = 64 * mib // of the first three
	largeBytes = 2 << 30

	// limit is for what ends at once on a disk that works, on a machine that is emulated and busy and whose clock may run several times too fast.
	limit = 5 * time.Minute
)

// policy has all volumes of all tests.
func policy(t *testing.T) string {
	t.Helper()
	volumes := map[string]testbed.Volume{bystander: {Max: 16 * mib}}
	for _, k := range kinds {
		volumes[k.name] = k.volume(k.bytes)
		volumes[k.name+secondOf] = k.volume(k.bytes)
		volumes[k.name+largeOf] = k.volume(largeBytes)
	}
	for i := range smalls {
		volumes[smallName(i)] = testbed.Volume{Max: 4 * mib}
	}
	text, err := testbed.Policy(volumes)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func smallName(i int) string { return fmt.Sprintf("small%d", i) }

// pathOf is where vmrun plugs a disk in.
func pathOf(disk int) string { return fmt.Sprintf("%02x/%02x", 2+disk/31, 1+disk%31) }

// arena is one attack on one kind of volume.
type arena struct {
	*testing.T
	kind
	bed  *testbed.Bed
	log  *recorder
	host *qmp.Monitor
}

// start starts a testbed; at the test's end nothing is left of it.
func start(t *testing.T) *arena {
	t.Helper()
	a := launch(t, t.TempDir())
	t.Cleanup(func() {
		if err := a.bed.Close(); err != nil {
			t.Errorf("the testbed's end: %v", err)
		}
		nothingLeft(t)
	})
	return a
}

// launch starts a testbed that the test ends.
func launch(t *testing.T, dir string) *arena {
	t.Helper()
	program, err := filepath.Abs("../../build/testbed")
	if err != nil {
		t.Fatal(err)
	}
	host, err := qmp.Open()
	if err != nil {
		t.Fatal(err)
	}
	log := &recorder{to: t.Output()}
	bed, err := testbed.Start(testbed.Config{Program: program, Dir: dir, Policy: policy(t), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return &arena{T: t, bed: bed, log: log, host: host}
}

func nothingLeft(t *testing.T) {
	t.Helper()
	left, err := testbed.LeftOver()
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
}

// play plays an attack on each kind that claims to stop it, beside a volume that works on.
func play(t *testing.T, claims func(kind) bool, attack func(a *arena)) {
	t.Helper()
	if !slices.ContainsFunc(kinds, claims) {
		return
	}
	whole := start(t)
	whole.open(bystander, beside)
	for _, k := range kinds {
		if !claims(k) {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			a := &arena{T: t, kind: k, bed: whole.bed, log: whole.log, host: whole.host}
			defer func() {
				for _, volume := range []string{k.name, k.name + secondOf, k.name + largeOf} {
					if err := a.bed.Release(a.within(), volume); err != nil {
						t.Error(err)
					}
				}
			}()
			attack(a)
			a.works(bystander)
		})
	}
	whole.works(bystander)
	whole.close(bystander)
}

// Kinds that an attack is played on. What happens below the file system is played with one of them, the one that is made sooner.
func all(kind) bool            { return true }
func onExt4(k kind) bool       { return k.fs == "ext4" }
func tagsInMemory(k kind) bool { return k.tagsInMemory() }
func ext4InMemory(k kind) bool { return onExt4(k) && k.tagsInMemory() }
func firstOfLayering(k kind) bool {
	return k == kinds[slices.IndexFunc(kinds, func(o kind) bool { return o.layering == k.layering })]
}

// within is a context for one step.
func (a *arena) within() context.Context {
	ctx, cancel := context.WithTimeout(a.Context(), limit)
	a.Cleanup(cancel)
	return ctx
}

// acquire opens a volume for a container of its own name.
func (a *arena) acquire(volume string, disk int) error {
	return a.bed.Acquire(a.within(), volume, volume, pathOf(disk))
}

func (a *arena) open(volume string, disk int) {
	a.Helper()
	if err := a.acquire(volume, disk); err != nil {
		a.Fatal(err)
	}
}

// close lets go of a volume; one that is not open, or is lost and known to be, is closed already.
func (a *arena) close(volume string) {
	a.Helper()
	if err := a.bed.Release(a.within(), volume); err != nil {
		a.Fatal(err)
	}
}

// closeLost closes a volume that must turn out to be lost, and stay so.
func (a *arena) closeLost(volume string, disk int) {
	a.Helper()
	a.isLoss(volume, a.bed.Release(a.within(), volume))
	a.isLoss(volume, a.acquire(volume, disk))
	a.is(volume, "failed")
}

// isLoss expects the error of a volume that is lost.
func (a *arena) isLoss(volume string, err error) {
	a.Helper()
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "volume "+volume+":") || strings.Contains(err.Error(), "\n") {
		a.Errorf("volume %s: %v, want that it is lost, in one line with its name", volume, err)
		return
	}
	a.Log(err)
}

func (a *arena) status(volume string) *sealvolv1.Volume {
	a.Helper()
	status, err := a.bed.Volume(volume)
	if err != nil {
		a.Fatal(err)
	}
	return status
}

// is expects a state.
func (a *arena) is(volume, state string) {
	a.Helper()
	if status := a.status(volume); status.State != state {
		a.Errorf("status %v, want it %s", status, state)
	}
}

// at calls do with the folder where a volume is attached meanwhile.
func (a *arena) at(volume string, do func(dir string)) {
	a.Helper()
	if err := a.bed.At(volume, func(dir string) error { do(dir); return nil }); err != nil {
		a.Fatal(err)
	}
}

// works uses a volume as if nothing had happened.
func (a *arena) works(volume string) {
	a.Helper()
	a.at(volume, func(dir string) {
		data := content(a.Name(), 32)
		a.write(filepath.Join(dir, "works"), data)
		if failed := verify(a.T, filepath.Join(dir, "works"), data); len(failed) > 0 {
			a.Errorf("volume %s: blocks %v do not read", volume, failed)
		}
	})
}

// write writes a file that must get to the disk.
func (a *arena) write(file string, data []byte) {
	a.Helper()
	if err := write(file, data); err != nil {
		a.Fatal(err)
	}
}

// recorder passes the service's log on to the test and keeps it.
type recorder struct {
	mu   sync.Mutex
	to   io.Writer
	text strings.Builder
}

func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.text.Write(b)
	return r.to.Write(b)
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}
