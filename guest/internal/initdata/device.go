package initdata

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/errdefs"
)

// The disk, as Kata's prepareInitdataImage writes it:
//
//	0                 magic, "initdata"
//	8                 length of what follows, little-endian
//	16                the document, compressed by gzip
//	to a whole sector zeros
const (
	magic       = "initdata"
	headerBytes = 16
	sectorBytes = 512
	// maxCompressed bounds what is read before anything is unpacked.
	maxCompressed = MaxDocument
)

// Find looks once through the virtio-blk disks that the guest has now for the one with a document, reads it whole and parses it.
// sysfs is where sysfs is mounted and dev the folder of the devices' files.
//
// The error is errdefs.ErrNotFound when no disk has one, errdefs.ErrFailedPrecondition when two have, or one cannot be read, and
// errdefs.ErrInvalidArgument when what is on the disk is not as Kata writes it.
func Find(sysfs, dev string) (*Document, error) {
	entries, err := os.ReadDir(filepath.Join(sysfs, "block"))
	if err != nil {
		return nil, fmt.Errorf("init-data: %v: %w", err, errdefs.ErrFailedPrecondition)
	}
	virtioBlk := regexp.MustCompile(`^vd[a-z]+$`)
	var text []byte
	var found string
	for _, e := range entries {
		if !virtioBlk.MatchString(e.Name()) {
			continue
		}
		t, err := readDisk(filepath.Join(dev, e.Name()))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("init-data: disk %s: %w", e.Name(), err)
		}
		// Which of them would win is not for the host to choose.
		if found != "" {
			return nil, fmt.Errorf("init-data: disks %s and %s both have a document: %w", found, e.Name(), errdefs.ErrFailedPrecondition)
		}
		text, found = t, e.Name()
	}
	if found == "" {
		return nil, fmt.Errorf("init-data: no disk has a document: %w", errdefs.ErrNotFound)
	}
	return Parse(text)
}

// readDisk reads each byte once, so that the host cannot show another one later.
func readDisk(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
	}
	return read(f, size)
}

// read reads a disk of the given size. It is errdefs.ErrNotFound when the magic is missing.
func read(disk io.Reader, size int64) ([]byte, error) {
	if size < headerBytes {
		return nil, errdefs.ErrNotFound
	}
	var header [headerBytes]byte
	if _, err := io.ReadFull(disk, header[:]); err != nil {
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
	}
	if string(header[:len(magic)]) != magic {
		return nil, errdefs.ErrNotFound
	}
	length := binary.LittleEndian.Uint64(header[len(magic):])
	if length == 0 || length > maxCompressed {
		return nil, fmt.Errorf("%d compressed bytes, 1 to %d are taken: %w", length, maxCompressed, errdefs.ErrInvalidArgument)
	}
	whole := (headerBytes + int64(length) + sectorBytes - 1) / sectorBytes * sectorBytes
	if size != whole {
		return nil, fmt.Errorf("a disk of %d bytes for a document that fills %d: %w", size, whole, errdefs.ErrInvalidArgument)
	}
	rest := make([]byte, whole-headerBytes)
	if _, err := io.ReadFull(disk, rest); err != nil {
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
	}
	if len(bytes.Trim(rest[length:], "\x00")) > 0 {
		return nil, fmt.Errorf("something else than zeros behind the document: %w", errdefs.ErrInvalidArgument)
	}
	return unpack(rest[:length])
}

// unpack takes one gzip stream, and nothing behind it.
func unpack(compressed []byte) ([]byte, error) {
	r := bytes.NewReader(compressed)
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, fmt.Errorf("unpack: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	z.Multistream(false)
	text, err := io.ReadAll(io.LimitReader(z, MaxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("unpack: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(text) > MaxDocument {
		return nil, fmt.Errorf("unpack: more than %d bytes: %w", MaxDocument, errdefs.ErrInvalidArgument)
	}
	if r.Len() > 0 {
		return nil, fmt.Errorf("unpack: %d bytes behind the document: %w", r.Len(), errdefs.ErrInvalidArgument)
	}
	return text, nil
}
