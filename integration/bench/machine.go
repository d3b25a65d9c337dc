package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// disk is one of the machine's scratch disks.
type disk struct {
	serial string // disk0 and on, as vmrun names them
	name   string // vda, say
	path   string // PCI path as Kata writes it, 02/01 for disk0
}

func (d disk) node() string { return "/dev/" + d.name }

// findDisks finds the first n scratch disks.
func findDisks(n int) ([]disk, error) {
	files, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	for _, file := range files {
		serial, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		names[strings.TrimSpace(string(serial))] = filepath.Base(filepath.Dir(file))
	}
	var disks []disk
	for i := range n {
		d := disk{serial: fmt.Sprintf("disk%d", i), path: fmt.Sprintf("02/%02d", i+1)}
		if d.name = names[d.serial]; d.name == "" {
			return nil, fmt.Errorf("the machine has no %s: run it by vmrun with %d times -disk", d.serial, n)
		}
		disks = append(disks, d)
	}
	return disks, nil
}

// written is how many bytes the machine has written to the disk since it started.
func (d disk) written() (float64, error) {
	const sectorsWritten = 6 // Documentation/block/stat.rst, counted from 0; in units of 512 bytes, whatever the disk's sector is
	text, err := os.ReadFile("/sys/block/" + d.name + "/stat")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text))
	if len(fields) <= sectorsWritten {
		return 0, fmt.Errorf("statistics of %s: %q", d.name, text)
	}
	sectors, err := strconv.ParseFloat(fields[sectorsWritten], 64)
	return 512 * sectors, err
}

// busySeconds is the time that the machine's processors had worked when a copy of /proc/stat was made.
func busySeconds(file string) (float64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	const ticksPerSecond = 100 // USER_HZ
	var user, nice, system, idle, iowait, irq, softirq float64
	if _, err := fmt.Sscanf(string(text), "cpu %f %f %f %f %f %f %f", &user, &nice, &system, &idle, &iowait, &irq, &softirq); err != nil {
		return 0, fmt.Errorf("statistics of processors: %w: %q", err, text)
	}
	return (user + nice + system + irq + softirq) / ticksPerSecond, nil
}

// available is the machine's memory in bytes that a program could still have, when nothing is dirty.
func available() (float64, error) {
	unix.Sync()
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib float64
		if _, err := fmt.Sscanf(line, "MemAvailable: %f kB", &kib); err == nil {
			return 1024 * kib, nil
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no MemAvailable")
}

// countPages makes the kernel count free pages well: pages that it keeps for a processor, up to an eighth of the memory since Linux 6.7,
// are neither free nor used. What is returned takes that back.
func countPages() (undo func() error, err error) {
	const file = "/proc/sys/vm/percpu_pagelist_high_fraction"
	if err := os.WriteFile(file, []byte("1000000"), 0); err != nil {
		return nil, err
	}
	return func() error { return os.WriteFile(file, []byte("0"), 0) }, nil
}

// implementations names the best that the kernel has of each algorithm, which is what it takes.
func implementations(algorithms ...string) ([]string, error) {
	text, err := os.ReadFile("/proc/crypto")
	if err != nil {
		return nil, err
	}
	return drivers(string(text), algorithms...), nil
}

func drivers(procCrypto string, algorithms ...string) (names []string) {
	for _, algorithm := range algorithms {
		name, best := "none", -1
		for entry := range strings.SplitSeq(procCrypto, "\n\n") {
			fields := map[string]string{}
			for line := range strings.Lines(entry) {
				key, value, _ := strings.Cut(line, ":")
				fields[strings.TrimSpace(key)] = strings.TrimSpace(value)
			}
			if priority, err := strconv.Atoi(fields["priority"]); err == nil && fields["name"] == algorithm && priority > best {
				name, best = fields["driver"], priority
			}
		}
		names = append(names, algorithm+" by "+name)
	}
	return names
}
