package volume

import (
	"context"

	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/luks2"
)

// diskTags is the layering luks2: cryptsetup's format, with the tags beside the data on the disk and the header in guest memory. From the
// container's side down:
//
//	dm-crypt         encrypted_disk_XXXXX
//	dm-integrity     encrypted_disk_XXXXX_dif: keeps the tags on the disk, so that an old block with its old tag fits
//	dm-linear        encrypted_disk_XXXXX_cut
type diskTags struct{}

// length: the tags take some of the disk, and how much only the kernel knows.
func (diskTags) length(uint64) uint64 { return 0 }

func (l diskTags) create(ctx context.Context, m *Manager, v *volume) error {
	key, err := keyring.New(luks2.KeyBytes)
	if err != nil {
		return err
	}
	v.key = key
	v.kept.push(func(context.Context) error { return key.Destroy() })
	header, err := m.kernel.luks2(ctx, v.linear, key)
	if err != nil {
		return err
	}
	v.header = header
	v.kept.push(func(context.Context) error { return header.Close() })
	// The policy's language has one suite for this layering.
	v.suite = v.plan.suites[0]
	if err := l.open(ctx, m, v); err != nil {
		return err
	}
	v.driver = m.driver(v, v.suite.cipher)
	return nil
}

func (diskTags) open(ctx context.Context, m *Manager, v *volume) error {
	mappings, err := v.header.Open(ctx, v.mapping(""), v.linear, v.key)
	if err != nil {
		return err
	}
	v.integrity, v.crypt = mappings.Integrity, mappings.Crypt
	for _, name := range []string{v.integrity.Name, v.crypt.Name} {
		v.layers.push(func(ctx context.Context) error { return m.kernel.mapper.Remove(ctx, name) })
	}
	return nil
}
