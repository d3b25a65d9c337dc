package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

// frozenTime is how long an emulator may take no processor time at all: the clock of a machine that does nothing takes some each second.
const frozenTime = 2 * time.Minute

// endFrozen kills a process that has taken no processor time for so long, until the context ends. An emulated machine, above all one that
// runs another one, stands still now and then: its only processor waits for an interrupt that was lost.
func endFrozen(ctx context.Context, process *os.Process, limit time.Duration) {
	ticker := time.NewTicker(limit / 10)
	defer ticker.Stop()
	last, since := "", time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now, err := processorTime(process.Pid)
		if err != nil {
			return // It has ended.
		}
		if now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) > limit {
			fmt.Fprintf(os.Stderr, "vmrun: the machine has stood still for %v\n", limit)
			process.Kill()
			return
		}
	}
}

// processorTime is what a process has taken of processors so far, in words: utime and stime of proc_pid_stat(5).
func processorTime(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	const utime, stime, first = 14, 15, 3 // counted from 1 in the manual
	if len(fields) <= stime-first {
		return "", fmt.Errorf("/proc/%d/stat: %q", pid, stat)
	}
	return fields[utime-first] + " and " + fields[stime-first], nil
}
