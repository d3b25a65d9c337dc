package device

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Disk is a disk as the kernel knows it.
type Disk struct {
	Name     string // for example "vda"
	Number   blockdev.Number
	Bytes    uint64
	ReadOnly bool
	Sequence uint64 // blockdev.Sequence: another disk in the same place has another one
}

// Node is the disk's file.
func (d Disk) Node() string { return "/dev/" + d.Name }

// Find looks once at what is at an address. sysfs is where sysfs is mounted. The error is errdefs.ErrNotFound when nothing is there
// (yet) and errdefs.ErrFailedPrecondition when what is there is not one plain disk of the address's driver.
func Find(sysfs string, address Address) (Disk, error) {
	dir, err := locate(sysfs, address)
	if err != nil {
		return Disk{}, fmt.Errorf("%v: %w", address, err)
	}
	disk, err := read(dir)
	if err != nil {
		return Disk{}, fmt.Errorf("%v: %w", address, err)
	}
	return disk, nil
}

// locate returns the block device's folder.
func locate(sysfs string, address Address) (string, error) {
	switch address.driver {
	case blk:
		return locatePCI(sysfs, address.source)
	case scsi:
		return locateSCSI(sysfs, address.source)
	case mmioBlk:
		return locateMMIO(sysfs, address.source)
	}
	return "", fmt.Errorf("no address: %w", errdefs.ErrInvalidArgument)
}

// locatePCI goes down the slots. The numbers of the buses between them are the firmware's and say nothing.
func locatePCI(sysfs, path string) (string, error) {
	dir := filepath.Join(sysfs, "devices/pci0000:00")
	for slot := range strings.SplitSeq(path, "/") {
		functions, err := names(dir, regexp.MustCompile(`^0000:[0-9a-f]{2}:`+slot+`\.[0-7]$`))
		if err != nil {
			return "", err
		}
		// A slot with several functions has several disks that this path does not tell apart.
		if len(functions) > 1 {
			return "", notPlain("slot %s has %d functions", slot, len(functions))
		}
		if len(functions) == 0 {
			return "", errNotYet
		}
		if !strings.HasSuffix(functions[0], ".0") {
			return "", notPlain("slot %s has function %s", slot, functions[0])
		}
		dir = filepath.Join(dir, functions[0])
	}
	return locateVirtioBlk(dir)
}

// locateMMIO goes up from the kernel's name, which must be a disk's on virtio-mmio and not, say, the other name of one that has a PCI path.
func locateMMIO(sysfs, node string) (string, error) {
	named, err := filepath.EvalSymlinks(filepath.Join(sysfs, "class/block", filepath.Base(node)))
	if errors.Is(err, os.ErrNotExist) {
		return "", errNotYet
	}
	if err != nil {
		return "", err
	}
	transport := filepath.Dir(filepath.Dir(filepath.Dir(named))) // of TRANSPORT/virtio0/block/vda
	driver, err := os.Readlink(filepath.Join(transport, "driver"))
	if err != nil || filepath.Base(driver) != "virtio-mmio" || filepath.Base(filepath.Dir(filepath.Dir(driver))) != "platform" {
		return "", notPlain("%s is on another bus than virtio-mmio", filepath.Base(node))
	}
	dir, err := locateVirtioBlk(transport)
	if err == nil && dir != named {
		return "", notPlain("%s has %s", filepath.Base(transport), filepath.Base(dir))
	}
	return dir, err
}

// The virtio specification's device types, as sysfs writes them.
const (
	virtioTypeBlk  = "0x0002"
	virtioTypeSCSI = "0x0008"
)

var (
	virtioName = regexp.MustCompile(`^virtio[0-9]+$`)
	hostName   = regexp.MustCompile(`^host[0-9]+$`)
	blockDir   = regexp.MustCompile(`^block$`)
	// anyName takes every name: a block device that is not called as its driver calls its own is refused, not overlooked.
	anyName = regexp.MustCompile(``)
	vdName  = regexp.MustCompile(`^vd[a-z]+$`)
	sdName  = regexp.MustCompile(`^sd[a-z]+$`)
)

