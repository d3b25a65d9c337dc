// Package device finds the disk that the host plugged in at an address.
//
// The kernel's names (vda, sdb, …) depend on the order of arrival and mean nothing. Kata names a disk by the driver that attaches it
// and a place that this driver knows; what is found there must be one plain disk of that driver and nothing else. Each place has at most
// one disk and each disk one place, so that whoever compares addresses compares disks.
package device

import (
	"fmt"
	"regexp"

	"github.com/containerd/errdefs"
)

// The drivers, by the names that Storage.driver has for them in the agent's protocol. Kata's virtcontainers/kata_agent.go (3.20, 4.1)
// writes them and what stands in Storage.source.
const (
	blk     = "blk"     // virtio-blk on PCI: the slots on the way from the root bus, "02/01" behind the bridge in slot 2
	scsi    = "scsi"    // a disk of the virtio-scsi controller: "ID:LUN"
	mmioBlk = "mmioblk" // virtio-blk on virtio-mmio: "/dev/vda"
)

// sources are the forms of Storage.source. Each place has one form, and no two drivers have one in common.
var sources = map[string]*regexp.Regexp{
	// Two lower-case hex digits up to 1f for each slot; every slot stands for its function 0. Kata makes paths of two levels. Those of
	// 4.x that begin with the bus of a NUMA node's pxb-pcie (20 and up) are not among them.
	blk: regexp.MustCompile(`^[01][0-9a-f](/[01][0-9a-f]){0,7}$`),
	// Kata counts disks: ID is the number divided by 256, LUN the remainder (GetSCSIIdLun in virtcontainers/utils).
	scsi: regexp.MustCompile(`^` + octet + `:` + octet + `$`),
	// Kata counts here too, so that the place is a name of the kernel's after all. It stays the same disk's as long as the disk is there.
	mmioBlk: regexp.MustCompile(`^/dev/vd[a-z]{1,3}$`),
}

const octet = `(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])`

// nouns are what a person calls the places.
var nouns = map[string]string{blk: "PCI path", scsi: "SCSI address", mmioBlk: "virtio-mmio disk"}

// Address is a place where the host can plug in a disk. Two addresses are equal if and only if they name the same place.
// The zero value names none.
type Address struct {
	driver, source string
}

// Parse reads the driver and the source of a storage. The error is errdefs.ErrInvalidArgument.
func Parse(driver, source string) (Address, error) {
	form, ok := sources[driver]
	if !ok {
		return Address{}, fmt.Errorf("storage driver %.32q is not blk, scsi or mmioblk: %w", driver, errdefs.ErrInvalidArgument)
	}
	if !form.MatchString(source) {
		return Address{}, fmt.Errorf("%s %.64q is not of the form that Kata writes, such as 02/01 (blk), 0:1 (scsi), /dev/vda (mmioblk): %w",
			nouns[driver], source, errdefs.ErrInvalidArgument)
	}
	return Address{driver: driver, source: source}, nil
}

// Source is the address as the storage has it. No address of another driver has the same.
func (a Address) Source() string { return a.source }

// String is the address for a person, such as "PCI path 02/01".
func (a Address) String() string { return nouns[a.driver] + " " + a.source }
