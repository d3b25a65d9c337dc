// Package published is the record that a CSI driver leaves for the plugin: which
// backing file stands behind a folder that kubelet mounts into containers. Nothing
// is mounted on that folder. The plugin finds the record by the source of a
// container's mount and asks for a sealed volume in the mount's place.
//
// The format belongs to the plugin, and any driver may write it: below a folder,
// [Root] by default, that its owner alone may enter, a file for each target, named
// by the hex SHA-256 of the target, in strict JSON:
//
//	{"version": 1, "name": "pvc-1", "target": "/var/lib/kubelet/pods/…/mount", "file": "/var/lib/…/disk.img", "readOnly": false}
//
// It is written to a temporary name, synced and renamed, so that a reader sees all
// of it or nothing. The guest trusts nothing of it.
//
// The package imports shim/hotplug, for its rules of names and paths, and
// shim/atomicfile, and no other package of the project.
package published

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	strictjson "sigs.k8s.io/json"

	"github.com/sealvol/sealvol/shim/atomicfile"
	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	// Root is where the plugin looks for records. It does not outlive a boot, nor
	// does what kubelet has published.
	Root = "/run/sealvol/published"

	// Version is the only version of a record that there is.
	Version = 1

	// MaxSize is the largest record that is read or written, in bytes. Two paths of PATH_MAX
	// fit, also where each of their bytes is escaped.
	MaxSize = 64 << 10
)

// fileRE is the name of a record. Others, of files that are being written, are not looked at.
var fileRE = regexp.MustCompile(`^[0-9a-f]{64}$`)

// partRE is the name of a record that is being written (atomicfile.Write).
var partRE = regexp.MustCompile(`^\.[0-9a-f]{64}-[0-9]+$`)

// Volume is a volume that is published at a target.
type Volume struct {
	// Name is the volume's name in hotplug requests, a DNS label: that of the
	// PersistentVolume, or one that the driver made for a volume of a pod's manifest.
	// It is the node's name for it; the policy has its own.
	Name string
	// Target is the folder that kubelet asked for, as a container's mount has it for
	// its source: absolute and clean, with symbolic links resolved.
	Target string
	// File is the backing file on the host, absolute and clean.
	File string
	// ReadOnly says that containers are to have the volume read-only.
	ReadOnly bool
}

// Dir is a folder of records, [Root] but in tests.
type Dir string

type wireVolume struct {
	Version  int    `json:"version"`
	Name     string `json:"name"`
	Target   string `json:"target"`
	File     string `json:"file"`
	ReadOnly *bool  `json:"readOnly"`
}

