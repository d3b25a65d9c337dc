package luks2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
)

func TestFormatAndOpen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	header := w.mustFormat()
	if header.Metadata().UUID() != uuid {
		t.Errorf("UUID %s", header.Metadata().UUID())
	}
	for _, flag := range []string{"--cipher=aes-xts-plain64", "--key-size=512", "--integrity=hmac-sha256", "--integrity-no-wipe", "--sector-size=4096",
		"--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--luks2-metadata-size=16384", "--luks2-keyslots-size=385024", "/dev/dm-7"} {
		if !w.has(flag) {
			t.Errorf("no %s in %q", flag, w.flags)
		}
	}
	for range 2 {
		m := w.mustOpen(header)
		if m.Crypt.Link() != "/dev/mapper/v" || m.Integrity.Link() != "/dev/mapper/v_dif" || m.Crypt.Bytes != w.lower {
			t.Errorf("mappings %+v", m)
		}
		if !w.has("--integrity-no-journal") || !w.has("/dev/dm-7") {
			t.Errorf("flags %q", w.flags)
		}
		if len(w.removed) != 0 {
			t.Errorf("removed %q", w.removed)
		}
		clear(w.mappings)
	}
	if err := header.Close(); err != nil {
		t.Error(err)
	}
	w.overwritten()
}

func TestFormatUndoes(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(w *world)
		want   error
	}{
		"no memory":                      {func(w *world) { w.fail = "memory" }, errInjected},
		"cryptsetup fails":               {func(w *world) { w.fail = "luksFormat" }, errInjected},
		"cryptsetup writes nothing":      {func(w *world) { w.header = nil }, ErrMagic},
		"cryptsetup makes the file grow": {func(w *world) { w.header = make([]byte, headerBytes+1) }, ErrOversize},
		"cryptsetup writes something else": {func(w *world) {
			text := strings.Replace(jsonText(t, w.header), `"aes-xts-plain64","sector`, `"cipher_null-ecb","sector`, 1)
			w.header = withJSON(t, w.header, text)
		}, ErrCipher},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			c.change(w)
			// As from a cryptsetup that was killed: one mapping over another.
			w.hold(data.Number, "temporary-cryptsetup-reduced-1", blockdev.Number{Major: 253, Minor: 8})
			w.hold(blockdev.Number{Major: 253, Minor: 8}, "temporary-cryptsetup-1", blockdev.Number{Major: 253, Minor: 9})
			header, err := w.Format(t.Context(), data, newKey(t, KeyBytes))
			if !errors.Is(err, c.want) || header != nil {
				t.Fatalf("%v, want %v", err, c.want)
			}
			w.overwritten()
			want := []string{"temporary-cryptsetup-1", "temporary-cryptsetup-reduced-1"}
			if w.fail == "memory" {
				want = nil
			}
			if !slices.Equal(w.removed, want) {
				t.Errorf("removed %q, want %q", w.removed, want)
			}
		})
	}
	t.Run("the context has ended", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.fail = "luksFormat"
		w.hold(data.Number, "temporary-cryptsetup-1", blockdev.Number{Major: 253, Minor: 8})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := w.Format(ctx, data, newKey(t, KeyBytes)); !errors.Is(err, errInjected) || len(w.removed) != 1 {
			t.Errorf("%v, removed %q", err, w.removed)
		}
	})
	t.Run("what somebody else made stays", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.fail = "luksFormat"
		w.hold(data.Number, "other", blockdev.Number{Major: 253, Minor: 8})
		if _, err := w.Format(t.Context(), data, newKey(t, KeyBytes)); !errors.Is(err, errInjected) || !strings.Contains(err.Error(), `"other"`) || len(w.removed) != 0 {
			t.Errorf("%v, removed %q", err, w.removed)
		}
		w.overwritten()
	})
	t.Run("what cannot be removed is named", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.fail, w.dead = "luksFormat", true
		w.hold(data.Number, "temporary-cryptsetup-1", blockdev.Number{Major: 253, Minor: 8})
		if _, err := w.Format(t.Context(), data, newKey(t, KeyBytes)); !errors.Is(err, errInjected) || !errdefs.IsUnavailable(err) {
			t.Error(err)
		}
		w.overwritten()
	})
	t.Run("a key of another size", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		if _, err := w.Format(t.Context(), data, newKey(t, 16)); !errdefs.IsInvalidArgument(err) || w.flags != nil {
			t.Errorf("%v, cryptsetup ran with %q", err, w.flags)
		}
	})
}

