package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/sealvol/sealvol/contrib/internal/guest"
	"github.com/sealvol/sealvol/guest/api/receipt"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// guestReceipt is a guest's control service, or the host in its place.
type guestReceipt func(nonce []byte) (*sealvolv1.ReceiptResponse, error)

func (guestReceipt) Status(context.Context, *sealvolv1.StatusRequest) (*sealvolv1.StatusResponse, error) {
	return nil, errgrpc.ToGRPC(errdefs.ErrNotImplemented)
}

func (g guestReceipt) Receipt(_ context.Context, req *sealvolv1.ReceiptRequest) (*sealvolv1.ReceiptResponse, error) {
	r, err := g(req.Nonce)
	return r, errgrpc.ToGRPC(err)
}

// snpReport is an attestation report of SEV-SNP over the report data; it is signed by nobody.
func snpReport(reportData [64]byte) []byte {
	b := make([]byte, 0x4a0)
	binary.LittleEndian.PutUint32(b, 2)
	copy(b[0x50:], reportData[:])
	copy(b[0xc0:], bytes.Repeat([]byte{0xcf}, 32))
	return b
}

// honest answers as a guest with a TEE does.
func honest(t *testing.T, change func(*receipt.Receipt)) guestReceipt {
	return func(nonce []byte) (*sealvolv1.ReceiptResponse, error) {
		r := receipt.Receipt{
			Version: receipt.Version, Service: "v0.1.0", TEE: "sev_guest", Nonce: hex.EncodeToString(nonce), Issued: time.Unix(1772366400, 0).UTC(),
			Policy: receipt.Policy{
				Source: "init-data", Digest: strings.Repeat("5e", 32),
				InitData: &receipt.InitData{Algorithm: "sha384", Digest: strings.Repeat("cf", 48)}, // SEV-SNP reports 32 bytes of it
			},
			Volumes: []receipt.Volume{{Name: "encrypted", State: "open", Suite: "aegis128-random"}},
		}
		if change != nil {
			change(&r)
		}
		encoded, err := r.Encode()
		if err != nil {
			t.Error(err)
		}
		resp := &sealvolv1.ReceiptResponse{Receipt: encoded}
		if len(nonce) > 0 && r.TEE != receipt.NoTEE {
			resp.Quote = snpReport(receipt.ReportData(encoded))
		}
		return resp, nil
	}
}

func receiptNode(t *testing.T, g guestReceipt) *receiver {
	n := newNode(t, func(s *ttrpc.Server) { sealvolv1.RegisterControlService(s, g) })
	n.sandbox(t, 0, "3f2a9", "vsock://7:1024")
	return &receiver{n.guests}
}

func (r *receiver) get(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := r.run(t.Context(), args, &out)
	return out.String(), err
}

const hexNonce = "00112233445566778899aabbccddeeff"

func TestReceiptGoesFromTheGuestToARelyingParty(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	kept, quoted := filepath.Join(dir, "receipt.json"), filepath.Join(dir, "quote.bin")
	r := receiptNode(t, honest(t, nil))
	out, err := r.get(t, "--nonce", hexNonce, "--quote", quoted, "3f2")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out, `{"containers":[]`) || strings.Count(out, "\n") != 1 || !strings.Contains(out, `"name":"encrypted"`) {
		t.Errorf("printed %q", out)
	}
	if err := os.WriteFile(kept, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err = r.get(t, "--verify", kept, "--nonce", hexNonce, "--quote", quoted)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"carries this receipt", `"sev_guest"`, strings.Repeat("cf", 32), `from "init-data"`, "NOT CHECKED"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}

	other := strings.Repeat("ff", 16)
	if out, err := r.get(t, "--verify", kept, "--nonce", other, "--quote", quoted); err == nil || !strings.Contains(err.Error(), "another nonce") {
		t.Errorf("a receipt for another nonce: %v\n%s", err, out)
	}
	if out, err := r.get(t, "--verify", kept, "--nonce", hexNonce, "--quote", kept); err == nil {
		t.Errorf("a quote that is none: %s", out)
	}
	changed := bytes.Replace(mustRead(t, kept), []byte("encrypted"), []byte("encryptad"), 1)
	if err := os.WriteFile(kept, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := r.get(t, "--verify", kept, "--nonce", hexNonce, "--quote", quoted); err == nil || !strings.Contains(err.Error(), "report data") {
		t.Errorf("a receipt that was changed: %v\n%s", err, out)
	}
}

