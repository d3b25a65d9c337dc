package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/api/receipt"
	"github.com/sealvol/sealvol/guest/internal/gate"
	"github.com/sealvol/sealvol/guest/internal/initdata"
)

const (
	authors = "package agent_policy\n# the author's\n"
	makers  = "package agent_policy\n# the image maker's\n"
)

// fakeTEE reports launch data.
type fakeTEE struct {
	launchData []byte
	err        error
}

func (fakeTEE) Provider() string                             { return "sev_guest" }
func (t fakeTEE) LaunchData(context.Context) ([]byte, error) { return t.launchData, t.err }
func (fakeTEE) Quote(context.Context, [64]byte) ([]byte, error) {
	return nil, errors.New("nobody asked")
}
func found(d *initdata.Document) func() (*initdata.Document, error) {
	return func() (*initdata.Document, error) { return d, nil }
}

func missing() (*initdata.Document, error) {
	return nil, fmt.Errorf("init-data: no disk has a document: %w", errdefs.ErrNotFound)
}

func malformed() (*initdata.Document, error) {
	return nil, fmt.Errorf("init-data: version: %w", errdefs.ErrInvalidArgument)
}

// document is one with a policy, or "" for none.
func document(t *testing.T, policy string) *initdata.Document {
	t.Helper()
	text := "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"aa.toml\" = \"\"\n"
	if policy != "" {
		text += "\"policy.rego\" = '''\n" + policy + "'''\n"
	}
	d, err := initdata.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func imageFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "policy.rego")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func sum(text string) string {
	s := sha256.Sum256([]byte(text))
	return hex.EncodeToString(s[:])
}

func TestOriginOfThePolicy(t *testing.T) {
	t.Parallel()
	doc := document(t, authors)
	bare := document(t, "")
	makersDoc := document(t, makers)
	launched := func(d *initdata.Document) attester { return fakeTEE{launchData: d.Digest} }
	plain := fakeTEE{launchData: make([]byte, 32)} // a TEE that was launched without init-data
	image := imageFile(t, makers)
	const none = "package agent_policy\n" // what policy.Default is
	for name, c := range map[string]struct {
		source policySource
		image  string // file
		tee    attester
		find   func() (*initdata.Document, error)
		from   string
		text   string // in force
		fixed  bool
	}{
		"nothing at all":                         {sourceSetPolicy, "", nil, missing, gate.FromImage, none, false},
		"the image's until the host's comes":     {sourceSetPolicy, image, nil, missing, gate.FromImage, makers, false},
		"a TEE without init-data":                {sourceSetPolicy, image, plain, missing, gate.FromImage, makers, false},
		"init-data before the image and host":    {sourceSetPolicy, image, launched(doc), found(doc), gate.FromInitData, authors, true},
		"init-data without a policy":             {sourceSetPolicy, image, launched(bare), found(bare), gate.FromImage, makers, false},
		"image, pinned":                          {sourceImage, image, nil, missing, gate.FromImage, makers, true},
		"image, pinned, and init-data beside it": {sourceImage, image, launched(bare), found(bare), gate.FromImage, makers, true},
		"image, pinned, init-data says the same": {sourceImage, image, launched(makersDoc), found(makersDoc), gate.FromImage, makers, true},
		"init-data, demanded":                    {sourceInitData, "", launched(doc), found(doc), gate.FromInitData, authors, true},
		"init-data, demanded, with an image's":   {sourceInitData, image, launched(doc), found(doc), gate.FromInitData, authors, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, o, err := origin(t.Context(), config{PolicySource: c.source, Policy: c.image}, c.tee, c.find)
			if err != nil {
				t.Fatal(err)
			}
			if o.Source != c.from || p.Digest() != sum(c.text) || o.Fixed != c.fixed || o.Text != c.text && c.text != none {
				t.Errorf("%s with digest %s, %q, fixed: %t; want %s with %q, fixed: %t", o.Source, p.Digest(), o.Text, o.Fixed, c.from, c.text, c.fixed)
			}
			if d, _ := c.find(); d != nil && o.InitData.GetDigest() != hex.EncodeToString(d.Digest) || d == nil && o.InitData != nil {
				t.Errorf("init-data %v", o.InitData)
			}
		})
	}
}

