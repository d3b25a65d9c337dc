//go:build vm

package attack

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/integration/testbed"
)

// kill -9 of the service leaves mappings and mounts in the kernel, and with them keys; a container may use them still. The next service ends
// them: nobody can open them again.
func TestWhatAKilledServiceLeavesTheNextOneEnds(t *testing.T) {
	for pair := range slices.Chunk(kinds, 2) {
		t.Run(pair[0].name, func(t *testing.T) {
			dir := t.TempDir()
			container := t.TempDir()
			a := launch(t, dir)
			want := content("file", 16)
			for i, k := range pair {
				a.open(k.name, attacked+i)
				a.at(k.name, func(dir string) { a.write(filepath.Join(dir, "f"), want) })
			}
			used := pair[0].name
			attachedAt, err := a.bed.Attach(used)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(attachedAt, container, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(filepath.Join(container, "f"), os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := a.bed.Kill(); err != nil {
				t.Fatal(err)
			}
			if failed := verifyBlocks(t, f, want); len(failed) > 0 {
				t.Errorf("without a service blocks %v do not read", failed)
			}

			next := launch(t, dir)
			for _, k := range pair {
				if _, err := next.bed.Volume(k.name); err == nil {
					t.Errorf("a new service has volume %s", k.name)
				}
			}
			a.same("after the next service's start", verifyBlocks(t, f, want), span(0, 16))
			if left := mappings(t); len(left) > 1 {
				t.Errorf("mappings %q are there, of which the container uses one", left)
			}
			f.Close()
			if err := unix.Unmount(container, 0); err != nil {
				t.Fatal(err)
			}
			for ctx := next.within(); len(mappings(t)) > 0; time.Sleep(time.Millisecond) {
				if ctx.Err() != nil {
					t.Fatalf("mappings %q are there without a user", mappings(t))
				}
			}
			// The same disks are anybody's now.
			for i, k := range pair {
				next.open(k.name, second-i)
				next.at(k.name, func(dir string) {
					if _, err := os.Stat(filepath.Join(dir, "f")); !os.IsNotExist(err) {
						t.Errorf("volume %s is not new: %v", k.name, err)
					}
				})
				next.works(k.name)
			}
			if err := next.bed.Close(); err != nil {
				t.Error(err)
			}
			nothingLeft(t)
		})
	}
}

// mappings are what is left over of volumes' mappings.
func mappings(t *testing.T) (left []string) {
	t.Helper()
	all, err := testbed.LeftOver()
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		if strings.HasPrefix(one, "/sys/block/dm-") {
			left = append(left, one)
		}
	}
	return left
}
