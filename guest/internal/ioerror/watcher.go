// Package ioerror says which block devices had I/O that failed.
//
// Neither dm-crypt nor dm-integrity counts the blocks that failed their tag, and nobody counts writes and flushes that a disk refused. The
// kernel has one place that every completed I/O passes, the tracepoint block:block_bio_complete. A Watcher listens there, in a trace
// instance of its own on a tracefs that is attached nowhere, with a filter, so that only failures are recorded.
//
// What is recorded waits in a buffer of bounded size, where it blocks nobody. When the buffer is full the earliest records are kept, and
// that there were more is known: a Report is then marked incomplete.
//
// Its format is that of tracefs, Documentation/trace/ftrace.rst and events.rst of Linux 6.12.
package ioerror

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Report is what happened on a device since Watch.
type Report struct {
	Count uint64 // I/Os that failed
	First Fault  // if Count is not 0
	// Incomplete says that records were lost: there may have been more faults than Count, and earlier ones than First.
	Incomplete bool
}

// Watcher listens to the kernel. It may be used by several goroutines at once.
type Watcher struct {
	log      *slog.Logger
	trace    trace
	capacity int           // records that the trace holds at most
	done     chan struct{} // closed at the end of the goroutine

	mu      sync.Mutex // also for reading the trace
	devices map[blockdev.Number]*device
	partial string // the beginning of a line whose end was not read yet
	dropped uint64 // records, so far
	blind   bool   // nothing is read any more: the trace failed, or is closed
	// One line in the log for each kind of trouble: errors come in thousands.
	dropping, garbled sync.Once
}

// trace is where the kernel puts its records.
type trace interface {
	// Wait calls drain whenever there is something to read, and again while it returns true, until the trace is closed.
	Wait(drain func() (more bool)) error
	// Read fails with unix.EAGAIN when there is nothing to read.
	Read(b []byte) (int, error)
	// Dropped is the number of records that found no room, since the beginning.
	Dropped() (uint64, error)
	Close() error
}

type device struct {
	Report
	first func(Fault) // nil when it was called
}

// Open starts to listen. The error is errdefs.ErrFailedPrecondition when the kernel has no such tracepoint or forbids its use, and
// errdefs.ErrUnavailable while another Watcher is open on this kernel.
func Open(log *slog.Logger) (*Watcher, error) {
	t, err := openInstance()
	if err != nil {
		return nil, fmt.Errorf("watch for I/O errors: %w", err)
	}
	return start(t, t.capacity, log), nil
}

func start(t trace, capacity int, log *slog.Logger) *Watcher {
	w := &Watcher{log: log, trace: t, capacity: capacity, done: make(chan struct{}), devices: map[blockdev.Number]*device{}}
	go func() {
		defer close(w.done)
		err := t.Wait(w.read)
		w.locked(func() { w.lose(err) })
	}()
	return w
}

// Close stops listening and leaves nothing of it in the kernel. No callback runs afterwards, and every Report is incomplete.
func (w *Watcher) Close() error {
	w.locked(func() {
		w.blind = true
		w.incomplete()
	})
	err := w.trace.Close()
	<-w.done
	return err
}

// Watch begins to count for a device, from zero; nothing that ended before counts, also not what ended on an earlier device of this
// number. first, if it is not nil, is called once, at the first fault. Everybody waits for it: it must not wait, nor call the Watcher.
func (w *Watcher) Watch(number blockdev.Number, first func(Fault)) {
	w.locked(func() { w.devices[number] = &device{first: first, Report: Report{Incomplete: w.blind}} })
}

// Faults reports all that ended on a device before the call. The Report of a device that is not watched is incomplete.
func (w *Watcher) Faults(number blockdev.Number) Report {
	report := Report{Incomplete: true}
	w.locked(func() {
		if d := w.devices[number]; d != nil {
			report = d.Report
		}
	})
	return report
}

// Forget ends Watch. It must be called before the device is removed, since its number may then be another's, who watches it.
func (w *Watcher) Forget(number blockdev.Number) {
	w.locked(func() { delete(w.devices, number) })
}

func (w *Watcher) read() (more bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.drain()
}

// locked reads what is in the trace, and then calls do.
func (w *Watcher) locked(do func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drain()
	do()
}

// drain reads what was in the trace when it was called. An I/O is recorded before whoever waits for it is told, so afterwards all that has ended
// before is counted. Who causes errors faster than they can be read must not keep it from returning: after as many lines as the trace
// can hold, which come in the order of their time, what is left is newer, and more is true.
func (w *Watcher) drain() (more bool) {
	if w.blind {
		return false
	}
	buffer := make([]byte, 16<<10) // more than the kernel gives at once
	lines := 0
	for {
		n, err := w.trace.Read(buffer)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
		case err != nil:
			w.lose(err)
			return false
		case n == 0:
			w.lose(errors.New("somebody switched the trace off"))
			return false
		default:
			if lines += w.take(string(buffer[:n])); lines <= w.capacity {
				continue
			}
			more = true
		}
		// Nothing found no room unless there was something to read.
		if lines > 0 {
			w.countDropped()
		}
		return more
	}
}

// countDropped looks for records that found no room.
func (w *Watcher) countDropped() {
	dropped, err := w.trace.Dropped()
	if err != nil {
		w.lose(err)
		return
	}
	if dropped == w.dropped {
		return
	}
	w.dropping.Do(func() { w.log.Warn("there are more I/O errors than can be counted", "lost", dropped-w.dropped) })
	w.dropped = dropped
	w.incomplete()
}

// take counts the lines of a part of the trace, and says how many there were.
func (w *Watcher) take(text string) (lines int) {
	text = w.partial + text
	for {
		line, rest, ok := strings.Cut(text, "\n")
		if !ok {
			w.partial = text
			return lines
		}
		text = rest
		lines++
		e, err := parseEvent(line)
		if err != nil {
			// Whatever it was, it may have been a fault.
			w.garbled.Do(func() { w.log.Warn("an I/O error that cannot be read", "error", err) })
			w.incomplete()
			continue
		}
		w.count(e)
	}
}

func (w *Watcher) count(e event) {
	d := w.devices[e.device]
	if d == nil || e.benign {
		return
	}
	if d.Count++; d.Count > 1 {
		return
	}
	d.First = e.fault
	if d.first != nil {
		d.first(e.fault)
	}
}

// lose ends the counting, which is not the volumes' end: they fail closed without it.
func (w *Watcher) lose(err error) {
	if w.blind {
		return
	}
	w.blind = true
	w.log.Error("I/O errors are not counted any more", "error", err)
	w.incomplete()
}

func (w *Watcher) incomplete() {
	for _, d := range w.devices {
		d.Incomplete = true
	}
}
