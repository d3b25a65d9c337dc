package pci

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Device is a virtio-blk disk as the kernel knows it.
type Device struct {
	Name     string // for example "vda"
	Number   blockdev.Number
	Bytes    uint64
	ReadOnly bool
	Sequence uint64 // blockdev.Sequence: another disk in the same place has another one
}

// Node is the device's file.
func (d Device) Node() string { return "/dev/" + d.Name }

// sectorBytes is the unit of sysfs' size.
const sectorBytes = 512

// Find looks once at a path's device. sysfs is where sysfs is mounted. The error is errdefs.ErrNotFound when there is none (yet)
// and errdefs.ErrFailedPrecondition when what is there is not one plain virtio-blk disk.
func Find(sysfs string, path Path) (Device, error) {
	dir := filepath.Join(sysfs, "devices/pci0000:00")
	for slot := range strings.SplitSeq(path.text, "/") {
		functions, err := names(dir, regexp.MustCompile(`^0000:[0-9a-f]{2}:`+slot+`\.[0-7]$`))
		if err != nil {
			return Device{}, err
		}
		// A slot with several functions has several disks that this path does not tell apart.
		if len(functions) > 1 {
			return Device{}, notPlain(path, "slot %s has %d functions", slot, len(functions))
		}
		if len(functions) == 0 {
			return Device{}, notYet(path)
		}
		if !strings.HasSuffix(functions[0], ".0") {
			return Device{}, notPlain(path, "slot %s has function %s", slot, functions[0])
		}
		dir = filepath.Join(dir, functions[0])
	}
	for _, step := range []*regexp.Regexp{virtioName, blockDir, diskName} {
		found, err := names(dir, step)
		if err != nil {
			return Device{}, err
		}
		if len(found) == 0 {
			return Device{}, notYet(path)
		}
		if len(found) > 1 {
			return Device{}, notPlain(path, "it has %s", strings.Join(found, " and "))
		}
		dir = filepath.Join(dir, found[0])
	}
	return read(path, dir)
}

var (
	virtioName = regexp.MustCompile(`^virtio[0-9]+$`)
	blockDir   = regexp.MustCompile(`^block$`)
	// diskName takes every name: a block device that is not called as virtio-blk calls its own is refused, not overlooked.
	diskName = regexp.MustCompile(``)
	vdName   = regexp.MustCompile(`^vd[a-z]+$`)
)

func read(path Path, dir string) (Device, error) {
	device := Device{Name: filepath.Base(dir)}
	if !vdName.MatchString(device.Name) {
		return Device{}, notPlain(path, "block device %s is not virtio-blk's", device.Name)
	}
	number, err := attribute(path, dir, "dev")
	if err != nil {
		return Device{}, err
	}
	if device.Number, err = blockdev.ParseNumber(number); err != nil {
		return Device{}, err
	}
	sectors, err := attributeNumber(path, dir, "size")
	if err != nil {
		return Device{}, err
	}
	device.Bytes = sectors * sectorBytes
	if device.Sequence, err = attributeNumber(path, dir, "diskseq"); err != nil {
		return Device{}, err
	}
	readOnly, err := attributeNumber(path, dir, "ro")
	if err != nil {
		return Device{}, err
	}
	device.ReadOnly = readOnly != 0
	return device, nil
}

func attribute(path Path, dir, name string) (string, error) {
	content, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return "", notYet(path)
	}
	return strings.TrimSuffix(string(content), "\n"), err
}

func attributeNumber(path Path, dir, name string) (uint64, error) {
	content, err := attribute(path, dir, name)
	if err != nil {
		return 0, err
	}
	value, err := strconv.ParseUint(content, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s of %s: %w", name, dir, err)
	}
	return value, nil
}

// names lists what is in a folder and fits the pattern. A folder that is not there has nothing in it: devices come and go meanwhile.
func names(dir string, pattern *regexp.Regexp) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var found []string
	for _, entry := range entries {
		if pattern.MatchString(entry.Name()) {
			found = append(found, entry.Name())
		}
	}
	return found, nil
}

func notYet(path Path) error {
	return fmt.Errorf("no disk at PCI path %v: %w", path, errdefs.ErrNotFound)
}

func notPlain(path Path, format string, args ...any) error {
	return fmt.Errorf("PCI path %v is not one virtio-blk disk: %s: %w", path, fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition)
}
