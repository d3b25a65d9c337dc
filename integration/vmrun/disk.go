package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// disk is a scratch disk.
type disk struct {
	bytes int64
	place place
}

// place is how a disk is attached.
type place string

const (
	// onBridge is virtio-blk behind Kata's bridge: PCI path 02/01 and on, 31 disks at 02, then at 03 and on.
	onBridge place = ""
	// onPort is virtio-blk behind a root port and a bridge: PCI path 1c/00/01 and on.
	onPort place = "port"
	// onSCSI is a unit of the virtio-scsi controller: SCSI address 0:0 and on.
	onSCSI place = "scsi"
	// onMMIO is virtio-blk on virtio-mmio: /dev/vda and on. Only QEMU's microvm has that bus, and no bridges, so that no disk
	// beside these is possible.
	onMMIO place = "mmio"
)

// diskSlots is how many disks have place on a bridge: slot 0 is the bridge's own.
const diskSlots = 31

// parseDisk reads SIZE or SIZE@PLACE.
func parseDisk(s string) (disk, error) {
	size, at, _ := strings.Cut(s, "@")
	bytes, err := parseSize(size)
	if err != nil {
		return disk{}, err
	}
	d := disk{bytes: bytes, place: place(at)}
	if !slices.Contains([]place{onBridge, onPort, onSCSI, onMMIO}, d.place) {
		return disk{}, fmt.Errorf("disk at %q: want port, scsi or mmio", at)
	}
	return d, nil
}

func parseSize(s string) (int64, error) {
	shift, digits := 0, s
	for i, unit := range []string{"K", "M", "G"} {
		if rest, ok := strings.CutSuffix(s, unit); ok {
			shift, digits = 10*(i+1), rest
		}
	}
	n, err := strconv.ParseInt(digits, 10, 32)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("size %q: want a number with K, M or G", s)
	}
	return n << shift, nil
}

// count is how many disks are at a place.
func (m machine) count(p place) (n int) {
	for _, d := range m.disks {
		if d.place == p {
			n++
		}
	}
	return n
}

// drivers are the lists of modules that the disks need beside the base.
func (m machine) drivers() (lists []string) {
	for _, p := range []place{onSCSI, onMMIO} {
		if m.count(p) > 0 {
			lists = append(lists, string(p))
		}
	}
	return lists
}

// microvm is QEMU's board with virtio-mmio, of which ACPI tells, and its kernel's arguments. Console and files are on PCI Express there too.
func (m machine) microvm() (board, kernelArgs string, err error) {
	kernelArgs = "console=ttyS0 quiet panic=-1 oops=panic no_timer_check tsc=reliable"
	if !m.kvm {
		// The board has no timer to measure the processor's clock by, and an emulated one does not tell. It is this machine's.
		khz, err := clockKHz()
		if err != nil {
			return "", "", err
		}
		kernelArgs += fmt.Sprintf(" tsc_early_khz=%d", khz)
	}
	return "microvm,pcie=on,acpi=on,isa-serial=on", kernelArgs, nil
}

// clockKHz is about what a processor's time stamp counter counts in a millisecond.
func clockKHz() (int, error) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "cpu MHz" {
			mhz, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return int(mhz * 1000), err
		}
	}
	return 0, errors.New("/proc/cpuinfo does not tell the processors' clock")
}

// busArguments are the bridges and controllers that the disks are plugged into.
func (m machine) busArguments() (args []string) {
	if m.count(onMMIO) > 0 {
		return nil
	}
	// Kata's bridge is there without disks too, for what a test plugs in.
	for i := range max(1, (m.count(onBridge)+diskSlots-1)/diskSlots) {
		args = append(args, "-device", fmt.Sprintf("pci-bridge,id=%s,bus=pcie.0,chassis_nr=%d,shpc=on,addr=%x", bridge(i), i+1, i+2))
	}
	if m.count(onPort) > 0 {
		args = append(args, "-device", "pcie-root-port,id=rootport,bus=pcie.0,chassis=1,addr=1c", "-device", "pcie-pci-bridge,id=portbridge,bus=rootport")
	}
	if m.count(onSCSI) > 0 {
		args = append(args, "-device", "virtio-scsi-pci,id=scsi0,addr=13")
	}
	return args
}

// diskArguments are the disks, in their order; their files are in the scratch folder.
func (m machine) diskArguments(scratch string) (args []string) {
	placed := map[place]int{}
	for i, d := range m.disks {
		n := placed[d.place]
		placed[d.place]++
		device := map[place]string{
			onBridge: fmt.Sprintf("virtio-blk-pci,bus=%s,addr=%x", bridge(n/diskSlots), n%diskSlots+1),
			onPort:   fmt.Sprintf("virtio-blk-pci,bus=portbridge,addr=%x", n+1),
			onSCSI:   fmt.Sprintf("scsi-hd,bus=scsi0.0,channel=0,scsi-id=%d,lun=%d", n/256, n%256),
			onMMIO:   "virtio-blk-device",
		}[d.place]
		// Left to itself QEMU stops the machine when the host's disk is full.
		args = append(args,
			"-blockdev", fmt.Sprintf("driver=file,node-name=file%d,locking=off,filename=%s/disks/%d", i, scratch, i),
			"-blockdev", fmt.Sprintf("driver=raw,node-name=disk%d,file=file%d", i, i),
			"-device", fmt.Sprintf("%s,id=disk%d,drive=disk%d,serial=disk%d,werror=report", device, i, i, i))
	}
	return args
}

func bridge(i int) string { return fmt.Sprintf("bridge%d", i+2) }
