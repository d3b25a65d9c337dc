// Package tee asks the guest's TEE what it says of this guest: what the host bound to its launch, and quotes.
//
// The interface is the kernel's configfs-tsm (Documentation/ABI/testing/configfs-tsm-report), and for what a TDX guest has to know
// without its host, the TDX module's report by /dev/tdx_guest.
package tee

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/api/quote"
)

const (
	reports = configfsi.TsmPrefix + "/report"

	// maxWaiting bounds the callers that wait for their quote. The host asks for quotes, and a TDX host may take its time for each.
	maxWaiting = 8
	// maxQuote bounds a quote, in bytes. The kernel's own bound for outblob was 32 KiB for long.
	maxQuote = 256 << 10
)

// TEE is the guest's TEE. It may be used by several goroutines at once.
type TEE struct {
	provider string
	files    configfsi.Client
	tdReport func(reportData [64]byte) ([]byte, error)
	waiting  chan struct{} // a place for each caller
	turn     chan struct{} // one place: the kernel takes one request at a time anyhow
}

// Open finds the TEE. The error is errdefs.ErrNotFound where the kernel has none, and errdefs.ErrNotImplemented for one that is neither
// SEV-SNP nor TDX.
func Open() (*TEE, error) {
	files, err := linuxtsm.MakeClient()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, noTEE()
	}
	if err != nil {
		return nil, fmt.Errorf("TEE: %v: %w", err, errdefs.ErrFailedPrecondition)
	}
	return open(files, tdReport)
}

func noTEE() error { return fmt.Errorf("TEE: the kernel has none: %w", errdefs.ErrNotFound) }

func open(files configfsi.Client, tdReport func([64]byte) ([]byte, error)) (*TEE, error) {
	t := &TEE{files: files, tdReport: tdReport, waiting: make(chan struct{}, maxWaiting), turn: make(chan struct{}, 1)}
	err := t.withEntry(func(r *report.OpenReport) error {
		provider, err := r.ReadOption("provider")
		t.provider = strings.TrimSpace(string(provider))
		return err
	})
	if err != nil {
		return nil, err
	}
	if t.provider != quote.SEVGuest && t.provider != quote.TDXGuest {
		return nil, fmt.Errorf("TEE: %.32q is not known to this guest service: %w", t.provider, errdefs.ErrNotImplemented)
	}
	return t, nil
}

// Provider is the kernel's name of the TEE.
func (t *TEE) Provider() string { return t.provider }

// LaunchData is what the host bound to this guest's launch: HOSTDATA of SEV-SNP, MRCONFIGID of TDX. It comes from the firmware, which
// authenticates it, and never through the host.
func (t *TEE) LaunchData(ctx context.Context) ([]byte, error) {
	// So that what comes back is the answer to this question.
	var fresh [64]byte
	rand.Read(fresh[:])
	if t.provider == quote.TDXGuest {
		// Not from a quote: that is made by the host's quoting service, and its signature cannot be checked in here.
		b, err := t.tdReport(fresh)
		if err != nil {
			return nil, fmt.Errorf("TEE: report of the TDX module: %v: %w", err, errdefs.ErrUnavailable)
		}
		return parseTDReport(b, fresh)
	}
	blob, err := t.ask(ctx, fresh)
	if err != nil {
		return nil, err
	}
	claims, err := quote.Parse(t.provider, blob)
	return claims.LaunchData, err
}

// Quote is a quote over the report data, as configfs-tsm gives it. It waits for its turn until ctx ends; once it has it, for the kernel.
// The error is errdefs.ErrResourceExhausted when too many wait and errdefs.ErrUnavailable when there is none now.
func (t *TEE) Quote(ctx context.Context, reportData [64]byte) ([]byte, error) {
	return t.ask(ctx, reportData)
}

// ask gets a report over the report data, and makes sure that it is one.
func (t *TEE) ask(ctx context.Context, reportData [64]byte) ([]byte, error) {
	select {
	case t.waiting <- struct{}{}:
		defer func() { <-t.waiting }()
	default:
		return nil, fmt.Errorf("TEE: more than %d callers wait for a quote, try again: %w", maxWaiting, errdefs.ErrResourceExhausted)
	}
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return nil, fmt.Errorf("TEE: the quotes before this one take too long, try again: %v: %w", ctx.Err(), errdefs.ErrUnavailable)
	}
	var blob []byte
	err := t.withEntry(func(r *report.OpenReport) error {
		r.InBlob = reportData[:]
		// A guest below a service module of its own (SVSM) may not ask for reports of its level. TDX knows no levels.
		if floor, err := r.PrivilegeLevelFloor(); err == nil {
			r.Privilege = &report.Privilege{Level: floor}
		}
		// It fails when somebody else writes to the entry meanwhile: the generation is another one then.
		resp, err := r.Get()
		if err != nil {
			return err
		}
		blob = resp.OutBlob
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(blob) > maxQuote {
		return nil, fmt.Errorf("TEE: a quote of %d bytes is longer than %d: %w", len(blob), maxQuote, errdefs.ErrUnavailable)
	}
	claims, err := quote.Parse(t.provider, blob)
	if err != nil {
		return nil, fmt.Errorf("TEE: %v: %w", err, errdefs.ErrUnavailable)
	}
	if claims.ReportData != reportData {
		return nil, fmt.Errorf("TEE: the quote is over something else than what was asked for: %w", errdefs.ErrUnavailable)
	}
	return blob, nil
}

// withEntry makes a report entry of its own, uses it and removes it.
func (t *TEE) withEntry(use func(*report.OpenReport) error) error {
	dir, err := t.files.MkdirTemp(reports, "sealvol")
	if errors.Is(err, unix.ENXIO) { // the interface is there, and nobody behind it
		return noTEE()
	}
	if err != nil {
		return fmt.Errorf("TEE: new report: %v: %w", err, errdefs.ErrUnavailable)
	}
	r, err := report.UnsafeWrap(t.files, dir) // removes the folder when it fails
	if err != nil {
		return fmt.Errorf("TEE: new report: %v: %w", err, errdefs.ErrUnavailable)
	}
	err = use(r)
	if err := errors.Join(err, r.Destroy()); err != nil {
		return fmt.Errorf("TEE: report: %s: %w", strings.ReplaceAll(err.Error(), "\n", "; "), errdefs.ErrUnavailable)
	}
	return nil
}
