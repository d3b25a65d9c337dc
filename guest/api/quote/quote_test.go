package quote

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// The layouts are written here once more, field by field from the documents' tables, so that an offset that is wrong above does not
// fit.

// snp is an attestation report whose fields have bytes of their own.
func snp(version uint32) []byte {
	var b []byte
	field := func(n int, value byte) { b = append(b, bytes.Repeat([]byte{value}, n)...) }
	b = binary.LittleEndian.AppendUint32(b, version) // VERSION
	field(4, 1)                                      // GUEST_SVN
	field(8, 2)                                      // POLICY
	field(16, 3)                                     // FAMILY_ID
	field(16, 4)                                     // IMAGE_ID
	field(4, 5)                                      // VMPL
	field(4, 6)                                      // SIGNATURE_ALGO
	field(8, 7)                                      // CURRENT_TCB
	field(8, 8)                                      // PLATFORM_INFO
	field(4, 9)                                      // AUTHOR_KEY_EN and others
	field(4, 0)                                      // reserved
	field(64, 0xda)                                  // REPORT_DATA
	field(48, 10)                                    // MEASUREMENT
	field(32, 0xcf)                                  // HOST_DATA
	field(48, 11)                                    // ID_KEY_DIGEST
	field(48, 12)                                    // AUTHOR_KEY_DIGEST
	field(32, 13)                                    // REPORT_ID
	field(32, 14)                                    // REPORT_ID_MA
	field(0x2a0-len(b), 15)                          // TCBs, chip and versions
	field(512, 16)                                   // SIGNATURE
	return b
}

// tdx is a quote whose fields have bytes of their own.
func tdx(version uint16, extra ...byte) []byte {
	b := binary.LittleEndian.AppendUint16(nil, version)
	field := func(n int, value byte) { b = append(b, bytes.Repeat([]byte{value}, n)...) }
	b = binary.LittleEndian.AppendUint16(b, 2) // attestation key type: ECDSA P-256
	b = binary.LittleEndian.AppendUint32(b, 0x81)
	field(4, 1)          // reserved
	field(16, 2)         // QE vendor
	field(20, 3)         // user data
	if len(extra) == 6 { // version 5: type and size of the body
		b = append(b, extra...)
	}
	field(16, 4)    // TEE_TCB_SVN
	field(48, 5)    // MRSEAM
	field(48, 6)    // MRSIGNERSEAM
	field(8, 7)     // SEAMATTRIBUTES
	field(8, 8)     // TDATTRIBUTES
	field(8, 9)     // XFAM
	field(48, 10)   // MRTD
	field(48, 0xcf) // MRCONFIGID
	field(48, 11)   // MROWNER
	field(48, 12)   // MROWNERCONFIG
	field(4*48, 13) // RTMR0 to RTMR3
	field(64, 0xda) // REPORTDATA
	if version == 5 && len(extra) == 6 && extra[0] == 3 {
		field(16+48, 14) // TEE_TCB_SVN_2, MRSERVICETD
	}
	b = binary.LittleEndian.AppendUint32(b, 8)
	field(8, 15) // signature
	return b
}

var (
	td10 = []byte{2, 0, 0x48, 2, 0, 0}
	td15 = []byte{3, 0, 0x88, 2, 0, 0}
)

