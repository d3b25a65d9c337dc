// Package image makes the file-system images that the tests boot and run: the initial RAM disks of
// virtual machines and container images, from files of this machine and without a registry. The same
// input gives the same bytes: entries are sorted, owned by root and dated 1970.
package image

import (
	"archive/tar"
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
)

// File types of stat(2)'s st_mode, which cpio uses as they are.
const (
	typeMask    = 0o170000
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeLink    = 0o120000
)

// A Tree is a file system in memory, by absolute clean path. Its zero value is empty and ready.
type Tree struct {
	entries map[string]entry
}

type entry struct {
	mode uint32 // type and permissions, as in st_mode
	data []byte // of a regular file, or the target of a link
}

// Dir adds a directory, and its parents as far as they are missing.
func (t *Tree) Dir(name string) {
	name = path.Clean(name)
	if name == "/" {
		return
	}
	if _, ok := t.entries[name]; !ok {
		t.add(name, entry{mode: typeDir | 0o755})
	}
}

// File adds a regular file with the given permissions, and its parents.
func (t *Tree) File(name string, perm uint32, data []byte) {
	t.add(path.Clean(name), entry{mode: typeRegular | perm, data: data})
}

// Link adds a symbolic link, and its parents.
func (t *Tree) Link(name, target string) {
	t.add(path.Clean(name), entry{mode: typeLink | 0o777, data: []byte(target)})
}

// Copy adds a file of this machine, following links, with its executable bits.
func (t *Tree) Copy(name, source string) error {
	data, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	t.File(name, 0o644|uint32(info.Mode().Perm()&0o111), data)
	return nil
}

func (t *Tree) add(name string, e entry) {
	if t.entries == nil {
		t.entries = map[string]entry{}
	}
	t.Dir(path.Dir(name))
	t.entries[name] = e
}

func (t *Tree) names() []string {
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	slices.Sort(names) // puts parents before children
	return names
}

// WriteCPIO writes the tree as the kernel unpacks it from an initial RAM disk: cpio's "newc" format
// (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
func (t *Tree) WriteCPIO(w io.Writer) error {
	buf := bufio.NewWriterSize(w, 1<<20)
	inode := 0
	put := func(name string, e entry) {
		inode++
		links := 1
		if e.mode&typeMask == typeDir {
			links = 2
		}
		header := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
			inode, e.mode, 0, 0, links, 0, len(e.data), 0, 0, 0, 0, len(name)+1, 0, name)
		buf.WriteString(header)
		buf.Write(make([]byte, pad4(len(header))))
		buf.Write(e.data)
		buf.Write(make([]byte, pad4(len(e.data))))
	}
	for _, name := range t.names() {
		put(strings.TrimPrefix(name, "/"), t.entries[name])
	}
	inode = -1 // the trailer has inode 0
	put("TRAILER!!!", entry{})
	return buf.Flush() // bufio keeps the first error
}

func pad4(n int) int { return -n & 3 }

// WriteTar writes the tree as a tar archive, the form of a container image's layer.
func (t *Tree) WriteTar(w io.Writer) error {
	archive := tar.NewWriter(w)
	for _, name := range t.names() {
		e := t.entries[name]
		header := tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: int64(e.mode &^ typeMask)}
		switch e.mode & typeMask {
		case typeDir:
			header.Typeflag, header.Name = tar.TypeDir, header.Name+"/"
		case typeLink:
			header.Typeflag, header.Linkname = tar.TypeSymlink, string(e.data)
		default:
			header.Typeflag, header.Size = tar.TypeReg, int64(len(e.data))
		}
		if err := archive.WriteHeader(&header); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if header.Typeflag == tar.TypeReg {
			if _, err := archive.Write(e.data); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return archive.Close()
}
