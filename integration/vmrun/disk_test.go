package main

import (
	"slices"
	"strings"
	"testing"
)

func TestParseDisk(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]disk{
		"64M":      {bytes: 64 << 20},
		"1G@scsi":  {bytes: 1 << 30, place: onSCSI},
		"4K@port":  {bytes: 4 << 10, place: onPort},
		"512@mmio": {bytes: 512, place: onMMIO},
	} {
		if got, err := parseDisk(s); err != nil || got != want {
			t.Errorf("parseDisk(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "M", "0", "-1M", "1T", "64M@ide", "@scsi", "64M@scsi@port"} {
		if got, err := parseDisk(s); err == nil {
			t.Errorf("parseDisk(%q) = %+v; want an error", s, got)
		}
	}
}

// A disk's place does not depend on the disks of other places before it.
func TestDisksAreCountedByPlace(t *testing.T) {
	t.Parallel()
	var m machine
	for range diskSlots + 1 {
		m.disks = append(m.disks, disk{bytes: 512}, disk{bytes: 512, place: onSCSI}, disk{bytes: 512, place: onPort})
	}
	args := m.diskArguments("/scratch")
	for _, want := range []string{
		"virtio-blk-pci,bus=bridge2,addr=1,id=disk0,", "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=0,id=disk1,", "virtio-blk-pci,bus=portbridge,addr=1,id=disk2,",
		"virtio-blk-pci,bus=bridge3,addr=1,id=disk93,", "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=31,id=disk94,",
	} {
		if !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, want) }) {
			t.Errorf("no device %q", want)
		}
	}
}
