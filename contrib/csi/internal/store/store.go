// Package store keeps volumes as sparse files in a folder of the host, and never
// promises more of the disk than there is:
//
//	ROOT/lock                 held by the driver that has the folder
//	ROOT/pvc-1/volume.json    {"version": 1, "id": "pvc-1", "bytes": 1073741824}
//	ROOT/pvc-1/disk.img       the volume
//	ROOT/.new-pvc-2/          being made
//	ROOT/.gone-pvc-3.1/       being deleted
//
// A volume appears and goes with a rename of its folder, so a crash leaves a whole
// volume or a hidden folder, which the next [Open] removes. Its volume.json is
// written anew from the disk when it is lost, torn or does not fit the disk. That of
// a newer driver is left alone, and a disk that is shorter than it says is a damaged
// volume, not a smaller one.
//
// Nothing here looks into a disk or makes a file system: a guest does. The package
// imports shim/hotplug, for its rule of names, shim/atomicfile, and no other
// package of the project.
package store

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/atomicfile"
	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	// Granule is what sizes are multiples of, in bytes.
	Granule = 1 << 20

	// DefaultBytes is the size of a volume that is asked for without one.
	DefaultBytes = 1 << 30

	diskName  = "disk.img"
	stateName = "volume.json"
	newPrefix = ".new-"
	oldPrefix = ".gone-"
)

// Volume is a volume of a [Store].
type Volume struct {
	// ID is its name here and in hotplug requests, a DNS label.
	ID string
	// Bytes is the size of its disk.
	Bytes int64
	// File is its disk.
	File string
}

// Range is the size that somebody wants, in bytes: at least Required, at most
// Limit; 0 is no wish.
type Range struct{ Required, Limit int64 }

// Store is an open folder of volumes. Its methods may be called from many
// goroutines; those that change something take turns.
type Store struct {
	root     string
	capacity int64 // to be promised at most; 0: what the file system has
	statfs   func(path string, stat *unix.Statfs_t) error
	truncate func(disk *os.File, bytes int64) error // when a disk is to have its size
	sync     func(folder string) error
	log      *slog.Logger
	lock     *os.File

	// mu is held for whole operations, but for the removal of what is in no book any
	// more: capacity is of all volumes together.
	mu      sync.Mutex
	volumes map[string]Volume
	retired int // counts, so that each folder that is being deleted has a name of its own
}

// Open opens the store in a folder, which is made if need be, and mends it. Its
// volumes are never promised more than capacity in bytes, if that is not 0, nor
// more than the file system has. A folder that another driver has is an
// errdefs.ErrUnavailable, one that others may enter an errdefs.ErrFailedPrecondition.
func Open(root string, capacity int64, log *slog.Logger) (*Store, error) {
	return open(root, capacity, unix.Statfs, log)
}

func open(root string, capacity int64, statfs func(string, *unix.Statfs_t) error, log *slog.Logger) (_ *Store, err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	// What is in a disk is sealed, but not how much of it. A folder that is open to
	// others may be another one, named here by mistake: it is not ours to close.
	info, err := os.Stat(root)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s is %v and not its owner's alone: chmod it to 0700 if it is for volumes, or name another folder: %w", root, info.Mode(), errdefs.ErrFailedPrecondition)
	}
	lock, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: another driver has these volumes: stop it: %w: %w", root, err, errdefs.ErrUnavailable)
	}
	s := &Store{root: root, capacity: capacity, statfs: statfs, truncate: (*os.File).Truncate, sync: syncFolder, log: log, lock: lock, volumes: map[string]Volume{}}
	return s, s.load()
}

// Close lets another driver have the folder.
func (s *Store) Close() error { return s.lock.Close() }

// load finds the volumes, and mends what a crash left.
func (s *Store) load() error {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := entry.Name()
		path := filepath.Join(s.root, name)
		switch {
		case isHalf(name):
			if err := os.RemoveAll(path); err != nil {
				s.log.Error("a volume that was half made or half deleted cannot be removed; see why, and remove it", "folder", path, "error", err)
				continue
			}
			s.log.Warn("removed a volume that was half made or half deleted", "folder", path)
		case hotplug.CheckName(name) != nil || !entry.IsDir():
			continue // the lock, lost+found
		default:
			v, err := s.mend(name)
			if err != nil {
				// One broken folder must not take the others from their pods.
				s.log.Error("this is no volume, and is left alone; see what it is and remove it", "folder", path, "error", err)
				continue
			}
			s.volumes[name] = v
		}
	}
	return nil
}

