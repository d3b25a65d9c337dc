package tee

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/api/quote"
	"github.com/sealvol/sealvol/guest/api/receipt"
)

// Double stands in for a TEE on machines that have none, so that all that depends on one can be tried. It proves nothing.
type Double struct{ report []byte }

// NewDouble makes a double that says what a file says: an attestation report of SEV-SNP, of whatever origin.
func NewDouble(file string) (*Double, error) {
	report, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("test double of a TEE: %v: %w", err, errdefs.ErrFailedPrecondition)
	}
	if _, err := quote.Parse(quote.SEVGuest, report); err != nil {
		return nil, fmt.Errorf("test double of a TEE: %s: %w", file, err)
	}
	return &Double{report}, nil
}

// Provider is receipt.Insecure.
func (*Double) Provider() string { return receipt.Insecure }

// LaunchData is the report's HOSTDATA.
func (d *Double) LaunchData(context.Context) ([]byte, error) {
	claims, err := quote.Parse(quote.SEVGuest, d.report)
	return claims.LaunchData, err
}

// Quote is the report with other report data, which its signature does not fit.
func (d *Double) Quote(_ context.Context, reportData [64]byte) ([]byte, error) {
	const reportDataAt = 0x50 // in ATTESTATION_REPORT, see package quote
	forged := bytes.Clone(d.report)
	copy(forged[reportDataAt:], reportData[:])
	return forged, nil
}
