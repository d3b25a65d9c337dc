package ioerror

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

var one, two = blockdev.Number{Major: 253, Minor: 1}, blockdev.Number{Major: 253, Minor: 2}

const (
	readOne  = "block_bio_complete: 253,1 R 8 + 8 [-84]\n"
	writeOne = "block_bio_complete: 253,1 W 16 + 8 [-5]\n"
	aheadOne = "block_bio_complete: 253,1 RA 0 + 256 [-84]\n"
	writeTwo = "block_bio_complete: 253,2 W 16 + 8 [-5]\n"
)

// fakeTrace gives out one text at each Read.
type fakeTrace struct {
	mu         sync.Mutex
	texts      []string
	dropped    uint64
	failRead   error
	failDrops  error
	wake       chan struct{}
	closed     chan struct{}
	closeFails error
}

func newFakeTrace() *fakeTrace {
	return &fakeTrace{wake: make(chan struct{}, 1), closed: make(chan struct{})}
}

func (f *fakeTrace) put(texts ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.texts = append(f.texts, texts...)
}

func (f *fakeTrace) Wait(drain func() (more bool)) error {
	for {
		select {
		case <-f.wake:
			for drain() {
			}
		case <-f.closed:
			return os.ErrClosed
		}
	}
}

func (f *fakeTrace) Read(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failRead != nil {
		return 0, f.failRead
	}
	if len(f.texts) == 0 {
		return 0, unix.EAGAIN
	}
	n := copy(b, f.texts[0])
	f.texts = f.texts[1:]
	return n, nil
}

func (f *fakeTrace) Dropped() (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dropped, f.failDrops
}

func (f *fakeTrace) Close() error {
	close(f.closed)
	return f.closeFails
}

// newWatcher is a Watcher of a fake that holds 3 records; its log can be read after the test's last call of it.
func newWatcher(t *testing.T) (*Watcher, *fakeTrace, *strings.Builder) {
	t.Helper()
	var log strings.Builder
	f := newFakeTrace()
	w := start(f, 3, slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() {
		select {
		case <-f.closed:
		default:
			w.Close()
		}
	})
	return w, f, &log
}

func TestFaultsOfWatchedDevicesAreCounted(t *testing.T) {
	t.Parallel()
	w, f, _ := newWatcher(t)
	var told []Fault
	f.put(writeOne) // before it is watched
	w.Watch(one, func(fault Fault) { told = append(told, fault) })
	if got := w.Faults(one); got != (Report{}) {
		t.Errorf("a new device: %+v", got)
	}
	f.put(aheadOne, readOne+writeTwo, writeOne)
	want := Report{Count: 2, First: Fault{Op: Read, Sector: 8, Sectors: 8, Errno: unix.EILSEQ}}
	if got := w.Faults(one); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if len(told) != 1 || told[0] != want.First {
		t.Errorf("told of %v", told)
	}
	if got := w.Faults(two); !got.Incomplete || got.Count != 0 {
		t.Errorf("a device that is not watched: %+v", got)
	}
	w.Forget(one)
	f.put(writeOne)
	if got := w.Faults(one); !got.Incomplete || got.Count != 0 {
		t.Errorf("a forgotten device: %+v", got)
	}
}

func TestANumberThatIsUsedAgainStartsFromZero(t *testing.T) {
	t.Parallel()
	w, f, _ := newWatcher(t)
	w.Watch(one, nil)
	f.put(readOne)
	w.Forget(one)
	f.put(readOne) // the old device's, in the trace still when the new one is watched
	w.Watch(one, nil)
	f.put(writeOne)
	if got := w.Faults(one); got.Count != 1 || got.First.Op != Write || got.Incomplete {
		t.Errorf("got %+v", got)
	}
	f.put(readOne)
	w.Watch(one, nil) // without Forget
	if got := w.Faults(one); got != (Report{}) {
		t.Errorf("watched again: %+v", got)
	}
}

func TestTheFirstFaultIsToldWithoutAQuestion(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, f, _ := newWatcher(t)
		told := make(chan Fault, 2)
		w.Watch(one, func(fault Fault) { told <- fault })
		f.put(readOne, readOne)
		f.wake <- struct{}{}
		if got := <-told; got.Errno != unix.EILSEQ {
			t.Errorf("got %v", got)
		}
		synctest.Wait()
		if len(told) != 0 {
			t.Error("told twice")
		}
	})
}

