//go:build vm

package filesystem

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func mountsBelow(t *testing.T, dir string) int {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(table), " "+dir)
}

// A service that is killed leaves its place behind, with a volume attached perhaps.
func TestVMAPlaceThatWasLeftBehindGoes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "volumes")
	left, err := NewPlace(dir)
	if err != nil {
		t.Fatal(err)
	}
	attached := filepath.Join(left.dir, "v")
	if err := os.Mkdir(attached, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("volume", attached, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(attached, "secret"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	place, err := NewPlace(dir)
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v: what was attached must be gone", entries, err)
	}
	if n := mountsBelow(t, dir); n != 1 {
		t.Errorf("%d mounts", n)
	}
	if err := place.Close(); err != nil {
		t.Error(err)
	}
	if n := mountsBelow(t, dir); n != 0 {
		t.Errorf("%d mounts are left", n)
	}
}
