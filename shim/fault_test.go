package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/internal/process"
	"github.com/sealvol/sealvol/shim/internal/sandbox"
)

// TestKillingAShimAfterEachChangeLeavesNothing plays the life of a sandbox with a volume, and kills our shim or the stock one, in turns, after
// the nth file that appears or disappears on this host, for each n that there is. What containerd does then must leave nothing: it calls
// `delete` for what it knows of, and at some time starts another sandbox.
func TestKillingAShimAfterEachChangeLeavesNothing(t *testing.T) {
	t.Parallel()
	rehearsal := newFaultyHost(t)
	var changes atomic.Int64
	rehearsal.watched(func() {
		if known, err := rehearsal.life(); err != nil || len(known) > 0 {
			t.Fatalf("without a fault a sandbox must live: %v, left to delete: %v", err, known)
		}
	}, func() { changes.Add(1) })
	rehearsal.wantNothing()

	victims := []struct{ program, role string }{{shimName, sandbox.RoleDaemon}, {stockName, ""}}
	for n := range changes.Load() {
		victim := victims[n%2]
		t.Run(fmt.Sprintf("%s after change %d of %d", victim.program, n+1, changes.Load()), func(t *testing.T) {
			t.Parallel()
			h := newFaultyHost(t)
			var seen int64
			var known []string
			var struck process.ID
			h.watched(func() {
				var err error
				known, err = h.life()
				t.Logf("the life of the sandbox ended with: %v", err)
			}, func() {
				if seen++; seen != n+1 {
					return
				}
				if id, running := h.find(victim.program, victim.role); running {
					struck = id
					if err := id.Kill(); err != nil {
						t.Error(err)
					}
				}
			})
			h.kill(struck) // Its end is waited for.
			for _, id := range known {
				h.delete(id, filepath.Join(h.root, "bundles", id))
			}
			h.start("next", h.bundle("next", annotations{"io.kubernetes.cri.container-type": "sandbox"}))
			h.delete("next", filepath.Join(h.root, "bundles", "next"))
			// Killed before it had noted where the stock shim listens, nobody knows that file. It is in nobody's way.
			h.must(ignore(os.Remove(filepath.Join(h.root, "stock-sb")), fs.ErrNotExist))
			h.wantNothing()
		})
	}
}

func newFaultyHost(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	h.bundle("sb", nil)
	h.volumeBundle("c1", "7:3", nil)
	return h
}

// life is a sandbox's with a container that has a volume, as containerd lets them come and go. It gives what containerd still has of them.
func (h *host) life() (known []string, err error) {
	h.Helper()
	ctx, cancel := context.WithTimeout(h.Context(), time.Minute)
	defer cancel()
	var tasks taskv2.TTRPCTaskService
	for _, id := range []string{"sb", "c1"} {
		bundle := filepath.Join(h.root, "bundles", id)
		out, err := h.command(id, "start", bundle).CombinedOutput()
		if err != nil {
			return known, fmt.Errorf("start %s: %w: %s", id, err, out)
		}
		known = append([]string{id}, known...)
		conn, err := net.Dial("unix", strings.TrimPrefix(string(out), "unix://"))
		if err != nil {
			return known, err
		}
		h.Cleanup(func() { conn.Close() })
		tasks = taskv2.NewTTRPCTaskClient(ttrpc.NewClient(conn))
		if _, err := tasks.Create(ctx, &taskv2.CreateTaskRequest{ID: id, Bundle: bundle}); err != nil {
			return known, fmt.Errorf("create %s: %w", id, err)
		}
	}
	for _, id := range []string{"c1", "sb"} {
		if _, err := tasks.Delete(ctx, &taskv2.DeleteRequest{ID: id}); err != nil {
			return known, fmt.Errorf("delete %s: %w", id, err)
		}
		known = known[1:]
	}
	// The stock shim exits without an answer.
	if _, err := tasks.Shutdown(ctx, &taskv2.ShutdownRequest{ID: "sb"}); !errors.Is(err, ttrpc.ErrClosed) {
		return known, fmt.Errorf("shutdown: %w", err)
	}
	return known, nil
}

// watched runs something, and calls changed after each file that appears or disappears on this host meanwhile.
func (h *host) watched(act, changed func()) {
	h.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	h.must(err)
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	// A folder that is watched already stays so.
	watch := func() error {
		return filepath.WalkDir(h.root, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.IsDir() {
				return ignore(err, fs.ErrNotExist) // It has disappeared again.
			}
			_, err = unix.InotifyAddWatch(fd, path, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE)
			return ignore(err, fs.ErrNotExist)
		})
	}
	h.must(watch())
	ended := make(chan error, 1)
	go func() {
		buffer := make([]byte, 64<<10)
		for {
			n, err := events.Read(buffer)
			if err != nil {
				ended <- ignore(err, os.ErrDeadlineExceeded)
				return
			}
			for rest := buffer[:n]; len(rest) > 0; rest = rest[unix.SizeofInotifyEvent+binary.NativeEndian.Uint32(rest[12:]):] {
				changed()
			}
			if err := watch(); err != nil {
				ended <- err
				return
			}
		}
	}()
	act()
	h.must(events.SetReadDeadline(time.Now()))
	h.must(<-ended)
}

func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}
