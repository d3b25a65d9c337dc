// Package receipt is the receipt of a sandbox: what its guest has sealed and how, in one form of bytes that a quote of the TEE can
// carry.
//
// The guest issues receipts with it and a relying party checks them with it, wherever that runs. It imports nothing of the guest.
package receipt

import (
	"bytes"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// Version is the version of the format that this package knows.
const Version = 1

const (
	// MaxBytes bounds an encoded receipt.
	MaxBytes = 1 << 20
	// MinNonce and MaxNonce bound a caller's nonce, in bytes.
	MinNonce = 16
	MaxNonce = 64
)

// The values of Receipt.TEE beside the names that the kernel has for a TEE's provider.
const (
	NoTEE    = "none"
	Insecure = "insecure" // a test double, which proves nothing
)

// Receipt says what is sealed in a sandbox, and how. Nothing in it is secret.
//
// All times are by the guest's clock, which is the host's to set: they show an order, not a date.
type Receipt struct {
	Version int `json:"version"`
	// Service is the guest service's build version.
	Service string `json:"service"`
	// TEE is what makes the quote: a provider of the kernel's configfs-tsm ("sev_guest", "tdx_guest"), NoTEE or Insecure.
	TEE string `json:"tee"`
	// Nonce is the caller's, in lower-case hex; empty when it gave none, and then no quote carries the receipt.
	Nonce      string      `json:"nonce"`
	Issued     time.Time   `json:"issued"`
	Policy     Policy      `json:"policy"`
	Containers []Container `json:"containers"` // that the policy names, by name
	Volumes    []Volume    `json:"volumes"`    // that were sealed, by name
	// Warnings are what weakens this sandbox, a line each.
	Warnings []string `json:"warnings"`
}

// Policy is the policy in force.
type Policy struct {
	// Source is "init-data", "image" or "set-policy". With the last the policy is the host's word.
	Source string `json:"source"`
	// Digest is the SHA-256 of the policy's text, in lower-case hex.
	Digest string `json:"digest"`
	// InForce is false in a guest that accepts nothing, and as long as the host may still bring another policy; a warning says which.
	InForce bool `json:"in_force"`
	// InitData is the document that the guest found and whose digest is the TEE's HOSTDATA or MRCONFIGID; nil when there is none.
	InitData *InitData `json:"init_data,omitempty"`
}

// InitData is an init-data document.
type InitData struct {
	Algorithm string `json:"algorithm"` // "sha256", "sha384" or "sha512"
	Digest    string `json:"digest"`    // of the document by that algorithm, whole, in lower-case hex
}

// Container is a container that the policy allows.
type Container struct {
	Name string `json:"name"`
	// RootFS says who serves the root file system. With "host" sealing protects the disk only: the host chooses the programs.
	RootFS string `json:"rootfs"`
	// ArgsPinned is true when the policy has the arguments, exactly.
	ArgsPinned bool `json:"args_pinned"`
	// State is "being created", "created" or "started"; empty when no container of this name lives. A started one had its mounts
	// checked before it started.
	State string `json:"state"`
	// ID is the live container's id, which is the host's word.
	ID string `json:"id"`
}

// Volume is a sealed volume.
type Volume struct {
	Name string `json:"name"`
	// State is "new", "sealing", "open", "degraded" (open, and some of its I/O failed), "closing", "closed" or "failed".
	State    string `json:"state"`
	Layering string `json:"layering"` // "memory-tags" or "luks2"
	Suite    string `json:"suite"`
	// Driver is the kernel's implementation of the cipher, as in /proc/crypto.
	Driver    string `json:"driver"`
	FSType    string `json:"fs_type"`
	SizeBytes uint64 `json:"size_bytes"` // of the block device under the file system
	// PCIPath is where the host has plugged the disk, as Kata writes it ("02/01"), and where it uses other drivers than virtio-blk a SCSI
	// address ("0:1") or a disk on virtio-mmio ("/dev/vda"); empty when it is unplugged. Its name is older than they are.
	PCIPath string `json:"pci_path"`
	// Created is when the volume was first sealed, Opened when it last became available. A volume that never did has none.
	Created time.Time `json:"created,omitzero"`
	Opened  time.Time `json:"opened,omitzero"`
	// FailedIO counts reads, writes and flushes that failed since the volume was made.
	FailedIO uint64 `json:"failed_io"`
	// Error is why the volume failed.
	Error string `json:"error"`
	// Mounts are where containers have the volume while it is open, as the policy declares them.
	Mounts []Mount `json:"mounts"`
}

// Mount is a volume's place in a container.
type Mount struct {
	Container string   `json:"container"`
	Path      string   `json:"path"`
	ReadOnly  bool     `json:"read_only"`
	Options   []string `json:"options"`
}

// Encode returns the one form of a receipt: JSON as RFC 8785 has it. A number beyond 2^53, which that form cannot hold, is
// errdefs.ErrFailedPrecondition, as is a receipt that is longer than MaxBytes.
func (r Receipt) Encode() ([]byte, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("receipt: %v: %w", err, errdefs.ErrFailedPrecondition)
	}
	encoded, err := canonical(text)
	if err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	if len(encoded) > MaxBytes {
		return nil, fmt.Errorf("receipt: %d bytes are more than %d: %w", len(encoded), MaxBytes, errdefs.ErrFailedPrecondition)
	}
	return encoded, nil
}