// Whoever can ask the TEE for a quote over data of their own can write a receipt, but not what was launched.
func TestReceiptThatNamesAnotherInitDataThanWasLaunchedIsRefused(t *testing.T) {
	t.Parallel()
	for name, claimed := range map[string]*receipt.InitData{
		"another document": {Algorithm: "sha384", Digest: strings.Repeat("ce", 48)},
		"none":             nil,
		"no digest":        {Algorithm: "sha384", Digest: "zz"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := receiptNode(t, honest(t, func(r *receipt.Receipt) { r.Policy.InitData = claimed }))
			if out, err := r.get(t, "--nonce", hexNonce, "--quote", filepath.Join(t.TempDir(), "quote.bin"), "3f2"); err == nil || out != "" {
				t.Errorf("printed %q, %v", out, err)
			}
		})
	}
}

func mustRead(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReceiptWithoutTEEIsPrintedAndHasNoQuote(t *testing.T) {
	t.Parallel()
	r := receiptNode(t, honest(t, func(r *receipt.Receipt) { r.TEE = receipt.NoTEE }))
	for _, args := range [][]string{{"--cid", "7"}, {"3f2a9"}, {"--nonce", hexNonce, "3f2a9"}} {
		if out, err := r.get(t, args...); err != nil || !strings.Contains(out, `"tee":"none"`) {
			t.Errorf("%v: %v, %s", args, err, out)
		}
	}
	file := filepath.Join(t.TempDir(), "quote.bin")
	out, err := r.get(t, "--nonce", hexNonce, "--quote", file, "3f2a9")
	if err == nil || !strings.Contains(err.Error(), "no TEE") || out != "" {
		t.Errorf("a quote was asked for: %v, %s", err, out)
	}
}

func TestTestDoublesReceiptIsCalledThat(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	kept, quoted := filepath.Join(dir, "receipt.json"), filepath.Join(dir, "quote.bin")
	r := receiptNode(t, honest(t, func(r *receipt.Receipt) { r.TEE = receipt.Insecure }))
	out, err := r.get(t, "--nonce", hexNonce, "--quote", quoted, "3f2a9")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(kept, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err = r.get(t, "--verify", kept, "--nonce", hexNonce, "--quote", quoted); err != nil || !strings.Contains(out, "proves NOTHING") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestForgedReceiptsAreRefused(t *testing.T) {
	t.Parallel()
	resp := func(change func(*sealvolv1.ReceiptResponse)) guestReceipt {
		return func(nonce []byte) (*sealvolv1.ReceiptResponse, error) {
			r, err := honest(t, nil)(nonce)
			change(r)
			return r, err
		}
	}
	for name, c := range map[string]struct {
		guest guestReceipt
		want  string
	}{
		"nothing":             {resp(func(r *sealvolv1.ReceiptResponse) { r.Receipt = nil }), "receipt"},
		"another form":        {resp(func(r *sealvolv1.ReceiptResponse) { r.Receipt = append(r.Receipt, ' ') }), "canonical"},
		"an old one":          {func([]byte) (*sealvolv1.ReceiptResponse, error) { return honest(t, nil)(make([]byte, 16)) }, "another nonce"},
		"an old one unquoted": {func([]byte) (*sealvolv1.ReceiptResponse, error) { return honest(t, nil)(nil) }, "another nonce"},
		"an old quote":        {resp(func(r *sealvolv1.ReceiptResponse) { r.Quote = snpReport([64]byte{}) }), "report data"},
		"no quote but bytes":  {resp(func(r *sealvolv1.ReceiptResponse) { r.Quote = []byte("x") }), "attestation report"},
		"of an unknown TEE":   {honest(t, func(r *receipt.Receipt) { r.TEE = "sgx" }), "not known"},
		"escape":              {honest(t, func(r *receipt.Receipt) { r.Service = "\u009b31m" }), "holds the character"},
		"text run backwards":  {honest(t, func(r *receipt.Receipt) { r.Volumes[0].Name = "\u202e" }), "holds the character"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "quote.bin")
			out, err := receiptNode(t, c.guest).get(t, "--nonce", hexNonce, "--quote", file, "3f2a9")
			if err == nil || out != "" || !strings.Contains(err.Error(), "damaged or forged") || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, output %q", err, out)
			}
			if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a quote was kept: %v", err)
			}
		})
	}
}

