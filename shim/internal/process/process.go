// Package process tells processes apart and ends those that belong to a
// sandbox, without ever taking one process for another.
//
// What a sandbox runs is found by a mark in the environment that its shim is
// started with: the stock one, the hypervisor and its helpers inherit it. It needs no
// list that could be out of date, and survives the death of every parent.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ID names one process for as long as the host's state lives. A pid alone is
// given to another process later.
type ID struct {
	Pid int `json:"pid"`
	// Start is when the process started, in clock ticks since the boot, field 22 of proc_pid_stat(5).
	Start uint64 `json:"start"`
	// Boot is the boot's id, /proc/sys/kernel/random/boot_id.
	Boot string `json:"boot"`
}

// Find gives the identity of the process that has that pid now. Without one
// the error is an fs.ErrNotExist.
func Find(pid int) (ID, error) {
	stat, err := readStat(pid)
	if err != nil {
		return ID{}, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ID{}, err
	}
	return ID{Pid: pid, Start: stat.start, Boot: strings.TrimSpace(string(boot))}, nil
}

// Alive says whether any thread of the process is still there.
func (id ID) Alive() bool {
	fd, err := id.open()
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return running(fd)
}

// Kill sends SIGKILL to the process, if it is still there.
func (id ID) Kill() error {
	fd, err := id.open()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %d: %w", id.Pid, err)
	}
	return nil
}

// open gives a descriptor of the process, an fs.ErrNotExist if it has ended.
func (id ID) open() (int, error) {
	fd, err := unix.PidfdOpen(id.Pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, fmt.Errorf("process %d: %w", id.Pid, fs.ErrNotExist)
	}
	if err != nil {
		return -1, fmt.Errorf("pidfd_open %d: %w", id.Pid, err)
	}
	// Asked after the descriptor was opened, which stays with its process.
	if now, err := Find(id.Pid); err != nil || now != id {
		unix.Close(fd)
		return -1, fmt.Errorf("process %d: %w", id.Pid, fs.ErrNotExist)
	}
	return fd, nil
}

// running is true until the last thread has ended: a process whose first
// thread is a zombie may still have files open.
func running(pidfd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n == 0
		}
	}
}

// End kills the processes that list gives until there are none, and gives up
// when the context ends.
func End(ctx context.Context, list func() ([]ID, error)) error {
	known := map[ID]bool{} // A process that is ending is not listed any more.
	// What was started while the list was made, by a process that ended before it was done, is in the next one.
	for empty := 0; ; {
		ids, err := list()
		if err != nil {
			return err
		}
		for _, id := range ids {
			known[id] = true
		}
		maps.DeleteFunc(known, func(id ID, _ bool) bool { return !id.Alive() })
		switch {
		case len(ids) > 0 || len(known) > 0:
			empty = 0
		case empty > 0:
			return nil
		default:
			empty++
			continue
		}
		for id := range known {
			if err := id.Kill(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("processes %v do not end: %w", slices.Collect(maps.Keys(known)), context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Marked lists the living processes whose environment has that entry, NAME=value.
func Marked(entry string) ([]ID, error) {
	return list(func(pid int, _ stat) bool {
		for variable := range bytes.SplitSeq(environment(pid), []byte{0}) {
			if string(variable) == entry {
				return true
			}
		}
		return false
	})
}

// becomingTime bounds how long a process that becomes another program is waited for.
const becomingTime = 10 * time.Second

// environment gives a process's environment, nothing when it has ended. The
// kernel shows none for the moment in which a process becomes another program,
// and no place for one either (proc_pid_stat(5), env_end); and always for its own
// threads, which have no program.
func environment(pid int) []byte {
	folder := filepath.Join("/proc", strconv.Itoa(pid))
	empty := false // it has a place for its environment, and none was there
	for begun := time.Now(); time.Since(begun) < becomingTime; {
		data, err := os.ReadFile(filepath.Join(folder, "environ"))
		if err != nil || len(data) > 0 {
			return data
		}
		if _, err := os.Readlink(filepath.Join(folder, "exe")); err != nil {
			return nil
		}
		s, err := readStat(pid)
		switch {
		case err != nil || empty && s.environmentEnd != 0:
			return nil
		case s.environmentEnd != 0:
			empty = true // Or it became one just now: once more.
		default:
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// Children lists the living children of this process.
func Children() ([]ID, error) {
	self := os.Getpid()
	all, err := list(func(_ int, s stat) bool { return s.parent == self })
	return slices.DeleteFunc(all, func(id ID) bool { return !id.Alive() }), err
}

// Reap collects those children of this process that have ended, except the
// ones that keep names: somebody else waits for them.
func Reap(keep func(pid int) bool) error {
	self := os.Getpid()
	ended, err := list(func(pid int, s stat) bool { return s.parent == self && s.state == 'Z' && !keep(pid) })
	for _, id := range ended {
		if _, err := unix.Wait4(id.Pid, nil, unix.WNOHANG, nil); err != nil {
			return fmt.Errorf("wait for %d: %w", id.Pid, err)
		}
	}
	return err
}

// Wait waits until that child of this process has ended.
func Wait(pid int) error {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func list(match func(int, stat) bool) ([]ID, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var ids []ID
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		s, err := readStat(pid)
		if err != nil || !match(pid, s) {
			continue // An error: it has ended.
		}
		id, err := Find(pid)
		if errors.Is(err, fs.ErrNotExist) || err == nil && id.Start != s.start {
			continue
		}
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// stat is what we need of proc_pid_stat(5).
type stat struct {
	state  byte
	parent int
	start  uint64
	// environmentEnd is an address, 0 before there is a program.
	environmentEnd uint64
}

func readStat(pid int) (stat, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if errors.Is(err, unix.ESRCH) {
		return stat{}, fmt.Errorf("process %d: %w", pid, fs.ErrNotExist)
	}
	if err != nil {
		return stat{}, err
	}
	// The second field is the program's name in parentheses, and may hold any byte.
	end := bytes.LastIndexByte(data, ')')
	fields := strings.Fields(string(data[end+1:]))
	const state, parent, start, environmentEnd = 3, 4, 22, 51 // counted from 1 in the manual
	if end < 0 || len(fields) <= environmentEnd-3 {
		return stat{}, fmt.Errorf("/proc/%d/stat: %q", pid, data)
	}
	s := stat{state: fields[state-3][0]}
	if s.parent, err = strconv.Atoi(fields[parent-3]); err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: parent: %w", pid, err)
	}
	if s.start, err = strconv.ParseUint(fields[start-3], 10, 64); err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: start: %w", pid, err)
	}
	if s.environmentEnd, err = strconv.ParseUint(fields[environmentEnd-3], 10, 64); err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: end of the environment: %w", pid, err)
	}
	return s, nil
}