// Write makes the record of a volume, in the place of one that is there for its
// target, and the folder if need be. A volume that is not as documented is an
// errdefs.ErrInvalidArgument, a folder that others may enter an
// errdefs.ErrFailedPrecondition.
func (d Dir) Write(v Volume) error {
	data, err := encode(v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	if err := d.check(); err != nil {
		return err
	}
	return atomicfile.Write(d.path(v.Target), data, 0o600)
}

// Remove removes the record of a target, if there is one.
func (d Dir) Remove(target string) error {
	if err := os.Remove(d.path(target)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Find gives the volume that is published at the source of a container's mount.
// Where there is none the error is an errdefs.ErrNotFound. A record that is not
// as documented, or that others than its reader could have written, is never that:
// it is an errdefs.ErrDataLoss or errdefs.ErrFailedPrecondition.
func (d Dir) Find(source string) (Volume, error) {
	if hotplug.CheckPath(source) != nil {
		// No target is like that, so no record can be: the "proc" of a mount of /proc, say.
		return Volume{}, fmt.Errorf("nothing is published at %q: %w", source, errdefs.ErrNotFound)
	}
	switch err := d.check(); {
	case errors.Is(err, fs.ErrNotExist):
		return Volume{}, fmt.Errorf("nothing is published at %s: %w", source, errdefs.ErrNotFound)
	case err != nil:
		return Volume{}, err
	}
	v, err := d.read(d.path(source))
	if errors.Is(err, fs.ErrNotExist) {
		return Volume{}, fmt.Errorf("nothing is published at %s: %w", source, errdefs.ErrNotFound)
	}
	if err != nil {
		return Volume{}, fmt.Errorf("what is published at %s: %w", source, err)
	}
	return v, nil
}

// Sweep removes what writers that were killed have left. Another driver that writes
// just now gets an error, upon which its caller tries again.
func (d Dir) Sweep() error {
	switch err := d.check(); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		if !partRE.MatchString(entry.Name()) {
			continue
		}
		if err := os.Remove(filepath.Join(string(d), entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// List gives all that is published, in no order. A record that is not as documented
// is left out and is in the error, which does not keep the others from being given.
func (d Dir) List() ([]Volume, error) {
	switch err := d.check(); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	var volumes []Volume
	var errs []error
	for _, entry := range entries {
		if !fileRE.MatchString(entry.Name()) {
			continue
		}
		switch v, err := d.read(filepath.Join(string(d), entry.Name())); {
		case err == nil:
			volumes = append(volumes, v)
		case !errors.Is(err, fs.ErrNotExist): // it may have been removed meanwhile
			errs = append(errs, err)
		}
	}
	return volumes, errors.Join(errs...)
}

func (d Dir) path(target string) string {
	sum := sha256.Sum256([]byte(target))
	return filepath.Join(string(d), hex.EncodeToString(sum[:]))
}

// check demands that nobody else can put records into the folder: whoever can
// chooses which file of the node is lent to a guest.
func (d Dir) check() error {
	info, err := os.Lstat(string(d))
	if err != nil {
		return err
	}
	return checkOwn(string(d), info, info.IsDir())
}

func checkOwn(path string, info fs.FileInfo, kind bool) error {
	owner := info.Sys().(*syscall.Stat_t).Uid
	if !kind || int(owner) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is %v of user %d, and not this user's alone: remove it: %w", path, info.Mode(), owner, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// read reads the record in a file, whose name must be that of its target.
func (d Dir) read(path string) (Volume, error) {
	// O_NONBLOCK: a pipe in the file's place must not keep us waiting.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return Volume{}, fmt.Errorf("%w: remove it: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return Volume{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return Volume{}, err
	}
	if err := checkOwn(path, info, info.Mode().IsRegular()); err != nil {
		return Volume{}, err
	}
	data, err := io.ReadAll(io.LimitReader(file, MaxSize+1))
	if err != nil {
		return Volume{}, err
	}
	v, err := parse(data)
	if err == nil && d.path(v.Target) != path {
		err = fmt.Errorf("target %q is another's", v.Target)
	}
	if err != nil {
		return Volume{}, fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	return v, nil
}

func encode(v Volume) ([]byte, error) {
	if err := v.check(); err != nil {
		return nil, fmt.Errorf("published volume: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	// Escaping for HTML could make a record that was read grow over MaxSize.
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(wireVolume{Version, v.Name, v.Target, v.File, &v.ReadOnly}); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func parse(data []byte) (Volume, error) {
	if len(data) > MaxSize {
		return Volume{}, fmt.Errorf("more than %d bytes", MaxSize)
	}
	if !utf8.Valid(data) {
		return Volume{}, errors.New("not UTF-8")
	}
	var wire wireVolume
	strict, err := strictjson.UnmarshalStrict(data, &wire)
	if err := errors.Join(append(strict, err)...); err != nil {
		return Volume{}, errors.New(strings.ReplaceAll(err.Error(), "\n", ", "))
	}
	if wire.Version != Version {
		return Volume{}, fmt.Errorf("version %d, not %d", wire.Version, Version)
	}
	if wire.ReadOnly == nil {
		return Volume{}, errors.New("no readOnly")
	}
	v := Volume{wire.Name, wire.Target, wire.File, *wire.ReadOnly}
	return v, v.check()
}

func (v Volume) check() error {
	if err := hotplug.CheckName(v.Name); err != nil {
		return err
	}
	if err := hotplug.CheckPath(v.Target); err != nil {
		return fmt.Errorf("target %w", err)
	}
	if err := hotplug.CheckPath(v.File); err != nil {
		return fmt.Errorf("file %w", err)
	}
	return nil
}
