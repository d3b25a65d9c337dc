package luks2

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
)

// Format makes a new header, and dm-integrity's superblock on the device. The key must have KeyBytes. What is on the device is neither
// looked at nor overwritten but for its first 4 KiB; it cannot be read through the new header.
//
// The key of the data is drawn by cryptsetup, from a generator that is seeded: the volume's own key was drawn from it before.
func (t *Tool) Format(ctx context.Context, data devmapper.Device, key *keyring.Key) (*Header, error) {
	if key.Size() != KeyBytes {
		return nil, fmt.Errorf("key of %d bytes, not %d: %w", key.Size(), KeyBytes, errdefs.ErrInvalidArgument)
	}
	file, err := t.memory("LUKS2 header", headerBytes)
	if err != nil {
		return nil, fmt.Errorf("memory for a LUKS2 header: %w", err)
	}
	header, err := t.format(ctx, data, file, key)
	if err != nil {
		undo, cancel := undoing(ctx)
		defer cancel()
		err = and(err, t.removeTemporary(undo, data.Number))
		return nil, and(err, (&Header{file: file}).Close())
	}
	return header, nil
}

func (t *Tool) format(ctx context.Context, data devmapper.Device, file *os.File, key *keyring.Key) (*Header, error) {
	err := t.run(ctx, file, key, "luksFormat",
		// XTS takes two keys of 256 bits; 96 bytes with the HMAC's. The IV is the block's number, so all of the tag is HMAC.
		"--cipher="+cipher, fmt.Sprintf("--key-size=%d", 8*xtsKeyBytes),
		"--integrity=hmac-sha256",
		// Writing every block once would make each readable, and take the time that it takes to write the disk.
		"--integrity-no-wipe",
		// One tag for 4 KiB, and no write of less, which would read first.
		fmt.Sprintf("--sector-size=%d", BlockBytes),
		// For the keyslot, the digest and the anti-forensic stripes. The key is random: a slow derivation would slow down us alone.
		"--hash="+hash, "--pbkdf=pbkdf2", fmt.Sprintf("--pbkdf-force-iterations=%d", iterations),
		// Room for one keyslot instead of 16 MiB of memory.
		fmt.Sprintf("--luks2-metadata-size=%d", copyBytes), fmt.Sprintf("--luks2-keyslots-size=%d", keyslotBytes),
		data.Node())
	if err != nil {
		return nil, err
	}
	return newHeader(file)
}

// temporary is the prefix of the mappings that cryptsetup makes for a moment, with random names: dm-integrity writes its superblock when
// it is started.
const temporary = "temporary-cryptsetup-"

// removeTemporary removes what a cryptsetup that was killed has left over a device. Nobody else uses the device, so what holds it is that.
func (t *Tool) removeTemporary(ctx context.Context, n blockdev.Number) error {
	holders, err := filepath.Glob(filepath.Join(t.sysfs, "dev/block", n.String(), "holders/*"))
	if err != nil {
		return err
	}
	for _, holder := range holders {
		name, err := readLine(filepath.Join(holder, "dm/name"))
		if err != nil {
			return fmt.Errorf("mapping over device %v: %w", n, err)
		}
		if !strings.HasPrefix(name, temporary) {
			return fmt.Errorf("mapping %s is over device %v: %w", strconv.Quote(name), n, errdefs.ErrFailedPrecondition)
		}
		above, err := readLine(filepath.Join(holder, "dev"))
		if err != nil {
			return fmt.Errorf("mapping over device %v: %w", n, err)
		}
		number, err := blockdev.ParseNumber(above)
		if err != nil {
			return err
		}
		// Some versions put one mapping over another.
		if err := t.removeTemporary(ctx, number); err != nil {
			return err
		}
		if err := t.mapper.Remove(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func readLine(file string) (string, error) {
	content, err := os.ReadFile(file)
	return strings.TrimSuffix(string(content), "\n"), err
}
