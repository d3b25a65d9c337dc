// Package initdata finds and reads the init-data document: what a pod's author gives to the guest through the host, which binds the
// document's digest to the launch of the TEE.
//
// Specification: Confidential Containers' trustee, kbs/docs/initdata.md. Where that leaves a choice, or says otherwise, this package
// does what Kata does on both sides (virtcontainers/qemu.go, pkg/oci/utils.go, pkg/govmm/qemu/qemu.go; src/agent/src/initdata.rs;
// src/libs/kata-types/src/initdata.rs): the document is TOML, and its digest is of its text as it is, not of a canonical form.
//
// All of it is the host's word until Bound has said otherwise.
package initdata

import (
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/sealvol/sealvol/guest/api/quote"
	"github.com/sealvol/sealvol/policy"
)

const (
	// MaxDocument bounds a document's text, in bytes: a policy as long as one may be, and 256 KiB for what others have in it. Text that
	// is nothing but dots, each a table in a table, takes some 200 times as much memory for a second.
	MaxDocument = policy.MaxText + 256<<10

	version   = "0.1.0"
	policyKey = "policy.rego"
)

// Document is an init-data document.
type Document struct {
	// Algorithm is "sha256", "sha384" or "sha512", Digest the digest of the text by it, whole.
	Algorithm string
	Digest    []byte
	// Policy is the text of policy.rego; "" when there is none. What else the document has is for others.
	Policy string
}

// Parse reads a document. Anything but version, algorithm and data, once each, and strings in data, is errdefs.ErrInvalidArgument.
func Parse(text []byte) (*Document, error) {
	if len(text) > MaxDocument {
		return nil, malformed("its text is longer than %d bytes", MaxDocument)
	}
	// Not into a struct: its keys are found in any case then, and the list of those that it has not takes quadratic time.
	var top map[string]any
	if err := toml.Unmarshal(text, &top); err != nil {
		return nil, malformed("%v", err)
	}
	for _, key := range slices.Sorted(maps.Keys(top)) {
		if key != "version" && key != "algorithm" && key != "data" {
			return nil, malformed("unknown key %.64q", key)
		}
	}
	if top["version"] != version {
		return nil, malformed("version must be %q", version)
	}
	algorithm, _ := top["algorithm"].(string)
	sum, err := digest(algorithm, text)
	if err != nil {
		return nil, err
	}
	data, ok := top["data"].(map[string]any)
	if !ok {
		return nil, malformed("no table data")
	}
	for _, key := range slices.Sorted(maps.Keys(data)) {
		if _, ok := data[key].(string); !ok {
			return nil, malformed("data %.64q is no string", key)
		}
	}
	author, there := data[policyKey].(string)
	if there && author == "" {
		return nil, malformed("%s is empty", policyKey)
	}
	return &Document{Algorithm: algorithm, Digest: sum, Policy: author}, nil
}

func digest(algorithm string, text []byte) ([]byte, error) {
	switch algorithm {
	case "sha256":
		sum := sha256.Sum256(text)
		return sum[:], nil
	case "sha384":
		sum := sha512.Sum384(text)
		return sum[:], nil
	case "sha512":
		sum := sha512.Sum512(text)
		return sum[:], nil
	}
	return nil, malformed("algorithm must be sha256, sha384 or sha512")
}

// Bound is errdefs.ErrPermissionDenied unless the TEE reports this document: launchData, HOSTDATA of SEV-SNP or MRCONFIGID of TDX, is
// the digest in the form of quote.LaunchData.
func (d *Document) Bound(launchData []byte) error {
	if len(launchData) < sha256.Size { // a shorter one would be too easy to hit
		return fmt.Errorf("init-data: the TEE's field has %d bytes, too few for a digest: %w", len(launchData), errdefs.ErrInternal)
	}
	want := quote.LaunchData(d.Digest, len(launchData))
	if subtle.ConstantTimeCompare(want, launchData) != 1 {
		return fmt.Errorf("init-data: its digest %x is not what the TEE reports, %x: launch the guest with the digest of the document that it gets: %w",
			want, launchData, errdefs.ErrPermissionDenied)
	}
	return nil
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("init-data: %s: %w", policy.OneLine(fmt.Sprintf(format, args...)), errdefs.ErrInvalidArgument)
}
