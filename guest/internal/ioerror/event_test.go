package ioerror

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

func TestEventsAreParsed(t *testing.T) {
	t.Parallel()
	device := blockdev.Number{Major: 253, Minor: 1048575}
	fault := func(op Op, sector, sectors uint64, errno unix.Errno) event {
		return event{device: device, fault: Fault{Op: op, Sector: sector, Sectors: sectors, Errno: errno}}
	}
	benign := func(e event) event {
		e.benign = true
		return e
	}
	tests := map[string]struct {
		line string
		want event
	}{
		"a read":                                {"R 7808 + 8 [-84]", fault(Read, 7808, 8, unix.EILSEQ)},
		"a read that somebody waits for":        {"RSM 0 + 256 [-5]", fault(Read, 0, 256, unix.EIO)},
		"a read ahead":                          {"RA 0 + 256 [-84]", benign(fault(Read, 0, 256, unix.EILSEQ))},
		"a write":                               {"W 18446744073709551615 + 4294967295 [-5]", fault(Write, 1<<64-1, 1<<32-1, unix.EIO)},
		"a write that says it is ahead":         {"WA 8 + 8 [-5]", fault(Write, 8, 8, unix.EIO)},
		"a write past the cache, after it":      {"FWFS 8 + 8 [-28]", fault(Write, 8, 8, unix.ENOSPC)},
		"an atomic write":                       {"WSU 8 + 8 [-5]", fault(Write, 8, 8, unix.EIO)},
		"a flush":                               {"FWS 0 + 0 [-5]", fault(Flush, 0, 0, unix.EIO)},
		"a flush as its own operation":          {"FF 0 + 0 [-5]", fault(Flush, 0, 0, unix.EIO)},
		"a discard":                             {"DS 8 + 8 [-5]", fault(Discard, 8, 8, unix.EIO)},
		"an erasure":                            {"DE 8 + 8 [-5]", fault(Discard, 8, 8, unix.EIO)},
		"a discard that the device cannot":      {"D 8 + 8 [-95]", benign(fault(Discard, 8, 8, unix.EOPNOTSUPP))},
		"zeroing that the device cannot":        {"N 8 + 8 [-95]", benign(fault(Other, 8, 8, unix.EOPNOTSUPP))},
		"zeroing":                               {"N 8 + 8 [-5]", fault(Other, 8, 8, unix.EIO)},
		"a zone":                                {"ZAS 8 + 8 [-5]", fault(Other, 8, 8, unix.EIO)},
		"a read that a disk says it cannot":     {"R 8 + 8 [-95]", fault(Read, 8, 8, unix.EOPNOTSUPP)},
		"a read that would have had to wait":    {"R 8 + 8 [-11]", benign(fault(Read, 8, 8, unix.EAGAIN))},
		"the largest error number there can be": {"R 8 + 8 [-4095]", fault(Read, 8, 8, 4095)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got, err := parseEvent("block_bio_complete: 253,1048575 " + test.line); err != nil || got != test.want {
				t.Errorf("got %+v, %v, want %+v", got, err, test.want)
			}
		})
	}
}

func TestLinesThatAreNoEvents(t *testing.T) {
	t.Parallel()
	for _, line := range []string{
		"",
		"block_bio_complete:",
		"CPU:1 [LOST 17 EVENTS]",
		"##### CPU 1 buffer started ####",
		"sh-1 [000] d..1. 1.0: block_bio_complete: 253,0 R 8 + 8 [-5]",
		"block_rq_complete: 253,0 R 8 + 8 [-5]",
		"block_bio_complete: 253,0 R 8 + 8 [-5] ",
		"block_bio_complete:  253,0 R 8 + 8 [-5]",
		"block_bio_complete: 253:0 R 8 + 8 [-5]",
		"block_bio_complete: 253 R 8 + 8 [-5]",
		"block_bio_complete: -1,0 R 8 + 8 [-5]",
		"block_bio_complete: 253,0  8 + 8 [-5]",
		"block_bio_complete: 253,0 X 8 + 8 [-5]",
		"block_bio_complete: 253,0 RX 8 + 8 [-5]",
		"block_bio_complete: 253,0 Z 8 + 8 [-5]",
		"block_bio_complete: 253,0 RAAAAAAAAA 8 + 8 [-5]",
		"block_bio_complete: 253,0 R -8 + 8 [-5]",
		"block_bio_complete: 253,0 R 18446744073709551616 + 8 [-5]",
		"block_bio_complete: 253,0 R 8 - 8 [-5]",
		"block_bio_complete: 253,0 R 8 + 4294967296 [-5]",
		"block_bio_complete: 253,0 R 8 + 8 [5]",
		"block_bio_complete: 253,0 R 8 + 8 [0]",
		"block_bio_complete: 253,0 R 8 + 8 [-0]",
		"block_bio_complete: 253,0 R 8 + 8 [-5",
		"block_bio_complete: 253,0 R 8 + 8 [--5]",
		"block_bio_complete: 253,0 R 8 + 8 [-4096]",
	} {
		if got, err := parseEvent(line); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q is read as %+v, %v", line, got, err)
		}
	}
}

func FuzzEvent(f *testing.F) {
	f.Add("block_bio_complete: 253,0 FWFS 8 + 8 [-5]")
	f.Add("block_bio_complete: 253,0 RA 7808 + 8 [-84]")
	f.Add("CPU:1 [LOST 17 EVENTS]")
	f.Fuzz(func(t *testing.T, line string) {
		e, err := parseEvent(line)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q", err)
			}
			return
		}
		if e.fault.Errno == 0 || e.fault.Op == "" {
			t.Errorf("%q is read as %+v", line, e)
		}
		// What was read is all that the line says, but for the operation.
		rwbs := strings.Split(line, " ")[2]
		again := fmt.Sprintf("block_bio_complete: %d,%d %s %d + %d [-%d]",
			e.device.Major, e.device.Minor, rwbs, e.fault.Sector, e.fault.Sectors, uint(e.fault.Errno))
		if second, err := parseEvent(again); err != nil || second != e {
			t.Errorf("%q is read as %+v, and %q as %+v, %v", line, e, again, second, err)
		}
	})
}

func TestFaultSaysWhatAPersonUnderstands(t *testing.T) {
	t.Parallel()
	for want, f := range map[string]Fault{
		"read of 8 sectors at 16: EILSEQ, a tag does not fit": {Op: Read, Sector: 16, Sectors: 8, Errno: unix.EILSEQ},
		"flush of 0 sectors at 0: EIO":                        {Op: Flush, Errno: unix.EIO},
	} {
		if got := f.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
