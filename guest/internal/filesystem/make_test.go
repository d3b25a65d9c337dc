package filesystem

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const mkfs = "/usr/sbin/mkfs.ext4" // of Debian's e2fsprogs, as in the guest image

func makeImage(t *testing.T, size uint64) *Image {
	t.Helper()
	image, err := Make(t.Context(), mkfs, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return image
}

// written is how many bytes of the image have to be copied.
func written(t *testing.T, image *Image) (bytes int64) {
	t.Helper()
	for e, err := range image.extents() {
		if err != nil {
			t.Fatal(err)
		}
		if e.start%BlockBytes != 0 || e.end%BlockBytes != 0 || e.start >= e.end {
			t.Errorf("extent %+v is not of whole blocks", e)
		}
		bytes += e.end - e.start
	}
	return bytes
}

func TestMakeWritesLittleWhateverTheSize(t *testing.T) {
	t.Parallel()
	for size, limit := range map[uint64]int64{MinBytes: 256 << 10, 64 << 20: 1 << 20, 1 << 30: 1 << 20, 100 << 30: 16 << 20, 100<<30 + 12288: 16 << 20} {
		if n := written(t, makeImage(t, size)); n == 0 || n > limit {
			t.Errorf("%d bytes of metadata for %d, limit %d", n, size, limit)
		}
	}
}

func TestCopyIsTheFileSystem(t *testing.T) {
	t.Parallel()
	const size = 256 << 20
	image := makeImage(t, size)
	device := filepath.Join(t.TempDir(), "device")
	file, err := os.Create(device)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := image.copyTo(t.Context(), file); err != nil {
		t.Fatal(err)
	}
	if output, err := exec.Command("/usr/sbin/e2fsck", "-fn", device).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, output)
	}
	header, err := exec.Command("/usr/sbin/dumpe2fs", "-h", device).Output()
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(header)) {
		key, value, _ := strings.Cut(line, ":")
		fields[key] = strings.TrimSpace(value)
	}
	for key, want := range map[string]string{"Block count": "65536", "Block size": "4096", "Inode size": "256", "Inode count": "16384", "Reserved block count": "0"} {
		if fields[key] != want {
			t.Errorf("%s is %q, want %s", key, fields[key], want)
		}
	}
	for _, feature := range []string{"has_journal", "resize_inode"} {
		if strings.Contains(fields["Filesystem features"], feature) {
			t.Errorf("feature %s is set", feature)
		}
	}
}

func TestMakeDoesNotReadTheImagesConfiguration(t *testing.T) {
	// The child gets an environment of ours; the parent's must not matter.
	config := filepath.Join(t.TempDir(), "mke2fs.conf")
	if err := os.WriteFile(config, []byte("[defaults]\n\tblocksize = 1024\n\tbase_features = has_journal\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("MKE2FS_CONFIG", config)
	if n := written(t, makeImage(t, 64<<20)); n > 1<<20 {
		t.Errorf("%d bytes of metadata", n)
	}
}

func TestMakeFails(t *testing.T) {
	t.Parallel()
	if _, err := Make(t.Context(), "/nowhere/mkfs.ext4", MinBytes); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no mkfs: %v", err)
	}
	if _, err := Make(t.Context(), "/bin/false", MinBytes); err == nil {
		t.Error("mkfs that fails gave an image")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Make(ctx, mkfs, MinBytes); !errors.Is(err, context.Canceled) {
		t.Errorf("context has ended: %v", err)
	}
	if err := makeImage(t, MinBytes).copyTo(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("context has ended: %v", err)
	}
}