func TestErrorsThatComeFasterThanTheyAreRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, f, _ := newWatcher(t)
		w.Watch(one, nil)
		for range 10 {
			f.put(readOne)
		}
		// Of which not more than the last 3 can be older than the call.
		if got := w.Faults(one); got.Count < 3 || got.Count == 10 {
			t.Errorf("got %+v", got)
		}
		f.wake <- struct{}{}
		synctest.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.texts) != 0 {
			t.Errorf("%d lines are not read", len(f.texts))
		}
	})
}

func TestLinesMayBeReadInParts(t *testing.T) {
	t.Parallel()
	w, f, _ := newWatcher(t)
	w.Watch(one, nil)
	f.put(readOne[:7])
	w.Faults(one)
	f.put(readOne[7:]+writeOne[:11], writeOne[11:]+readOne[:1])
	if got := w.Faults(one); got.Count != 2 || got.Incomplete {
		t.Errorf("got %+v", got)
	}
}

func TestLostRecordsAreNoticed(t *testing.T) {
	t.Parallel()
	tests := map[string]func(*fakeTrace){
		"no room":            func(f *fakeTrace) { f.put(readOne); f.dropped = 9 },
		"lost in the kernel": func(f *fakeTrace) { f.put(readOne, "CPU:1 [LOST 9 EVENTS]\n") },
		"a line not of ours": func(f *fakeTrace) { f.put("nonsense\n", readOne) },
		"counters not read":  func(f *fakeTrace) { f.put(readOne); f.failDrops = errdefs.ErrInvalidArgument },
	}
	for name, happen := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, f, log := newWatcher(t)
			w.Watch(one, nil)
			w.Watch(two, nil)
			happen(f)
			if got := w.Faults(one); got.Count != 1 || !got.Incomplete {
				t.Errorf("got %+v", got)
			}
			if got := w.Faults(two); got.Count != 0 || !got.Incomplete {
				t.Errorf("the other device: %+v", got)
			}
			if strings.Count(log.String(), "\n") != 1 {
				t.Errorf("log: %s", log.String())
			}
		})
	}
	t.Run("what was lost before a device was watched is not its loss", func(t *testing.T) {
		t.Parallel()
		w, f, _ := newWatcher(t)
		f.put(readOne)
		f.dropped = 9
		w.Watch(one, nil)
		f.put(readOne)
		if got := w.Faults(one); got.Count != 1 || got.Incomplete {
			t.Errorf("got %+v", got)
		}
	})
}

func TestATraceThatFailsMakesReportsIncomplete(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(*fakeTrace){
		"read":         func(f *fakeTrace) { f.failRead = unix.EBADF },
		"switched off": func(f *fakeTrace) { f.put("") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, f, log := newWatcher(t)
			w.Watch(one, nil)
			fail(f)
			for range 2 {
				if got := w.Faults(one); !got.Incomplete {
					t.Errorf("got %+v", got)
				}
			}
			w.Watch(two, nil)
			if got := w.Faults(two); !got.Incomplete {
				t.Errorf("watched later: %+v", got)
			}
			if strings.Count(log.String(), "not counted any more") != 1 {
				t.Errorf("log: %s", log.String())
			}
		})
	}
}

func TestCloseIsQuietAndEndsTheGoroutine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, f, log := newWatcher(t)
		f.closeFails = errors.New("busy")
		w.Watch(one, func(Fault) { t.Error("told after Close") })
		if err := w.Close(); !errors.Is(err, f.closeFails) {
			t.Errorf("close: %v", err)
		}
		f.put(readOne)
		if got := w.Faults(one); !got.Incomplete || got.Count != 0 {
			t.Errorf("after Close: %+v", got)
		}
		if log.Len() != 0 {
			t.Errorf("log: %s", log)
		}
	})
}

func TestStatistics(t *testing.T) {
	t.Parallel()
	const stats = "entries: 17\noverrun: 1\ncommit overrun: 2\nbytes: 756\noldest event ts:     4.347235\nnow ts:     4.742369\ndropped events: 3\nread events: 0\n"
	if n, err := parseStats(stats); n != 6 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	for _, bad := range []string{"", "entries: 17\n", strings.ReplaceAll(stats, "dropped", "other"), strings.ReplaceAll(stats, "overrun: 1", "overrun: -1"), strings.ReplaceAll(stats, ": 3", "")} {
		if n, err := parseStats(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %d, %v", bad, n, err)
		}
	}
}
