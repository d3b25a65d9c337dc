package luks2

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
)

// Mappings are those of an open volume. Removing both, Crypt first, closes it: nothing else belongs to them.
type Mappings struct {
	Crypt     devmapper.Device // NAME: the plaintext
	Integrity devmapper.Device // NAME_dif: the ciphertext with its tags, as dm-crypt sees it
}

// Open opens the volume that the header belongs to, under a name, and leaves nothing behind when it fails. The header is read and
// checked again, from the memory that cryptsetup then reads, and what cryptsetup made of it and of the superblock on the disk is read back
// from the kernel. A key that does not fit is errdefs.ErrUnauthenticated, a name that is in use errdefs.ErrAlreadyExists.
//
// While a volume is open the kernel has the key; it is not in any keyring.
func (t *Tool) Open(ctx context.Context, name string, data devmapper.Device, header *Header, key *keyring.Key) (Mappings, error) {
	if err := header.check(); err != nil {
		return Mappings{}, err
	}
	for _, name := range []string{name, name + integritySuffix} {
		if _, err := t.mapper.Find(name); !errdefs.IsNotFound(err) {
			if err == nil {
				err = fmt.Errorf("mapping %s: %w", name, errdefs.ErrAlreadyExists)
			}
			return Mappings{}, err
		}
	}
	mappings, err := t.open(ctx, name, data, header, key)
	if err != nil {
		undo, cancel := undoing(ctx)
		defer cancel()
		for _, name := range []string{name, name + integritySuffix} {
			err = and(err, t.mapper.Remove(undo, name))
		}
		return Mappings{}, err
	}
	return mappings, nil
}

func (t *Tool) open(ctx context.Context, name string, data devmapper.Device, header *Header, key *keyring.Key) (Mappings, error) {
	err := t.run(ctx, header.file, key, "open",
		// It is read here only, not by luksFormat: with a journal every byte is written twice.
		"--integrity-no-journal",
		// No library is loaded for what a header names.
		"--disable-external-tokens",
		data.Node(), name)
	// What opened before and now does not, for no other reason that cryptsetup knows, has lost the superblock of dm-integrity.
	if exit := (*exec.ExitError)(nil); header.bytes != 0 && ctx.Err() == nil && errors.As(err, &exit) && exit.ExitCode() == 1 {
		return Mappings{}, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if err != nil {
		return Mappings{}, err
	}
	var m Mappings
	if m.Crypt, err = t.mapper.Find(name); err != nil {
		return Mappings{}, err
	}
	if m.Integrity, err = t.mapper.Find(name + integritySuffix); err != nil {
		return Mappings{}, err
	}
	if err := t.prove(m, data, header.metadata); err != nil {
		return Mappings{}, err
	}
	if header.bytes != 0 && header.bytes != m.Crypt.Bytes {
		return Mappings{}, fmt.Errorf("volume had %d bytes, has %d: %w", header.bytes, m.Crypt.Bytes, errdefs.ErrDataLoss)
	}
	header.bytes = m.Crypt.Bytes
	return m, nil
}

// prove makes sure that the live tables are what was demanded. The lower one depends on dm-integrity's superblock, which is on the disk.
func (t *Tool) prove(m Mappings, data devmapper.Device, metadata Metadata) error {
	lower, err := t.mapper.Table(m.Integrity.Name)
	if err != nil {
		return err
	}
	start := fmt.Sprintf("0 %d integrity %v 0 %d D ", m.Integrity.Bytes/devmapper.SectorBytes, data.Number, TagBytes)
	options, ok := strings.CutPrefix(lower, start)
	if !ok || !isPlain(options) || m.Integrity.Bytes == 0 || m.Integrity.Bytes > data.Bytes || m.Integrity.Bytes%BlockBytes != 0 {
		return fmt.Errorf("mapping %s is not as demanded: %q: %w", m.Integrity.Name, lower, errdefs.ErrFailedPrecondition)
	}
	upper, err := t.mapper.Table(m.Crypt.Name)
	if err != nil {
		return err
	}
	// The key is named, not shown.
	want := fmt.Sprintf("0 %d crypt %s :%d:logon:cryptsetup:%s-d0 0 %v 0 2 integrity:%d:aead sector_size:%d",
		m.Integrity.Bytes/devmapper.SectorBytes, liveCipher, volumeKeyBytes, metadata.UUID(), m.Integrity.Number, TagBytes, BlockBytes)
	if upper != want {
		return fmt.Errorf("mapping %s is not as demanded: %q: %w", m.Crypt.Name, upper, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// isPlain tells whether the options of an integrity table change nothing but the layout and the buffers: no recalculation, no bitmap,
// no discards, no other device.
func isPlain(options string) bool {
	fields := strings.Fields(options)
	if len(fields) == 0 || fields[0] != strconv.Itoa(len(fields)-1) {
		return false
	}
	blocks := false
	for _, option := range fields[1:] {
		name, value, _ := strings.Cut(option, ":")
		_, err := strconv.ParseUint(value, 10, 32)
		switch {
		case option == fmt.Sprintf("block_size:%d", BlockBytes):
			blocks = true
		case option == "fix_padding":
		case (name == "journal_sectors" || name == "interleave_sectors" || name == "buffer_sectors") && err == nil:
		default:
			return false
		}
	}
	return blocks
}