func TestOriginRefuses(t *testing.T) {
	t.Parallel()
	doc, other, bare := document(t, authors), document(t, makers), document(t, "")
	launched := fakeTEE{launchData: doc.Digest}
	image := imageFile(t, makers)
	all := []policySource{sourceSetPolicy, sourceImage, sourceInitData}
	for name, c := range map[string]struct {
		sources []policySource
		image   string
		tee     attester
		find    func() (*initdata.Document, error)
		is      func(error) bool
		words   string
	}{
		"host that swaps the document":        {all, image, launched, found(other), errdefs.IsPermissionDenied, "digest"},
		"host that withholds the document":    {all, image, launched, missing, errdefs.IsFailedPrecondition, "no disk has it"},
		"host that damages the document":      {all, image, launched, malformed, errdefs.IsInvalidArgument, "version"},
		"host that launches without a digest": {all, image, fakeTEE{launchData: make([]byte, 32)}, found(doc), errdefs.IsPermissionDenied, "digest"},
		"document and no TEE":                 {all, image, nil, found(doc), errdefs.IsFailedPrecondition, "no TEE"},
		"TEE that does not answer":            {all, image, fakeTEE{err: errdefs.ErrUnavailable}, missing, errdefs.IsUnavailable, ""},
		"TEE that reports nothing":            {all, image, fakeTEE{}, found(doc), errdefs.IsInternal, "too few"},
		"demanded and there is none":          {[]policySource{sourceInitData}, image, nil, missing, errdefs.IsFailedPrecondition, "cc_init_data"},
		"demanded and launched without": {
			[]policySource{sourceInitData}, image, fakeTEE{launchData: make([]byte, 32)}, missing, errdefs.IsFailedPrecondition, "cc_init_data",
		},
		"demanded and without a policy": {
			[]policySource{sourceInitData}, image, fakeTEE{launchData: bare.Digest}, found(bare), errdefs.IsFailedPrecondition, "policy.rego",
		},
		"pinned, and init-data has another": {[]policySource{sourceImage}, image, launched, found(doc), errdefs.IsPermissionDenied, "none but its own"},
		"no file of the image":              {[]policySource{sourceImage, sourceSetPolicy}, "/absent", nil, missing, func(err error) bool { return errors.Is(err, os.ErrNotExist) }, "image"},
		"empty file of the image":           {[]policySource{sourceImage, sourceSetPolicy}, imageFile(t, ""), nil, missing, errdefs.IsInvalidArgument, "empty"},
		"image's policy that does not load": {[]policySource{sourceImage, sourceSetPolicy}, imageFile(t, "package other"), nil, missing, errdefs.IsInvalidArgument, "image"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, source := range c.sources {
				p, o, err := origin(t.Context(), config{PolicySource: source, Policy: c.image}, c.tee, c.find)
				if !c.is(err) || p != nil || !strings.Contains(err.Error(), c.words) || strings.Contains(err.Error(), "\n") {
					t.Errorf("%s: %v from %v, %v", source, p, o, err)
				}
			}
		})
	}
	t.Run("init-data's policy that does not load", func(t *testing.T) {
		t.Parallel()
		bad := document(t, "package other\n")
		_, _, err := origin(t.Context(), config{PolicySource: sourceSetPolicy}, fakeTEE{launchData: bad.Digest}, found(bad))
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "init-data") {
			t.Errorf("got %v", err)
		}
	})
}

func TestTestDoubleBindsAndIsCalledInsecure(t *testing.T) {
	t.Parallel()
	doc := document(t, authors)
	report := make([]byte, 0x4a0)
	binary.LittleEndian.PutUint32(report, 2)
	copy(report[0xc0:], doc.Digest)
	file := filepath.Join(t.TempDir(), "report")
	if err := os.WriteFile(file, report, 0o600); err != nil {
		t.Fatal(err)
	}
	var logged strings.Builder
	double, err := openTEE(file, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if double.Provider() != receipt.Insecure || !strings.Contains(logged.String(), "INSECURE") || !strings.Contains(logged.String(), "level=WARN") {
		t.Errorf("provider %q, log %q", double.Provider(), &logged)
	}
	_, o, err := origin(t.Context(), config{PolicySource: sourceInitData}, double, found(doc))
	if err != nil || o.Source != gate.FromInitData || len(o.Warnings) != 1 {
		t.Errorf("got %v, %v", o, err)
	}
	if got, err := openTEE("/absent", slog.New(slog.DiscardHandler)); got != nil || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a double without a report: %v, %v", got, err)
	}
	if got, err := openTEE("", slog.New(slog.DiscardHandler)); got != nil || err != nil {
		t.Errorf("no TEE and no double: %v, %v", got, err)
	}
}