func TestParse(t *testing.T) {
	t.Parallel()
	want := Claims{LaunchData: bytes.Repeat([]byte{0xcf}, 32)}
	copy(want.ReportData[:], bytes.Repeat([]byte{0xda}, 64))
	for version := uint32(2); version <= 5; version++ {
		got, err := Parse(SEVGuest, snp(version))
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("SNP %d: %v\n%s", version, err, d)
		}
	}
	want.LaunchData = bytes.Repeat([]byte{0xcf}, 48)
	for name, blob := range map[string][]byte{
		"version 4":              tdx(4),
		"version 4, padded":      append(tdx(4), make([]byte, 100)...),
		"version 5 with TDX 1.0": tdx(5, td10...),
		"version 5 with TDX 1.5": tdx(5, td15...),
	} {
		got, err := Parse(TDXGuest, blob)
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("TDX %s: %v\n%s", name, err, d)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	set := func(b []byte, at int, v ...byte) []byte { copy(b[at:], v); return b }
	for name, c := range map[string]struct {
		provider string
		blob     []byte
		is       func(error) bool
	}{
		"unknown provider":              {"arm_cca_guest", snp(2), errdefs.IsNotImplemented},
		"no provider":                   {"", snp(2), errdefs.IsNotImplemented},
		"empty SNP":                     {SEVGuest, nil, errdefs.IsInvalidArgument},
		"SNP that is cut":               {SEVGuest, snp(2)[:0x49f], errdefs.IsInvalidArgument},
		"SNP with more behind":          {SEVGuest, append(snp(2), 0), errdefs.IsInvalidArgument},
		"SNP before version 2":          {SEVGuest, snp(1), errdefs.IsInvalidArgument},
		"SNP of a later version":        {SEVGuest, snp(6), errdefs.IsInvalidArgument},
		"TDX as SNP":                    {SEVGuest, tdx(4), errdefs.IsInvalidArgument},
		"empty TDX":                     {TDXGuest, nil, errdefs.IsInvalidArgument},
		"TDX header alone":              {TDXGuest, tdx(4)[:48], errdefs.IsInvalidArgument},
		"TDX version 3":                 {TDXGuest, tdx(3), errdefs.IsInvalidArgument},
		"TDX version 6":                 {TDXGuest, tdx(6), errdefs.IsInvalidArgument},
		"SGX":                           {TDXGuest, set(tdx(4), 4, 0), errdefs.IsInvalidArgument},
		"TDX without a signature":       {TDXGuest, tdx(4)[:48+584], errdefs.IsInvalidArgument},
		"TDX with half a signature":     {TDXGuest, tdx(4)[:48+584+4+7], errdefs.IsInvalidArgument},
		"TDX with an endless signature": {TDXGuest, set(tdx(4), 48+584, 0xff, 0xff, 0xff, 0xff), errdefs.IsInvalidArgument},
		"version 5 without a body":      {TDXGuest, tdx(5, td10...)[:50], errdefs.IsInvalidArgument},
		"version 5 of another body":     {TDXGuest, tdx(5, 1, 0, 0x80, 1, 0, 0), errdefs.IsInvalidArgument},
		"version 5, size of the other":  {TDXGuest, tdx(5, 2, 0, 0x88, 2, 0, 0), errdefs.IsInvalidArgument},
		"version 5, body that is cut":   {TDXGuest, tdx(5, td15...)[:48+6+600], errdefs.IsInvalidArgument},
		"version 4 with a body of 5":    {TDXGuest, set(tdx(5, td10...), 0, 4), errdefs.IsInvalidArgument},
		"SNP as TDX":                    {TDXGuest, snp(4), errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got, err := Parse(c.provider, c.blob); !c.is(err) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}

func FuzzParseSNP(f *testing.F) {
	f.Add(snp(2))
	f.Add(snp(5))
	f.Add(snp(2)[:100])
	f.Fuzz(func(t *testing.T, b []byte) { fuzz(t, SEVGuest, b, 32) })
}

func FuzzParseTDX(f *testing.F) {
	f.Add(tdx(4))
	f.Add(tdx(5, td10...))
	f.Add(tdx(5, td15...))
	f.Add(tdx(4)[:100])
	f.Fuzz(func(t *testing.T, b []byte) { fuzz(t, TDXGuest, b, 48) })
}

// fuzz: what is taken has its fields in the bytes, and shares no memory with them.
func fuzz(t *testing.T, provider string, b []byte, launchBytes int) {
	before := bytes.Clone(b)
	c, err := Parse(provider, b)
	if err != nil {
		if !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
		return
	}
	if len(c.LaunchData) != launchBytes || !bytes.Contains(b, c.ReportData[:]) || !bytes.Contains(b, c.LaunchData) {
		t.Errorf("%x is not in %x", c, b)
	}
	clear(c.LaunchData)
	if !bytes.Equal(before, b) {
		t.Error("the claims are the caller's bytes")
	}
}

func TestLaunchDataStandForInitData(t *testing.T) {
	t.Parallel()
	digest := bytes.Repeat([]byte{0xcf}, 48)
	for name, c := range map[string]struct {
		field, digest []byte
		ok            bool
	}{
		"as long as the field":  {digest, digest, true},
		"cut to the field":      {digest[:32], digest, true},
		"padded to the field":   {append(bytes.Clone(digest[:32]), make([]byte, 16)...), digest[:32], true},
		"another":               {bytes.Repeat([]byte{0xce}, 48), digest, false},
		"its beginning alone":   {append(bytes.Clone(digest[:32]), make([]byte, 16)...), digest, false},
		"none, and no document": {make([]byte, 48), nil, true},
		"a digest, no document": {digest, nil, false},
		"a document, no digest": {make([]byte, 32), digest, false},
	} {
		err := Claims{LaunchData: c.field}.CheckInitData(c.digest)
		if (err == nil) != c.ok || err != nil && !errdefs.IsUnauthorized(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
