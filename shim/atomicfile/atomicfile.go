// Package atomicfile writes small files so that a reader, also one after a
// crash, sees the old content or the new content and nothing in between.
package atomicfile

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Write puts a file with that content and mode at path. A file that is there
// already gives the new one its owner and mode instead.
func Write(path string, data []byte, mode os.FileMode) (err error) {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(file.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if old, err := os.Lstat(path); err == nil {
		mode = old.Mode().Perm()
		owner := old.Sys().(*syscall.Stat_t)
		if err := file.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
			return err
		}
	} else if !os.IsNotExist(err) {
		return err
	}
	if err := file.Chmod(mode); err != nil {
		return err
	}
	if _, err := file.Write(data); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