// isHalf says whether a folder is that of a volume that was being made or deleted.
func isHalf(name string) bool {
	if id, ok := strings.CutPrefix(name, newPrefix); ok {
		return hotplug.CheckName(id) == nil
	}
	rest, ok := strings.CutPrefix(name, oldPrefix)
	id, _, _ := strings.Cut(rest, ".")
	return ok && hotplug.CheckName(id) == nil
}

// mend gives a volume of the disk. What volume.json says is only believed if it
// fits the disk.
func (s *Store) mend(id string) (Volume, error) {
	v := Volume{ID: id, File: s.Disk(id)}
	told, stateErr := readState(s.state(id))
	info, err := os.Lstat(v.File)
	if errors.Is(err, fs.ErrNotExist) && stateErr == nil && told.id == id {
		// It stays a volume, so that it is reported as lost and can be deleted.
		s.log.Error("the disk of a volume is lost", "volume", id, "file", v.File)
		v.Bytes = told.bytes
		return v, nil
	}
	if err != nil {
		return Volume{}, err
	}
	if !info.Mode().IsRegular() {
		return Volume{}, fmt.Errorf("%s is %v: %w", v.File, info.Mode(), errdefs.ErrDataLoss)
	}
	v.Bytes = info.Size()
	switch {
	case stateErr == nil && told == (state{id, v.Bytes}):
		return v, nil
	case errdefs.IsFailedPrecondition(stateErr):
		s.log.Error("volume.json is a newer driver's and stays as it is", "volume", id, "bytes", v.Bytes, "error", stateErr)
		return v, nil
	case stateErr == nil && told.id == id && v.Bytes < told.bytes:
		s.log.Error("the disk of a volume is cut short", "volume", id, "file", v.File, "bytes", v.Bytes, "of", told.bytes)
		v.Bytes = told.bytes
		return v, nil
	case stateErr == nil:
		stateErr = fmt.Errorf("it says %q of %d bytes", told.id, told.bytes)
	}
	s.log.Warn("volume.json is written anew from the disk", "volume", id, "bytes", v.Bytes, "error", stateErr)
	if err := s.write(v, s.state(id)); err != nil {
		// The volume is whole: without it, what its pod has would count as nobody's.
		s.log.Error("volume.json cannot be written, the next start tries again", "volume", id, "error", err)
	}
	return v, nil
}

func (s *Store) state(id string) string { return filepath.Join(s.root, id, stateName) }

func (s *Store) write(v Volume, path string) error {
	data, err := state{v.ID, v.Bytes}.encode()
	if err != nil {
		return err
	}
	return atomicfile.Write(path, data, 0o600)
}