// locateVirtioBlk goes down from a PCI function, or from its like on another bus.
func locateVirtioBlk(transport string) (string, error) {
	dir, err := only(transport, virtioName)
	if err != nil {
		return "", err
	}
	kind, err := attribute(dir, "device")
	if err != nil {
		return "", err
	}
	if kind != virtioTypeBlk {
		return "", notPlain("it is a virtio device of type %s", kind)
	}
	return locateBlock(dir, vdName)
}

// locateSCSI goes down from the one virtio-scsi controller. Kata gives the machine one and writes no number for it; with two the address
// would name two disks.
func locateSCSI(sysfs, address string) (string, error) {
	controllers, err := virtioDevices(sysfs, virtioTypeSCSI)
	if err != nil {
		return "", err
	}
	if len(controllers) > 1 {
		return "", notPlain("there are %d virtio-scsi controllers", len(controllers))
	}
	if len(controllers) == 0 {
		return "", errNotYet
	}
	host, err := only(controllers[0], hostName)
	if err != nil {
		return "", err
	}
	bus := strings.TrimPrefix(filepath.Base(host), "host") + ":0:" // virtio-scsi has one channel
	id, _, _ := strings.Cut(address, ":")
	dir := filepath.Join(host, "target"+bus+id, bus+address)
	kind, err := attribute(dir, "type")
	if err != nil {
		return "", err
	}
	if kind != "0" { // TYPE_DISK of scsi/scsi_proto.h
		return "", notPlain("it is a SCSI device of type %s", kind)
	}
	return locateBlock(dir, sdName)
}

// virtioDevices are the virtio devices of a type, on whatever bus.
func virtioDevices(sysfs, kind string) (found []string, err error) {
	dir := filepath.Join(sysfs, "bus/virtio/devices")
	devices, err := names(dir, virtioName)
	if err != nil {
		return nil, err
	}
	for _, name := range devices {
		got, err := attribute(filepath.Join(dir, name), "device")
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		if got == kind {
			found = append(found, filepath.Join(dir, name))
		}
	}
	return found, nil
}

// locateBlock returns the folder of the one block device of a disk's device.
func locateBlock(device string, name *regexp.Regexp) (string, error) {
	block, err := only(device, blockDir)
	if err != nil {
		return "", err
	}
	dir, err := only(block, anyName)
	if err == nil && !name.MatchString(filepath.Base(dir)) {
		return "", notPlain("its block device is %s", filepath.Base(dir))
	}
	return dir, err
}

// sectorBytes is the unit of sysfs' size.
const sectorBytes = 512

func read(dir string) (Disk, error) {
	disk := Disk{Name: filepath.Base(dir)}
	number, err := attribute(dir, "dev")
	if err != nil {
		return Disk{}, err
	}
	if disk.Number, err = blockdev.ParseNumber(number); err != nil {
		return Disk{}, err
	}
	sectors, err := attributeNumber(dir, "size")
	if err != nil {
		return Disk{}, err
	}
	disk.Bytes = sectors * sectorBytes
	if disk.Sequence, err = attributeNumber(dir, "diskseq"); err != nil {
		return Disk{}, err
	}
	readOnly, err := attributeNumber(dir, "ro")
	if err != nil {
		return Disk{}, err
	}
	disk.ReadOnly = readOnly != 0
	return disk, nil
}

func attribute(dir, name string) (string, error) {
	content, err := os.ReadFile(filepath.Join(dir, name))
	// ENODEV: it is just going away.
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return "", errNotYet
	}
	return strings.TrimSuffix(string(content), "\n"), err
}

func attributeNumber(dir, name string) (uint64, error) {
	content, err := attribute(dir, name)
	if err != nil {
		return 0, err
	}
	value, err := strconv.ParseUint(content, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s of %s: %w", name, dir, err)
	}
	return value, nil
}

// only is the one entry of a folder that fits the pattern.
func only(dir string, pattern *regexp.Regexp) (string, error) {
	found, err := names(dir, pattern)
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		return "", errNotYet
	}
	if len(found) > 1 {
		return "", notPlain("it has %s", strings.Join(found, " and "))
	}
	return filepath.Join(dir, found[0]), nil
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

var errNotYet = fmt.Errorf("there is no disk: %w", errdefs.ErrNotFound)

func notPlain(format string, args ...any) error {
	return fmt.Errorf("not one plain disk: %s: %w", fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition)
}
