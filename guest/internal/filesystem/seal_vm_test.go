//go:build vm

package filesystem

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestVMAFileSystemIsMadeMountedAndMountedAgain(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		for _, size := range []uint64{kind.MinBytes(), 1 << 30, 10 << 30, 100 << 30} {
			t.Run(sizeName(size), func(t *testing.T) {
				device := sealed(t, size)
				failed := complaints(t, func() {
					format(t, kind, device)
					m := open(t, kind, device)
					var st unix.Statfs_t
					if err := unix.Fstatfs(int(m.root.Fd()), &st); err != nil {
						t.Fatal(err)
					}
					t.Logf("size %.2f %%, free %.2f %%, available %.2f %%, %d inodes", percent(st.Blocks, size), percent(st.Bfree, size), percent(st.Bavail, size), st.Files)
					if size >= 10<<30 && percent(st.Bavail, size) < 98 {
						t.Errorf("%d of %d bytes are available", st.Bavail*BlockBytes, size)
					}
					if err := os.WriteFile(filepath.Join(dir(m), "f"), []byte("content"), 0o600); err != nil {
						t.Fatal(err)
					}
					if err := closed(t, m); err != nil {
						t.Error(err)
					}
					m = open(t, kind, device)
					got, err := os.ReadFile(filepath.Join(dir(m), "f"))
					if err != nil || string(got) != "content" {
						t.Errorf("read %q, %v", got, err)
					}
					if err := closed(t, m); err != nil {
						t.Error(err)
					}
				})
				if failed != nil {
					t.Errorf("the kernel says %q", failed)
				}
			})
		}
	})
}

func percent(blocks, size uint64) float64 { return 100 * float64(blocks*BlockBytes) / float64(size) }

func sizeName(size uint64) string {
	if size < 1<<30 {
		return "the smallest"
	}
	return map[uint64]string{1 << 30: "1 GiB", 10 << 30: "10 GiB", 20 << 30: "20 GiB", 100 << 30: "100 GiB"}[size]
}