// Create makes a volume, or gives the one that is there if its size will do.
// One of another size is an errdefs.ErrAlreadyExists, a size that cannot be an
// errdefs.ErrOutOfRange, one that does not fit any more an
// errdefs.ErrResourceExhausted.
func (s *Store) Create(id string, size Range) (Volume, error) {
	if err := hotplug.CheckName(id); err != nil {
		return Volume{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	bytes, err := size.bytes()
	if err != nil {
		return Volume{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.volumes[id]; ok {
		if v.Bytes < size.Required || size.Limit > 0 && v.Bytes > size.Limit {
			return Volume{}, fmt.Errorf("volume %q has %d bytes, not between %d and %d: %w", id, v.Bytes, size.Required, size.Limit, errdefs.ErrAlreadyExists)
		}
		return v, nil
	}
	if err := s.reserve(bytes); err != nil {
		return Volume{}, fmt.Errorf("volume %q: %w", id, err)
	}
	v := Volume{ID: id, Bytes: bytes, File: s.Disk(id)}
	if err := s.make(v); err != nil {
		return Volume{}, fmt.Errorf("make volume %q: %w", id, err)
	}
	s.volumes[id] = v
	return v, nil
}

// make makes the folder of a volume, whole or not at all.
func (s *Store) make(v Volume) (err error) {
	fresh := filepath.Join(s.root, newPrefix+v.ID)
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(fresh))
		}
	}()
	disk, err := os.OpenFile(filepath.Join(fresh, diskName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(s.truncate(disk, v.Bytes), disk.Sync(), disk.Close()); err != nil {
		return err
	}
	if err := s.write(v, filepath.Join(fresh, stateName)); err != nil { // syncs the folder too
		return err
	}
	whole := filepath.Join(s.root, v.ID)
	if err := os.Rename(fresh, whole); err != nil {
		return err
	}
	if err := s.sync(s.root); err != nil {
		return errors.Join(err, os.RemoveAll(whole))
	}
	return nil
}

func syncFolder(folder string) error {
	dir, err := os.Open(folder)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Owns says whether a file is where this store has its disks, of volumes that are gone too.
func (s *Store) Owns(file string) bool {
	return filepath.Base(file) == diskName && filepath.Dir(filepath.Dir(file)) == s.root
}

// Disk is where this store has the disk of a volume, of one that is gone too.
func (s *Store) Disk(id string) string { return filepath.Join(s.root, id, diskName) }

// Get gives a volume; one that is not there is an errdefs.ErrNotFound.
func (s *Store) Get(id string) (Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.get(id)
}

func (s *Store) get(id string) (Volume, error) {
	v, ok := s.volumes[id]
	if !ok {
		return Volume{}, fmt.Errorf("no volume %q on this node: %w", id, errdefs.ErrNotFound)
	}
	return v, nil
}

// List gives all volumes, sorted by id.
func (s *Store) List() []Volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.volumes), func(a, b Volume) int { return cmp.Compare(a.ID, b.ID) })
}

// Expand makes a volume larger. A volume that is large enough stays as it is, one
// that a sandbox has is an errdefs.ErrFailedPrecondition, and else the errors are
// those of [Store.Create].
func (s *Store) Expand(id string, size Range) (Volume, error) {
	bytes, err := size.bytes()
	if err != nil {
		return Volume{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.get(id)
	if err != nil {
		return Volume{}, err
	}
	if size.Limit > 0 && v.Bytes > size.Limit {
		return Volume{}, fmt.Errorf("volume %q has %d bytes already, more than %d: %w", id, v.Bytes, size.Limit, errdefs.ErrOutOfRange)
	}
	if v.Bytes >= size.Required {
		return v, nil
	}
	disk, err := lockDisk(v)
	if err != nil {
		return Volume{}, err
	}
	defer disk.Close()
	if _, err := readState(s.state(id)); errdefs.IsFailedPrecondition(err) {
		return Volume{}, fmt.Errorf("expand volume %q: %w", id, err)
	}
	switch info, err := disk.Stat(); {
	case err != nil:
		return Volume{}, err
	case info.Size() < v.Bytes:
		return Volume{}, fmt.Errorf("expand volume %q: its disk has %d of %d bytes: %w", id, info.Size(), v.Bytes, errdefs.ErrDataLoss)
	}
	if err := s.reserve(bytes - v.Bytes); err != nil {
		return Volume{}, fmt.Errorf("volume %q: %w", id, err)
	}
	larger := v
	larger.Bytes = bytes
	if err := errors.Join(s.truncate(disk, bytes), disk.Sync()); err != nil {
		return Volume{}, errors.Join(fmt.Errorf("expand volume %q: %w", id, err), disk.Truncate(v.Bytes))
	}
	if err := s.write(larger, s.state(id)); err != nil {
		// Nobody has written beyond the old end: we have the disk's lock.
		return Volume{}, errors.Join(fmt.Errorf("expand volume %q: %w", id, err), disk.Truncate(v.Bytes))
	}
	s.volumes[id] = larger
	return larger, nil
}

// Delete removes a volume with its data. One that is not there is no error, one
// that a sandbox has an errdefs.ErrFailedPrecondition.
func (s *Store) Delete(id string) error {
	if err := hotplug.CheckName(id); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	disk, err := s.retire(id)
	if disk != nil {
		defer disk.Close()
	}
	if err != nil {
		return fmt.Errorf("delete volume %q: %w", id, err)
	}
	// A full disk takes a while, in which others are made and deleted.
	entries, err := os.ReadDir(s.root)
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), oldPrefix+id+".") {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.root, entry.Name())))
		}
	}
	if err != nil {
		return fmt.Errorf("delete volume %q: %w", id, err)
	}
	return nil
}