func TestOpenUndoes(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"open", "find v", "find v_dif", "table v", "table v_dif"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			header := w.mustFormat()
			w.fail = step
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // the undo does not depend on it
			m, err := w.Open(ctx, "v", data, header, newKey(t, KeyBytes))
			if !errors.Is(err, errInjected) || m != (Mappings{}) || w.left() != "" || !slices.Equal(w.removed, []string{"v", "v_dif"}) {
				t.Errorf("%v, left %s, removed %q", err, w.left(), w.removed)
			}
			// Nothing of it is in the way.
			w.fail = ""
			w.mustOpen(header)
		})
	}
	t.Run("what cannot be removed is named", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		header := w.mustFormat()
		w.fail, w.dead = "table v", true
		if _, err := w.Open(t.Context(), "v", data, header, newKey(t, KeyBytes)); !errors.Is(err, errInjected) || !errdefs.IsUnavailable(err) {
			t.Error(err)
		}
	})
}

func TestOpenLeavesMappingsOfOthers(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"v", "v_dif"} {
		w := newWorld(t)
		header := w.mustFormat()
		w.flags = nil
		w.add(name, 3, "")
		if _, err := w.Open(t.Context(), "v", data, header, newKey(t, KeyBytes)); !errdefs.IsAlreadyExists(err) || w.left() != name || w.flags != nil {
			t.Errorf("%v, left %s, cryptsetup ran with %q", err, w.left(), w.flags)
		}
	}
}

func TestOpenChecksTheHeaderBeforeItIsOpened(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(t *testing.T, file *os.File)
		want   error
	}{
		"flipped bit": {func(t *testing.T, f *os.File) { put(t, f, []byte("S"), binaryBytes) }, ErrChecksum},
		"null cipher": {func(t *testing.T, f *os.File) {
			raw := realHeader(t)
			put(t, f, withJSON(t, raw, strings.ReplaceAll(jsonText(t, raw), "aes-xts-plain64", "cipher_null-ecb")), 0)
		}, ErrAreaCipher},
		"another header": {func(t *testing.T, f *os.File) {
			put(t, f, both(realHeader(t), func(h []byte) { h[atUUID] = 'a' }), 0)
		}, ErrForeign},
		"a newer header": {func(t *testing.T, f *os.File) {
			put(t, f, both(realHeader(t), func(h []byte) { h[atSequence+7]++ }), 0)
		}, ErrForeign},
		"larger file":  {func(t *testing.T, f *os.File) { put(t, f, []byte{0}, headerBytes) }, ErrOversize},
		"smaller file": {func(t *testing.T, f *os.File) { f.Truncate(metadataBytes) }, ErrTruncated},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			header := w.mustFormat()
			c.change(t, header.file)
			w.flags = nil
			if _, err := w.Open(t.Context(), "v", data, header, newKey(t, KeyBytes)); !errors.Is(err, c.want) || w.flags != nil {
				t.Errorf("%v, cryptsetup ran with %q", err, w.flags)
			}
		})
	}
}

func put(t *testing.T, f *os.File, b []byte, offset int64) {
	t.Helper()
	if _, err := f.WriteAt(b, offset); err != nil {
		t.Fatal(err)
	}
}

