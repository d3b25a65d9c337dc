package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/sealvol/sealvol/contrib/internal/guest"
	"github.com/sealvol/sealvol/guest/api/quote"
	"github.com/sealvol/sealvol/guest/api/receipt"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

const receiptShort = "get or check a pod's receipt: what is sealed, quoted by the TEE"

const receiptHelp = `Usage: sealvol receipt [flags] SANDBOX
       sealvol receipt --verify FILE --nonce HEX --quote FILE

Prints the receipt of a running Kata pod: one line of canonical JSON that says
which policy is in force and where it came from, and of each volume how it is
sealed and where it is mounted. With a nonce, and where there is a TEE, the
guest has the TEE quote it: the quote's report data is the SHA-512 of the
receipt (without the end of the line), which holds the nonce. SANDBOX is the
pod sandbox's id or the start of it. Needs root on the node.

With --verify it checks a receipt that was kept, without any pod.

Examples:
  sealvol receipt "$(crictl pods -q --name my-pod)" | jq .volumes
  sealvol receipt --nonce "$NONCE" --quote quote.bin 3f2a > receipt.json
  sealvol receipt --verify receipt.json --nonce "$NONCE" --quote quote.bin

What this checks is that receipt, nonce and quote belong together. It does not
check the quote: give that to a verifier of the TEE's maker, and choose the
nonce (16 to 64 random bytes) where the answer is wanted, not on the node.

Flags:
`

// receiver gets receipts from guests.
type receiver struct{ guests }

// receiptFlags are the flags of receipt that have nothing to do with finding the guest.
type receiptFlags struct{ nonce, quote, verify string }

func (r *receiver) run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("receipt", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // its own reports would repeat ours
	var f receiptFlags
	flags.StringVar(&f.nonce, "nonce", "", "`HEX` of 16 to 64 bytes that were never used before")
	flags.StringVar(&f.quote, "quote", "", "`FILE` for the TEE's quote; with --verify, the file that has it")
	flags.StringVar(&f.verify, "verify", "", "check the receipt in `FILE` instead of getting one")
	pod := r.flags(flags)
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(stdout)
		_, err := io.WriteString(stdout, receiptHelp)
		flags.PrintDefaults()
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	nonce, err := f.parse()
	if err != nil {
		return err
	}
	if f.verify != "" {
		if flags.NArg() > 0 || *pod.cid != 0 {
			return fmt.Errorf("%w: --verify needs no guest", errUsage)
		}
		return verify(f, nonce, stdout)
	}
	if err := pod.check(flags); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	_, cid, err := r.find(ctx, pod, flags)
	if err != nil {
		return err
	}
	var resp *sealvolv1.ReceiptResponse
	err = r.Ask(ctx, cid, func(c sealvolv1.ControlService) (err error) {
		resp, err = c.Receipt(ctx, &sealvolv1.ReceiptRequest{Nonce: nonce})
		return err
	})
	if err != nil {
		return fmt.Errorf("guest with CID %d: %w", cid, err)
	}
	if err := checkReceipt(resp, nonce); err != nil {
		return fmt.Errorf("guest with CID %d: its answer is damaged or forged: %w", cid, err)
	}
	if f.quote != "" {
		if len(resp.Quote) == 0 {
			return fmt.Errorf("guest with CID %d: it has no TEE, so there is no quote for %s", cid, f.quote)
		}
		if err := os.WriteFile(f.quote, resp.Quote, 0o644); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(stdout, "%s\n", resp.Receipt)
	return err
}

// parse returns the nonce; nil for none.
func (f receiptFlags) parse() ([]byte, error) {
	if f.verify != "" && (f.nonce == "" || f.quote == "") {
		return nil, fmt.Errorf("%w: --verify needs --nonce and --quote", errUsage)
	}
	if f.nonce == "" {
		if f.quote != "" {
			return nil, fmt.Errorf("%w: --quote needs --nonce", errUsage)
		}
		return nil, nil
	}
	nonce, err := hex.DecodeString(f.nonce)
	if err != nil {
		return nil, fmt.Errorf("%w: --nonce: %w", errUsage, err)
	}
	if err := receipt.CheckNonce(nonce); err != nil {
		return nil, fmt.Errorf("%w: --nonce: %w", errUsage, err)
	}
	return nonce, nil
}

// checkReceipt is an error unless a guest's answer can be shown on a terminal and fits the nonce, and a quote in it the receipt.
func checkReceipt(resp *sealvolv1.ReceiptResponse, nonce []byte) error {
	if i := slices.IndexFunc([]rune(string(resp.Receipt)), guest.Unprintable); i >= 0 {
		return fmt.Errorf("the receipt holds the character %q", []rune(string(resp.Receipt))[i])
	}
	r, err := receipt.Parse(resp.Receipt)
	if err != nil {
		return err
	}
	if len(resp.Quote) > 0 {
		_, err := fit(r.TEE, resp.Receipt, resp.Quote, nonce)
		return err
	}
	if r.Nonce != hex.EncodeToString(nonce) {
		return errors.New("the receipt answers another nonce")
	}
	return nil
}

// fit checks that receipt, quote and nonce belong together, and that the init-data of the receipt is what the quote says was launched.
func fit(tee string, encoded, blob, nonce []byte) (quote.Claims, error) {
	provider := tee
	if tee == receipt.Insecure {
		provider = quote.SEVGuest // whose reports the test double makes up
	}
	claims, err := quote.Parse(provider, blob)
	if err != nil {
		return quote.Claims{}, err
	}
	r, err := receipt.Verify(claims.ReportData[:], encoded, nonce)
	if err != nil {
		return quote.Claims{}, err
	}
	digest := ""
	if d := r.Policy.InitData; d != nil {
		digest = d.Digest
	}
	launched, err := hex.DecodeString(digest)
	if err != nil {
		return quote.Claims{}, fmt.Errorf("the receipt's digest of init-data: %w", err)
	}
	return claims, claims.CheckInitData(launched)
}

// verify checks a receipt that was kept.
func verify(f receiptFlags, nonce []byte, stdout io.Writer) error {
	encoded, err := readBounded(f.verify, receipt.MaxBytes+1)
	if err != nil {
		return err
	}
	encoded = bytes.TrimSuffix(encoded, []byte("\n"))
	blob, err := readBounded(f.quote, receipt.MaxBytes)
	if err != nil {
		return err
	}
	r, err := receipt.Parse(encoded)
	if err != nil {
		return fmt.Errorf("%s: %w", f.verify, err)
	}
	claims, err := fit(r.TEE, encoded, blob, nonce)
	if err != nil {
		return fmt.Errorf("%s and %s: %w", f.verify, f.quote, err)
	}
	proof := "NOT CHECKED: the quote's signature, certificates and measurement. They are for a verifier of the TEE's maker."
	if r.TEE == receipt.Insecure {
		proof = "The quote is a test double's: it proves NOTHING."
	}
	_, err = fmt.Fprintf(stdout, "The quote carries this receipt, which answers the nonce.\ntee:       %q\nhost data: %x\npolicy:    sha256:%q from %q\n%s\n",
		r.TEE, claims.LaunchData, r.Policy.Digest, r.Policy.Source, proof)
	return err
}

// readBounded reads a file that may have up to limit bytes.
func readBounded(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: longer than %d bytes", name, limit)
	}
	return b, nil
}