// retire takes a volume out of the books and renames its folder, if there is one.
// It gives the disk, locked, if there is one, also with an error.
func (s *Store) retire(id string) (disk *os.File, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	disk, err = lockDisk(Volume{ID: id, File: s.Disk(id)})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	s.retired++
	gone := filepath.Join(s.root, fmt.Sprintf("%s%s.%d", oldPrefix, id, s.retired))
	if err := os.Rename(filepath.Join(s.root, id), gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return disk, err
	}
	delete(s.volumes, id)
	return disk, s.sync(s.root)
}

// lockDisk opens a disk that no sandbox has: a loop device on it, the shim's as well
// as that of a raw block volume, has an exclusive flock(2) of it for as long as
// anybody uses the device.
func lockDisk(v Volume) (*os.File, error) {
	disk, err := os.OpenFile(v.File, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(disk.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		disk.Close()
		return nil, fmt.Errorf("volume %q: a sandbox has its disk (%w): end the pod first: %w", v.ID, err, errdefs.ErrFailedPrecondition)
	}
	return disk, nil
}

// Available is how many bytes can still be promised, a multiple of [Granule].
func (s *Store) Available() (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.available()
}

func (s *Store) available() (int64, error) {
	var stat unix.Statfs_t
	if err := s.statfs(s.root, &stat); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", s.root, err)
	}
	free := int64(min(stat.Bavail, math.MaxInt64/uint64(stat.Bsize))) * stat.Bsize
	var promised int64
	for _, v := range s.volumes {
		promised += v.Bytes
		// What is not written yet is still to be had.
		written, err := v.Allocated()
		if err != nil {
			written = 0 // the disk is lost, and may come back
		}
		free -= max(0, v.Bytes-written)
	}
	if s.capacity > 0 {
		free = min(free, s.capacity-promised)
	}
	return max(0, free/Granule*Granule), nil
}

// Allocated is how many bytes of its disk the file system has given it, 0 before
// anybody has written there.
func (v Volume) Allocated() (int64, error) {
	var stat unix.Stat_t
	if err := unix.Stat(v.File, &stat); err != nil {
		return 0, fmt.Errorf("stat %s: %w", v.File, err)
	}
	return stat.Blocks * 512, nil
}

func (s *Store) reserve(bytes int64) error {
	available, err := s.available()
	if err != nil {
		return err
	}
	if bytes > available {
		return fmt.Errorf("%d bytes are asked for, %d are left on this node: %w", bytes, available, errdefs.ErrResourceExhausted)
	}
	return nil
}

// bytes is the size of a volume that somebody wants so.
func (r Range) bytes() (int64, error) {
	if r.Required < 0 || r.Limit < 0 {
		return 0, fmt.Errorf("a size of %d to %d bytes is negative: %w", r.Required, r.Limit, errdefs.ErrInvalidArgument)
	}
	if r.Limit > 0 && r.Limit < r.Required {
		return 0, fmt.Errorf("a size of at least %d and at most %d bytes cannot be: %w", r.Required, r.Limit, errdefs.ErrInvalidArgument)
	}
	wanted := r.Required
	if wanted == 0 {
		wanted = DefaultBytes
		if r.Limit > 0 {
			wanted = min(wanted, r.Limit/Granule*Granule)
		}
	}
	if wanted == 0 || wanted > math.MaxInt64-Granule {
		return 0, fmt.Errorf("no volume has between %d and %d bytes: %w", r.Required, r.Limit, errdefs.ErrOutOfRange)
	}
	wanted = (wanted + Granule - 1) / Granule * Granule
	if r.Limit > 0 && wanted > r.Limit {
		return 0, fmt.Errorf("sizes are multiples of %d, none is between %d and %d: %w", Granule, r.Required, r.Limit, errdefs.ErrOutOfRange)
	}
	return wanted, nil
}
