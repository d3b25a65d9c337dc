//go:build vm

package volume

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/policy"
)

// Every layering with every file system: sealed, in use, closed, opened again, with the group that the policy says.
func TestVMEveryLayeringAndFileSystemKeepsItsData(t *testing.T) {
	for _, layering := range []policy.Layering{policy.MemoryTags, policy.LUKS2} {
		for _, fs := range []policy.FSType{policy.Ext4, policy.XFS} {
			t.Run(fmt.Sprintf("%s/%s", layering, fs), func(t *testing.T) {
				m := newVM(t)
				change := func(v *policy.Volume) {
					*v = ofLayering(layering)
					v.FSType, v.FSGroup = fs, &policy.FSGroup{GID: 2000, ChangePolicy: policy.OnRootMismatch}
				}
				want := content(string(fs), 256)
				seal(t, m, "v", 0, change)
				at(t, m, "v", func(dir string) { write(t, filepath.Join(dir, "f"), want) })
				for range 2 {
					release(t, m, "v")
					seal(t, m, "v", 0, change)
					at(t, m, "v", func(dir string) {
						dropCaches(t)
						if failed := verify(t, filepath.Join(dir, "f"), want); failed != nil {
							t.Errorf("blocks %v do not read", failed)
						}
						if group := groupOf(t, dir); group != 2000 {
							t.Errorf("the root is group %d's", group)
						}
					})
				}
				status := m.Status()[0]
				if status.State != "open" || status.Faults != nil {
					t.Errorf("status %v", status)
				}
				for _, mapping := range status.Mappings {
					// "integrity DEVICE RESERVED TAG MODE": D is without a journal.
					fields := strings.Fields(mapping.Table)
					if fields[2] == "integrity" && fields[6] != "D" {
						t.Errorf("journaled: %s", mapping.Table)
					}
				}
				release(t, m, "v")
			})
		}
	}
}

func groupOf(t *testing.T, file string) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	return st.Gid
}
