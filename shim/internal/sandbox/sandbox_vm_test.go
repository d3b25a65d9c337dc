//go:build vm

package sandbox

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRemoveTreeNeverRemovesWhatIsMounted(t *testing.T) {
	path, data := filepath.Join(t.TempDir(), "sb"), filepath.Join(t.TempDir(), "data")
	inner := filepath.Join(path, "shared", "c1", "rootfs")
	for _, folder := range []string{inner, data} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	precious := filepath.Join(data, "file")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{filepath.Join(path, "shared"), inner} {
		if err := os.MkdirAll(target, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(data, target, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(inner, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeTree(path); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}
