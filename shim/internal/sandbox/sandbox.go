// Package sandbox is the life of one sandbox on the host: the stock shim that
// it runs, the daemon that fronts it, and the end of both.
//
// containerd calls this program with `start` and `delete`. The first `start`
// of a sandbox leaves a daemon behind, which starts the stock shim, relays
// containerd's calls to it, and has a part in Create, Delete and Kill. The daemon is
// the subreaper of all that the sandbox runs; when the stock shim ends, for
// whatever reason, it ends the rest, removes what the sandbox had on the host,
// and exits, so that containerd sees what it sees of a stock shim. When the
// daemon itself is killed, `delete` does the same from what is on disk, and
// where containerd calls none, the next `start` on the node does.
package sandbox

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/process"
	"github.com/sealvol/sealvol/shim/internal/record"
)

// Host is what the shim touches of the host.
type Host struct {
	// Records is where Kata looks for direct-volume records.
	Records record.Dir
	// Open opens what is behind a volume, backing.Open but in tests.
	Open func(hotplug.Backing) (Device, error)
	// Kata are folders in which Kata keeps a folder for each sandbox.
	Kata []string
	Log  *slog.Logger
}

const (
	// killTime bounds the end of killed processes.
	killTime = 10 * time.Second
	// deleteTime bounds the stock shim's `delete` of one container while the
	// guest may still answer, and lateDeleteTime when it cannot: Kata dials
	// the agent for its dial_timeout before it goes on without.
	deleteTime     = 30 * time.Second
	lateDeleteTime = 2 * time.Minute
)

// end ends all that a sandbox runs, the way it ends when its stock shim is
// killed: the stock shim's `delete` of each container, while the guest is
// still there, and then no mercy. It gives what `delete` said, by container.
// The caller has the lock.
func (d dir) end(ctx context.Context, h Host, call Call, s state) (map[string][]byte, error) {
	var errs []error
	if s.Stock != nil {
		errs = append(errs, end(ctx, func() ([]process.ID, error) {
			if s.Stock.Alive() {
				return []process.ID{*s.Stock}, nil
			}
			return nil, nil
		}))
	}
	answers := map[string][]byte{}
	remaining := func(limit time.Duration) (late []string) {
		for _, id := range d.containers(s) {
			if _, done := answers[id]; done {
				continue
			}
			answer, err := stockDelete(ctx, s.StockShim, call, id, s.Containers[id], limit)
			if errors.Is(err, context.DeadlineExceeded) {
				late = append(late, id)
				continue
			}
			if err != nil {
				h.Log.Warn("the stock shim's delete failed", "container", id, "error", err)
			}
			answers[id] = answer
		}
		return late
	}
	late := remaining(deleteTime)
	errs = append(errs, end(ctx, d.processes))
	if len(late) > 0 {
		h.Log.Warn("the guest does not answer, its processes were killed", "containers", late)
		remaining(lateDeleteTime)
		errs = append(errs, end(ctx, d.processes))
	}
	return answers, errors.Join(errs...)
}

// clear removes what an ended sandbox left on the host, all but the folder.
func (d dir) clear(h Host, s state) error {
	errs := []error{h.Records.RemoveSandbox(d.sandbox)}
	for _, folder := range h.Kata {
		errs = append(errs, removeTree(filepath.Join(folder, d.sandbox)))
	}
	if s.Socket != "" {
		// The stock shim exits without removing it.
		if err := os.Remove(s.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// processes lists what the sandbox runs but for the process that asks: what
// carries its mark, and for the daemon its children too, since a program may
// have cleared its environment.
func (d dir) processes() ([]process.ID, error) {
	marked, err := process.Marked(d.mark())
	if err != nil {
		return nil, err
	}
	marked = slices.DeleteFunc(marked, func(id process.ID) bool { return id.Pid == os.Getpid() })
	children, err := process.Children()
	return append(marked, children...), err
}

// containers lists the containers in the order in which they end: the
// sandbox's own is the last, since it takes the guest with it.
func (d dir) containers(s state) []string {
	var ids []string
	for id := range s.Containers {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b string) int {
		if a == d.sandbox || b == d.sandbox {
			return cmp.Compare(map[bool]int{true: 1}[a == d.sandbox], map[bool]int{true: 1}[b == d.sandbox])
		}
		return cmp.Compare(a, b)
	})
	return ids
}

func end(ctx context.Context, list func() ([]process.ID, error)) error {
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	return process.End(ctx, list)
}

// stockDelete runs the stock shim's `delete` for a container, in its bundle.
func stockDelete(ctx context.Context, shim string, call Call, id, bundle string, limit time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	call.ID, call.Bundle, call.Action = id, bundle, "delete"
	command := exec.CommandContext(ctx, shim, call.args()...)
	command.Dir = bundle
	answer, err := run(command)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("delete %s: %w", id, err)
	}
	return answer, nil
}

// run runs a program of Kata's and gives what it wrote to stdout alone, or an
// error with the end of what it wrote to stderr, but for its log.
func run(command *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	command.WaitDelay = time.Second
	if err := command.Run(); err != nil {
		var text []string
		for line := range strings.Lines(stderr.String()) {
			if !strings.HasPrefix(line, "time=") {
				text = append(text, strings.TrimSpace(line))
			}
		}
		tail := strings.Join(text, " ")
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(command.Path), err, tail[max(0, len(tail)-1000):])
	}
	return stdout.Bytes(), nil
}

// removeTree removes a folder of an ended sandbox. What is mounted in it is
// unmounted first, and with a mount left over nothing is removed: behind it
// may be a container's root, or a volume.
func removeTree(path string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(path))
	if err != nil {
		return err
	}
	for _, mount := range slices.Backward(mounts) {
		if err := unix.Unmount(mount.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", mount.Mountpoint, err)
		}
	}
	if mounts, err = mountinfo.GetMounts(mountinfo.PrefixFilter(path)); err != nil || len(mounts) > 0 {
		return errors.Join(err, fmt.Errorf("%d mounts are left below %s", len(mounts), path))
	}
	return os.RemoveAll(path)
}
