// Package quote reads what a TEE reports of itself. It judges nothing: whether a report is genuine is for a verifier with the maker's
// certificates to say.
//
// The guest uses it, and relying parties that want the two fields that a receipt is checked with. It imports nothing of the guest.
package quote

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
)

// The providers that Parse knows, as the kernel's configfs-tsm names them (Documentation/ABI/testing/configfs-tsm-report).
const (
	SEVGuest = "sev_guest" // AMD SEV-SNP
	TDXGuest = "tdx_guest" // Intel TDX
)

// Claims are the parts of a report that others choose: whoever asks for it and whoever launches the guest.
type Claims struct {
	// ReportData is what the guest asked to be reported.
	ReportData [64]byte
	// LaunchData is what the host gave to be bound to the launch: HOSTDATA of SEV-SNP, 32 bytes, MRCONFIGID of TDX, 48 bytes.
	LaunchData []byte
}

// CheckInitData is errdefs.ErrUnauthenticated unless the launch data stands for an init-data document with this digest; an empty digest
// is that of no document, for which the launch data are zeros.
func (c Claims) CheckInitData(digest []byte) error {
	if !bytes.Equal(c.LaunchData, LaunchData(digest, len(c.LaunchData))) {
		return fmt.Errorf("quote: launch data %x are not those of init-data with digest %x: %w", c.LaunchData, digest, errdefs.ErrUnauthenticated)
	}
	return nil
}

// LaunchData is what Kata makes of an init-data document's digest for a field of so many bytes: cut, or padded with zeros
// (adjustProperLength of its runtime and adjust_digest of its agent).
func LaunchData(digest []byte, length int) []byte {
	field := make([]byte, length)
	copy(field, digest)
	return field
}

// Parse reads a report as the provider's outblob has it: an attestation report of SEV-SNP, a quote of TDX. One that is malformed, or
// of a version that is not known, is errdefs.ErrInvalidArgument; a provider that is not known, errdefs.ErrNotImplemented.
//
// A TDX quote passes through the host before it reaches the guest, so in the guest its claims are the host's words; a relying party
// has them from the signature.
func Parse(provider string, blob []byte) (Claims, error) {
	switch provider {
	case SEVGuest:
		return parseSNP(blob)
	case TDXGuest:
		return parseTDX(blob)
	}
	return Claims{}, fmt.Errorf("quote: provider %.32q is not known: %w", provider, errdefs.ErrNotImplemented)
}

// SEV Secure Nested Paging Firmware ABI Specification (AMD 56860), table "ATTESTATION_REPORT Structure". The versions differ in fields
// that are not read here.
const (
	snpBytes      = 0x4a0
	snpReportData = 0x50
	snpHostData   = 0xc0
	snpHostBytes  = 32
	snpOldest     = 2
	snpNewest     = 5
)

func parseSNP(report []byte) (c Claims, err error) {
	if len(report) != snpBytes {
		return c, fmt.Errorf("quote: an attestation report of SEV-SNP has %d bytes, not %d: %w", snpBytes, len(report), errdefs.ErrInvalidArgument)
	}
	if v := binary.LittleEndian.Uint32(report); v < snpOldest || v > snpNewest {
		return c, fmt.Errorf("quote: attestation report of version %d, %d to %d are known: %w", v, snpOldest, snpNewest, errdefs.ErrInvalidArgument)
	}
	copy(c.ReportData[:], report[snpReportData:])
	c.LaunchData = bytes.Clone(report[snpHostData:][:snpHostBytes])
	return c, nil
}

// Intel TDX DCAP Quoting Library API, appendix A.3 (version 4) and A.4 (version 5): a header, a TD report body, which version 5
// precedes with its type and size, and the signature with its length. The bodies of TDX 1.0 and 1.5 have the same beginning.
const (
	tdxHeaderBytes   = 48
	tdxTEEType       = 4 // offset in the header
	tdxTEE           = 0x81
	tdxBody10        = 584
	tdxBody15        = 648
	tdxBodyIs10      = 2
	tdxBodyIs15      = 3
	tdxMRConfigID    = 184 // offset in the body, as the next
	tdxReportData    = 520
	tdxMRConfigBytes = 48
)

func parseTDX(quote []byte) (c Claims, err error) {
	header, rest, ok := cut(quote, tdxHeaderBytes)
	if !ok {
		return c, shortTDX(quote)
	}
	if tee := binary.LittleEndian.Uint32(header[tdxTEEType:]); tee != tdxTEE {
		return c, fmt.Errorf("quote: TEE type %#x is not TDX: %w", tee, errdefs.ErrInvalidArgument)
	}
	size := tdxBody10
	switch version := binary.LittleEndian.Uint16(header); version {
	case 4:
	case 5:
		var described []byte
		if described, rest, ok = cut(rest, 6); !ok {
			return c, shortTDX(quote)
		}
		if size, err = bodyBytes(described); err != nil {
			return c, err
		}
	default:
		return c, fmt.Errorf("quote: TDX quote of version %d, 4 and 5 are known: %w", version, errdefs.ErrInvalidArgument)
	}
	body, rest, ok := cut(rest, size)
	if !ok {
		return c, shortTDX(quote)
	}
	// Behind the signature there may be padding.
	length, rest, ok := cut(rest, 4)
	if !ok || uint64(binary.LittleEndian.Uint32(length)) > uint64(len(rest)) {
		return c, shortTDX(quote)
	}
	copy(c.ReportData[:], body[tdxReportData:])
	c.LaunchData = bytes.Clone(body[tdxMRConfigID:][:tdxMRConfigBytes])
	return c, nil
}

// bodyBytes reads the type and the size of a body of version 5, which must belong together.
func bodyBytes(described []byte) (int, error) {
	kind, size := binary.LittleEndian.Uint16(described), binary.LittleEndian.Uint32(described[2:])
	switch {
	case kind == tdxBodyIs10 && size == tdxBody10:
		return tdxBody10, nil
	case kind == tdxBodyIs15 && size == tdxBody15:
		return tdxBody15, nil
	}
	return 0, fmt.Errorf("quote: TDX quote with a body of type %d and %d bytes: %w", kind, size, errdefs.ErrInvalidArgument)
}

func shortTDX(quote []byte) error {
	return fmt.Errorf("quote: TDX quote of %d bytes is cut short: %w", len(quote), errdefs.ErrInvalidArgument)
}

func cut(b []byte, n int) (head, rest []byte, ok bool) {
	if len(b) < n {
		return nil, nil, false
	}
	return b[:n], b[n:], true
}
