package ioerror

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Op is what a failed I/O was to do.
type Op string

const (
	Read    Op = "read"
	Write   Op = "write"
	Flush   Op = "flush" // alone; one that comes with data is a Write
	Discard Op = "discard"
	Other   Op = "other" // zeroing, zones
)

// Fault is one I/O that failed.
type Fault struct {
	Op Op
	// Sector is where it began, in units of 512 bytes, and Sectors its length: what is bad may be anywhere in it.
	Sector, Sectors uint64
	Errno           unix.Errno
}

func (f Fault) String() string {
	reason := unix.ErrnoName(f.Errno)
	if f.Errno == unix.EILSEQ {
		reason += ", a tag does not fit"
	}
	return fmt.Sprintf("%s of %d sectors at %d: %s", f.Op, f.Sectors, f.Sector, reason)
}

// event is one line of the trace.
type event struct {
	device blockdev.Number
	fault  Fault
	benign bool // an error that tells nothing about the device
}

// parseEvent reads a line, without its end, as trace/events/block.h prints it:
//
//	block_bio_complete: MAJOR,MINOR RWBS SECTOR + SECTORS [-ERRNO]
func parseEvent(line string) (event, error) {
	var e event
	fields := strings.Split(line, " ")
	if len(fields) != 7 || fields[0] != "block_bio_complete:" || fields[4] != "+" {
		return event{}, malformed(line)
	}
	major, minor, hasComma := strings.Cut(fields[1], ",")
	number, err := blockdev.ParseNumber(major + ":" + minor)
	if err != nil || !hasComma {
		return event{}, malformed(line)
	}
	e.device = number
	var errs [3]error
	e.fault.Sector, errs[0] = strconv.ParseUint(fields[3], 10, 64)
	e.fault.Sectors, errs[1] = strconv.ParseUint(fields[5], 10, 32)
	code, isNegative := strings.CutPrefix(fields[6], "[-")
	code, isClosed := strings.CutSuffix(code, "]")
	var errno uint64
	errno, errs[2] = strconv.ParseUint(code, 10, 12) // MAX_ERRNO is 4095
	if errs != [3]error{} || !isNegative || !isClosed || errno == 0 {
		return event{}, malformed(line)
	}
	e.fault.Errno = unix.Errno(errno)
	op, isReadahead, ok := parseRWBS(fields[2])
	if !ok {
		return event{}, malformed(line)
	}
	if op == Write && e.fault.Sectors == 0 {
		op = Flush
	}
	e.fault.Op = op
	switch {
	// Nobody asked for what is read ahead. Who asks for it then gets an error, or good data, by a read of its own.
	case isReadahead && op == Read:
		e.benign = true
	// RWF_NOWAIT: the kernel did not try.
	case errno == uint64(unix.EAGAIN):
		e.benign = true
	// The device said before that it cannot, and nothing was lost. A disk that says so of a read or a write is at fault.
	case errno == uint64(unix.EOPNOTSUPP) && (op == Discard || op == Other):
		e.benign = true
	}
	return e, nil
}

func malformed(line string) error {
	return fmt.Errorf("trace line %.100q: %w", line, errdefs.ErrInvalidArgument)
}

// parseRWBS reads what blk_fill_rwbs writes: "F" for a flush that comes first, the operation, and flags.
func parseRWBS(s string) (op Op, isReadahead, ok bool) {
	rest, hasFlush := strings.CutPrefix(s, "F")
	switch {
	case strings.HasPrefix(rest, "R"):
		op, rest = Read, rest[1:]
	case strings.HasPrefix(rest, "W"):
		op, rest = Write, rest[1:]
	case strings.HasPrefix(rest, "DE"):
		op, rest = Discard, rest[2:]
	case strings.HasPrefix(rest, "D"):
		op, rest = Discard, rest[1:]
	case strings.HasPrefix(rest, "N"):
		op, rest = Other, rest[1:]
	case strings.HasPrefix(rest, "Z") && len(rest) >= 2: // zones: a second letter says what is done
		op, rest = Other, rest[2:]
	// REQ_OP_FLUSH, alone or after REQ_PREFLUSH. Flags, if any, begin with "F" only if there was none before.
	case hasFlush:
		op, rest = Flush, strings.TrimPrefix(rest, "F")
	default:
		return "", false, false
	}
	if strings.Trim(rest, "FASMU") != "" || len(s) > 9 {
		return "", false, false
	}
	return op, strings.Contains(rest, "A"), true
}
