package boot

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestModulesFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := loadModules(filepath.Join(dir, "absent")); err != nil {
		t.Errorf("no file means no modules: %v", err)
	}
	list := filepath.Join(dir, "modules")
	if err := os.WriteFile(list, []byte("\n/absent/first.ko\n/absent/second.ko\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := loadModules(list); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "first.ko") {
		t.Errorf("got %v", err)
	}
}

func TestDelegateEnablesEachController(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := delegate(root); err == nil {
		t.Error("no cgroup file system, no error")
	}
	if err := os.WriteFile(filepath.Join(root, "cgroup.controllers"), []byte("cpu memory\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := delegate(root); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(root, "cgroup.subtree_control"))
	if err != nil || string(got) != "+memory" { // the last of two writes
		t.Errorf("got %q, %v", got, err)
	}
}
