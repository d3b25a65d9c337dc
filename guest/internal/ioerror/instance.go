package ioerror

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// instanceDir is where our trace instance is. The name is fixed, so that what a killed process left is found.
	instanceDir = "instances/sealvol"
	eventDir    = "events/block/block_bio_complete"
	// bufferKiB is for each processor.
	bufferKiB = 128
	// recordBytes is the least that a record takes: its fields have 40 bytes.
	recordBytes = 40
)

// instance is a trace instance, with buffers and settings that nobody else uses.
type instance struct {
	tracefs  *os.Root
	pipe     *os.File
	raw      syscall.RawConn
	capacity int // records
}

func openInstance() (*instance, error) {
	tracefs, err := mountTracefs()
	if err != nil {
		return nil, err
	}
	i, err := newInstance(tracefs)
	if err != nil {
		tracefs.Close()
		return nil, err
	}
	return i, nil
}

// mountTracefs mounts the kernel's only tracefs where no path leads to it: not every guest has it mounted, and no container should see it.
func mountTracefs() (*os.Root, error) {
	context, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("the kernel has no tracefs: %w: %w", errdefs.ErrFailedPrecondition, err)
	}
	if err != nil {
		return nil, fmt.Errorf("fsopen tracefs: %w", err)
	}
	defer unix.Close(context)
	if err := unix.FsconfigCreate(context); err != nil {
		return nil, fmt.Errorf("create tracefs: %w", err)
	}
	mount, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsmount tracefs: %w", err)
	}
	// By descriptor: os.Root opens what it is given.
	defer unix.Close(mount)
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", mount))
}

func newInstance(tracefs *os.Root) (_ *instance, err error) {
	if _, err := tracefs.Stat(eventDir); err != nil {
		return nil, fmt.Errorf("the kernel has no block tracepoints: %w", precondition(err))
	}
	// What a service that was killed left behind. The kernel removes none that is open.
	if err := tracefs.Remove(instanceDir); errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("trace instance is in use: %w: %w", errdefs.ErrUnavailable, err)
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old trace instance: %w", err)
	}
	if err := tracefs.Mkdir(instanceDir, 0o700); err != nil {
		return nil, fmt.Errorf("make trace instance: %w", precondition(err))
	}
	defer func() {
		if err != nil {
			if undoErr := tracefs.Remove(instanceDir); undoErr != nil {
				err = fmt.Errorf("%w; undo: %w", err, undoErr)
			}
		}
	}()
	i := &instance{tracefs: tracefs}
	if i.pipe, err = tracefs.OpenFile(path.Join(instanceDir, "trace_pipe"), os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, precondition(err)
	}
	defer func() {
		if err != nil {
			i.pipe.Close()
		}
	}()
	if i.raw, err = i.pipe.SyscallConn(); err != nil {
		return nil, err
	}
	for _, setting := range [][2]string{
		{"buffer_size_kb", strconv.Itoa(bufferKiB)},
		{"buffer_percent", "0"}, // who polls is woken by the first record
		{"options/overwrite", "0"},
		// Else the kernel listens to every switch between processes, to know their names.
		{"trace_options", "norecord-cmd"},
		// What stands before the event in a line, as the name of a process, is not ours to parse.
		{"options/context-info", "0"},
		{"options/annotate", "0"},
		// Negative because it is the result of a bio. Who asked not to wait may be told EAGAIN very often.
		{path.Join(eventDir, "filter"), "error != 0 && error != -11"},
		{path.Join(eventDir, "enable"), "1"},
	} {
		if err := i.set(setting[0], setting[1]); err != nil {
			return nil, precondition(err)
		}
	}
	processors, err := i.processors()
	if err != nil {
		return nil, err
	}
	i.capacity = len(processors) * (bufferKiB << 10) / recordBytes
	return i, nil
}

// processors are the folders of those that there can be.
func (i *instance) processors() ([]string, error) {
	return fs.Glob(i.tracefs.FS(), path.Join(instanceDir, "per_cpu/cpu*"))
}

// precondition marks an error that says that this kernel, as it is configured, cannot do it: without the file, or locked down.
func precondition(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

func (i *instance) set(name, value string) error {
	file, err := i.tracefs.OpenFile(path.Join(instanceDir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString(value)
	return err
}

func (i *instance) Wait(drain func() (more bool)) error {
	// The runtime's poller calls this when the kernel has woken it, first of all once, until the file is closed.
	return i.raw.Read(func(uintptr) bool {
		for drain() {
		}
		return false
	})
}

func (i *instance) Read(b []byte) (n int, err error) {
	// Not raw.Read, of which there can be only one at a time.
	if closed := i.raw.Control(func(fd uintptr) { n, err = unix.Read(int(fd), b) }); closed != nil {
		return 0, closed
	}
	return max(n, 0), err
}

func (i *instance) Dropped() (dropped uint64, err error) {
	processors, err := i.processors()
	if err != nil {
		return 0, err
	}
	for _, processor := range processors {
		stats, err := fs.ReadFile(i.tracefs.FS(), path.Join(processor, "stats"))
		if err != nil {
			return 0, err
		}
		n, err := parseStats(string(stats))
		if err != nil {
			return 0, fmt.Errorf("%s: %w", processor, err)
		}
		dropped += n
	}
	return dropped, nil
}

// parseStats adds up what a processor's buffer had no room for, of lines "NAME: NUMBER".
func parseStats(stats string) (dropped uint64, err error) {
	found := 0
	for line := range strings.Lines(stats) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch name {
		case "overrun", "commit overrun", "dropped events":
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("line %.100q: %w", line, errdefs.ErrInvalidArgument)
			}
			dropped += n
			found++
		}
	}
	if found != 3 {
		return 0, fmt.Errorf("%d counters of lost records, want 3: %w", found, errdefs.ErrInvalidArgument)
	}
	return dropped, nil
}

func (i *instance) Close() error {
	err := i.pipe.Close()
	return errors.Join(err, i.tracefs.Remove(instanceDir), i.tracefs.Close())
}