func TestReceiptOfAGuestThatFails(t *testing.T) {
	t.Parallel()
	r := receiptNode(t, func([]byte) (*sealvolv1.ReceiptResponse, error) { return nil, errdefs.ErrUnavailable })
	if _, err := r.get(t, "3f2a9"); err == nil || !strings.Contains(err.Error(), "guest with CID 7: control service") {
		t.Errorf("got %v", err)
	}
	r = receiptNode(t, func([]byte) (*sealvolv1.ReceiptResponse, error) { return nil, errdefs.ErrNotImplemented })
	if _, err := r.get(t, "3f2a9"); err == nil || !strings.Contains(err.Error(), "another version") {
		t.Errorf("got %v", err)
	}
}

func TestReceiptCommandLine(t *testing.T) {
	t.Parallel()
	r := &receiver{newGuests()}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"no sandbox":           {nil, "crictl pods -q"},
		"unknown flag":         {[]string{"-x"}, "not defined"},
		"nonce that is no hex": {[]string{"--nonce", "xy", "a"}, "--nonce"},
		"short nonce":          {[]string{"--nonce", "00", "a"}, "16 to 64"},
		"quote without nonce":  {[]string{"--quote", "q", "a"}, "--quote needs --nonce"},
		"verify alone":         {[]string{"--verify", "r"}, "--verify needs --nonce and --quote"},
		"verify with a guest":  {[]string{"--verify", "r", "--nonce", hexNonce, "--quote", "q", "a"}, "needs no guest"},
		"CID that is none":     {[]string{"--cid", "4294967296"}, "is no CID"},
	} {
		if _, err := r.get(t, c.args...); !errors.Is(err, errUsage) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if out, err := r.get(t, "--help"); err != nil || !strings.Contains(out, "--verify FILE") {
		t.Errorf("help: %v\n%s", err, out)
	}
}

// FuzzReceiptAnswer gives hostile answers to the check; what passes it can be shown on a terminal.
func FuzzReceiptAnswer(f *testing.F) {
	nonce, err := hex.DecodeString(hexNonce)
	if err != nil {
		f.Fatal(err)
	}
	encoded, err := receipt.Receipt{Version: receipt.Version, TEE: "sev_guest", Nonce: hexNonce}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded, snpReport(receipt.ReportData(encoded)))
	f.Add(encoded, []byte{})
	f.Add([]byte("{}"), []byte("x"))
	f.Fuzz(func(t *testing.T, encoded, quoted []byte) {
		if checkReceipt(&sealvolv1.ReceiptResponse{Receipt: encoded, Quote: quoted}, nonce) != nil {
			return
		}
		if strings.ContainsFunc(string(encoded), guest.Unprintable) || !bytes.Contains(encoded, []byte(hexNonce)) {
			t.Errorf("%q is shown", encoded)
		}
	})
}
