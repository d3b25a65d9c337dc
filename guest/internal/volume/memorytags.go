package volume

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/tagstore"
)

// memoryTags is the layering of which the disk has nothing but ciphertext.
type memoryTags struct{}

func (memoryTags) length(disk uint64) uint64 { return disk }

func (memoryTags) create(ctx context.Context, m *Manager, v *volume) error {
	// Checked here and never later: a store that is full fails writes that the application was promised.
	if need, most := tagstore.MaxBytes(v.bytes), v.spec.MaxTagMemory; most != 0 && need > most {
		return fmt.Errorf("its integrity tags can take %d bytes of guest memory (1/128 of %d), and max_tag_memory is %d: raise it or lower size.max: %w",
			need, v.bytes, most, errdefs.ErrFailedPrecondition)
	}
	store, err := m.kernel.tags(ctx, v.bytes)
	if err != nil {
		return err
	}
	v.tags = store
	v.kept.push(func(context.Context) error { return store.Close() })
	if v.spec.PreallocateTags {
		if err := store.Preallocate(v.bytes); err != nil {
			return err
		}
	}
	if err := m.addIntegrity(ctx, v); err != nil {
		return err
	}
	return m.addFirstCrypt(ctx, v)
}

func (memoryTags) open(ctx context.Context, m *Manager, v *volume) error {
	if err := m.addIntegrity(ctx, v); err != nil {
		return err
	}
	return m.addCrypt(ctx, v, v.suite, v.key)
}

// addIntegrity makes the mapping that keeps the tags.
func (m *Manager) addIntegrity(ctx context.Context, v *volume) (err error) {
	v.integrity, err = m.add(ctx, v, "_dif", devmapper.Integrity{
		Data:       v.linear.Number,
		Meta:       v.tags.Number(),
		TagBytes:   tagstore.TagBytes,
		BlockBytes: tagstore.BlockBytes,
		// The journal is not used but has a place.
		JournalSectors: 64,
		// Tags are read and written by pages, so that scattered writes take as little memory as the store can give.
		BufferSectors: tagstore.BlockBytes / devmapper.SectorBytes,
	})
	return err
}

// addFirstCrypt takes the first suite that the kernel has, and makes the volume's key.
func (m *Manager) addFirstCrypt(ctx context.Context, v *volume) error {
	for _, s := range v.plan.suites {
		key, err := keyring.New(s.keyBytes)
		if err != nil {
			return err
		}
		err = m.addCrypt(ctx, v, s, key)
		if err == nil {
			v.suite, v.key = s, key
			v.driver = m.driver(v, s.cipher)
			v.kept.push(func(context.Context) error { return key.Destroy() })
			return nil
		}
		if destroyErr := key.Destroy(); destroyErr != nil {
			return oneLine(err, destroyErr)
		}
		// The kernel looked for the algorithm, in modules too, and has none. No other question gets as good an answer: /proc/crypto
		// lists what was used before. Any other error is a fault, and no reason to take a lesser suite.
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return fmt.Errorf("the guest's kernel has none of the suites %q: %w", v.spec.Suites, errdefs.ErrFailedPrecondition)
}

func (m *Manager) addCrypt(ctx context.Context, v *volume, s suite, key *keyring.Key) error {
	description := "sealvol:" + v.label
	return m.kernel.lend(key, description, func() (err error) {
		v.crypt, err = m.add(ctx, v, "", devmapper.Crypt{
			Cipher:      s.cipher,
			KeyBytes:    s.keyBytes,
			Description: description,
			Device:      v.integrity.Number,
			TagBytes:    tagstore.TagBytes,
			BlockBytes:  tagstore.BlockBytes,
		})
		return err
	})
}

// driver is what the control service shows of how the kernel computes; a volume works without.
func (m *Manager) driver(v *volume, cipher string) string {
	driver, err := m.kernel.driver(cipher)
	if err != nil {
		v.log.Warn("the kernel does not say which driver a cipher has", "cipher", cipher, "error", err)
	}
	return driver
}
