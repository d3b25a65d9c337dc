package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/api/receipt"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/control"
	"github.com/sealvol/sealvol/guest/internal/gate"
	"github.com/sealvol/sealvol/guest/internal/initdata"
	"github.com/sealvol/sealvol/guest/internal/tee"
	"github.com/sealvol/sealvol/policy"
)

// attester is the guest's TEE, or its test double.
type attester interface {
	control.TEE
	// LaunchData is what the host bound to the launch of this guest.
	LaunchData(ctx context.Context) ([]byte, error)
}

// startPolicy finds the TEE, nil for none, and the policy that is in force before any request. When there can be none, nothing is
// accepted and the host is told why.
func startPolicy(ctx context.Context, cfg config, log *slog.Logger) (attester, *policy.Policy, gate.Origin) {
	t, err := openTEE(cfg.InsecureTEE, log)
	var p *policy.Policy
	var from gate.Origin
	if err == nil {
		p, from, err = origin(ctx, cfg, t, func() (*initdata.Document, error) { return initdata.Find("/sys", "/dev") })
	}
	if err != nil {
		log.Error("no policy, so nothing is accepted", "error", err)
		return t, policy.Default(), gate.Origin{Source: gate.FromImage, Refused: err}
	}
	log.Info("policy in force", "source", from.Source, "digest", p.Digest(), "sealed", p.Sealed(), "fixed", from.Fixed)
	if !from.Fixed {
		log.Warn("the host may bring a policy of its own (SetPolicy), which nothing binds to the guest's measurement")
	}
	return t, p, from
}

// openTEE returns nil where there is no TEE and the image wants no double of one.
func openTEE(double string, log *slog.Logger) (attester, error) {
	t, err := tee.Open()
	switch {
	case err == nil && double != "":
		return nil, fmt.Errorf("insecure_tee is set, and there is a TEE, %s: %w", t.Provider(), errdefs.ErrFailedPrecondition)
	case err == nil:
		return t, nil
	case !errdefs.IsNotFound(err):
		return nil, err
	case double == "":
		return nil, nil
	}
	log.Warn("INSECURE: a test double stands for the TEE, and proves nothing", "report", double)
	d, err := tee.NewDouble(double)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// origin finds the policy that is in force before any request of the host. Its error says why the guest must accept nothing.
//
// Init-data is used or refused, never ignored: neither a document without a TEE that reports it, nor a TEE that reports one that is
// not there. Otherwise the host could choose the policy of a guest whose attestation names another one.
func origin(ctx context.Context, cfg config, t attester, find func() (*initdata.Document, error)) (*policy.Policy, gate.Origin, error) {
	document, err := boundDocument(ctx, t, find)
	if err != nil {
		return nil, gate.Origin{}, err
	}
	o, err := choose(cfg, document)
	if err != nil {
		return nil, gate.Origin{}, err
	}
	if t != nil && t.Provider() == receipt.Insecure {
		o.Warnings = append(o.Warnings, "a test double stands for the TEE: nothing is attested")
	}
	if o.Text == "" {
		return policy.Default(), o, nil
	}
	p, err := policy.Load(ctx, []byte(o.Text))
	if err != nil {
		return nil, gate.Origin{}, fmt.Errorf("the policy of the %s: %w", o.Source, err)
	}
	return p, o, nil
}

// choose says which source the policy has by the image's demand; document is bound, or nil.
func choose(cfg config, document *initdata.Document) (o gate.Origin, err error) {
	given := ""
	if document != nil {
		o.InitData = &sealvolv1.InitData{Algorithm: document.Algorithm, Digest: hex.EncodeToString(document.Digest)}
		given = document.Policy
	}
	if cfg.PolicySource == sourceImage {
		o.Source, o.Fixed = gate.FromImage, true
		if o.Text, err = imageText(cfg.Policy); err != nil {
			return o, err
		}
		if given != "" && given != o.Text {
			return o, fmt.Errorf("init-data has a policy, and the image takes none but its own (policy_source = %q): %w", sourceImage, errdefs.ErrPermissionDenied)
		}
		return o, nil
	}
	if given != "" {
		o.Source, o.Text, o.Fixed = gate.FromInitData, given, true
		return o, nil
	}
	if cfg.PolicySource == sourceInitData {
		return o, fmt.Errorf("the image takes its policy from init-data alone (policy_source = %q), and there is no policy.rego: give the pod init-data that has it (annotation io.katacontainers.config.hypervisor.cc_init_data): %w",
			sourceInitData, errdefs.ErrFailedPrecondition)
	}
	o.Source = gate.FromImage
	if cfg.Policy != "" {
		o.Text, err = imageText(cfg.Policy)
	}
	return o, err
}

// boundDocument finds the document that the TEE reports; nil: it reports none, and there is none.
func boundDocument(ctx context.Context, t attester, find func() (*initdata.Document, error)) (*initdata.Document, error) {
	document, err := find()
	if errdefs.IsNotFound(err) {
		document, err = nil, nil
	}
	if err != nil {
		return nil, err
	}
	if t == nil {
		if document != nil {
			return nil, fmt.Errorf("there is init-data, and no TEE that reports its digest: %w", errdefs.ErrFailedPrecondition)
		}
		return nil, nil
	}
	launchData, err := t.LaunchData(ctx)
	if err != nil {
		return nil, err
	}
	if document != nil {
		return document, document.Bound(launchData)
	}
	if len(bytes.Trim(launchData, "\x00")) > 0 {
		return nil, fmt.Errorf("the TEE reports init-data with digest %x, and no disk has it: %w", launchData, errdefs.ErrFailedPrecondition)
	}
	return nil, nil
}

func imageText(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("the image's policy: %w", err)
	}
	if len(text) == 0 { // which would also read as if there were none
		return "", fmt.Errorf("the image's policy: %s is empty: %w", file, errdefs.ErrInvalidArgument)
	}
	return string(text), nil
}