// ReportData is what a quote carries for an encoded receipt: the SHA-512 of its bytes. The nonce is in the receipt, so that no one has
// to join anything.
func ReportData(encoded []byte) [sha512.Size]byte { return sha512.Sum512(encoded) }

// Parse reads an encoded receipt. One that is not in the form of Encode, which leaves no place for unknown or repeated keys, another
// order or spaces, is errdefs.ErrInvalidArgument.
func Parse(encoded []byte) (Receipt, error) {
	if len(encoded) > MaxBytes {
		return Receipt{}, fmt.Errorf("receipt: %d bytes are more than %d: %w", len(encoded), MaxBytes, errdefs.ErrInvalidArgument)
	}
	var r Receipt
	if err := json.Unmarshal(encoded, &r); err != nil {
		return Receipt{}, fmt.Errorf("receipt: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if r.Version != Version {
		return Receipt{}, fmt.Errorf("receipt: version %d, only %d is known: %w", r.Version, Version, errdefs.ErrInvalidArgument)
	}
	if again, err := r.Encode(); err != nil || !bytes.Equal(again, encoded) {
		return Receipt{}, fmt.Errorf("receipt: not in its canonical form: %w", errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// Verify checks that a quote's report data stands for an encoded receipt and that the receipt answers the nonce, and returns it.
//
// The caller must have verified the quote itself: its signature and certificates, that the TEE is not open to debugging, the
// measurement, and HOSTDATA or MRCONFIGID where the policy comes from init-data. What the receipt says is for the caller to judge:
// the policy's source and digest, and the volumes. Report data and nonce that do not fit are
// errdefs.ErrUnauthenticated, bytes that are no receipt errdefs.ErrInvalidArgument.
func Verify(reportData, encoded, nonce []byte) (Receipt, error) {
	want := ReportData(encoded)
	if subtle.ConstantTimeCompare(reportData, want[:]) != 1 {
		return Receipt{}, fmt.Errorf("receipt: the quote's report data is not this receipt's: %w", errdefs.ErrUnauthenticated)
	}
	r, err := Parse(encoded)
	if err != nil {
		return Receipt{}, err
	}
	if err := CheckNonce(nonce); err != nil {
		return Receipt{}, err
	}
	if r.Nonce != hex.EncodeToString(nonce) {
		return Receipt{}, fmt.Errorf("receipt: it answers another nonce: %w", errdefs.ErrUnauthenticated)
	}
	return r, nil
}

// CheckNonce is errdefs.ErrInvalidArgument for a nonce that is too short or too long.
func CheckNonce(nonce []byte) error {
	if len(nonce) < MinNonce || len(nonce) > MaxNonce {
		return fmt.Errorf("receipt: a nonce has %d to %d bytes, not %d: %w", MinNonce, MaxNonce, len(nonce), errdefs.ErrInvalidArgument)
	}
	return nil
}