func TestOpenProvesTheLiveTables(t *testing.T) {
	t.Parallel()
	const (
		sectors = (1 << 29) / devmapper.SectorBytes
		lower   = "253:7 0 32 D 5 block_size:4096 journal_sectors:16368 interleave_sectors:32768 buffer_sectors:128 fix_padding"
		upper   = "capi:authenc(hmac(sha256),xts(aes))-plain64 :96:logon:cryptsetup:" + uuid + "-d0 0 253:8 0 2 integrity:32:aead sector_size:4096"
	)
	for name, c := range map[string]struct{ mapping, old, new string }{
		"journal":                  {"v_dif", " D 5", " J 5"},
		"bitmap":                   {"v_dif", " D 5", " B 5"},
		"inline":                   {"v_dif", " D 5", " I 5"},
		"recovery":                 {"v_dif", " D 5", " R 5"},
		"another disk":             {"v_dif", "253:7", "253:6"},
		"later start":              {"v_dif", "253:7 0", "253:7 8"},
		"shorter tags":             {"v_dif", "0 32 D", "0 16 D"},
		"smaller blocks":           {"v_dif", "block_size:4096", "block_size:512"},
		"no block size":            {"v_dif", "5 block_size:4096", "4"},
		"recalculation":            {"v_dif", "fix_padding", "recalculate"},
		"discards":                 {"v_dif", "fix_padding", "allow_discards"},
		"tags on another disk":     {"v_dif", "fix_padding", "meta_device:8:0"},
		"internal hash":            {"v_dif", "fix_padding", "internal_hash:crc32c"},
		"padding with a value":     {"v_dif", "fix_padding", "fix_padding:1"},
		"size that is no number":   {"v_dif", "journal_sectors:16368", "journal_sectors:-1"},
		"fewer options than said":  {"v_dif", "D 5", "D 6"},
		"no options":               {"v_dif", "D 5 block_size:4096 journal_sectors:16368 interleave_sectors:32768 buffer_sectors:128 fix_padding", "D 0"},
		"another target":           {"v_dif", "integrity", "linear"},
		"another length":           {"v_dif", fmt.Sprint(sectors), fmt.Sprint(sectors + 8)},
		"two lines":                {"v_dif", "fix_padding", "fix_padding\n0"},
		"null cipher":              {"v", "xts(aes)", "ecb(cipher_null)"},
		"cipher without integrity": {"v", "capi:authenc(hmac(sha256),xts(aes))-plain64", "aes-xts-plain64"},
		"IVs that repeat":          {"v", "-plain64", "-null"},
		"key in the table":         {"v", ":96:logon:cryptsetup:" + uuid + "-d0", strings.Repeat("00", 96)},
		"short key":                {"v", ":96:", ":64:"},
		"key of another header":    {"v", uuid, "c" + uuid[1:]},
		"key that a user can read": {"v", ":logon:", ":user:"},
		"past the tags":            {"v", "253:8", "253:7"},
		"shifted":                  {"v", "253:8 0", "253:8 8"},
		"shifted IVs":              {"v", "-d0 0", "-d0 8"},
		"no integrity":             {"v", "2 integrity:32:aead", "1"},
		"small sectors":            {"v", "sector_size:4096", "sector_size:512"},
		"discards above":           {"v", "2 integrity", "3 allow_discards integrity"},
		"longer than its tags":     {"v", fmt.Sprint(sectors), fmt.Sprint(sectors + 8)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			header := w.mustFormat()
			table := fmt.Sprintf("0 %d integrity %s", sectors, lower)
			if c.mapping == "v" {
				table = fmt.Sprintf("0 %d crypt %s", sectors, upper)
			}
			changed := strings.Replace(table, c.old, c.new, 1)
			if changed == table {
				t.Fatalf("%s is not in %s", c.old, table)
			}
			w.tables[c.mapping] = changed
			_, err := w.Open(t.Context(), "v", data, header, newKey(t, KeyBytes))
			if !errdefs.IsFailedPrecondition(err) || w.left() != "" || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, left %s", err, w.left())
			}
			w.tables[c.mapping] = table
			w.mustOpen(header)
		})
	}
}

// The host wiped dm-integrity's superblock while the volume was closed: cryptsetup fails and says no more.
func TestOpenOfWhatWasOpenBeforeIsDataLossWhenNothingElseIsWrong(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	header := w.mustFormat()
	key := newKey(t, KeyBytes)
	runs := w.run
	fails := func(context.Context, *os.File, *keyring.Key, string, ...string) error {
		return fmt.Errorf("cryptsetup open: %w", exec.Command("false").Run())
	}
	w.run = fails
	if _, err := w.Open(t.Context(), "v", data, header, key); err == nil || errdefs.IsDataLoss(err) {
		t.Errorf("the first time there is no data to lose: %v", err)
	}
	w.run = runs
	w.mustOpen(header)
	clear(w.mappings)
	w.run = fails
	if _, err := w.Open(t.Context(), "v", data, header, key); !errdefs.IsDataLoss(err) {
		t.Errorf("again: %v", err)
	}
}

func TestOpenProvesTheLength(t *testing.T) {
	t.Parallel()
	for name, length := range map[string]uint64{"none": 0, "half a block": 512, "more than the disk": data.Bytes + BlockBytes} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			header := w.mustFormat()
			w.lower = length
			if _, err := w.Open(t.Context(), "v", data, header, newKey(t, KeyBytes)); !errdefs.IsFailedPrecondition(err) || w.left() != "" {
				t.Errorf("%v, left %s", err, w.left())
			}
		})
	}
	t.Run("another than before", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		header := w.mustFormat()
		w.mustOpen(header)
		clear(w.mappings)
		w.lower -= BlockBytes
		if _, err := w.Open(t.Context(), "v", data, header, newKey(t, KeyBytes)); !errdefs.IsDataLoss(err) || w.left() != "" {
			t.Errorf("%v, left %s", err, w.left())
		}
	})
}
