package filesystem

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tools are those of Debian's e2fsprogs and xfsprogs, as in the guest image.
var tools = Tools{Ext4: "/usr/sbin/mkfs.ext4", XFS: "/usr/sbin/mkfs.xfs"}

// eachType is for what is the same for every file system.
func eachType(t *testing.T, do func(*testing.T, Type)) {
	for _, kind := range []Type{Ext4, XFS} {
		t.Run(string(kind), func(t *testing.T) { do(t, kind) })
	}
}

func newImage(t *testing.T, kind Type, size uint64) *Image {
	t.Helper()
	image, err := kind.Make(t.Context(), tools, size)
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
	for _, c := range []struct {
		kind        Type
		size        uint64
		least, most int64
	}{
		// The whole of the inode tables, and little more.
		{Ext4, Ext4.MinBytes(), 32 << 10, 256 << 10},
		{Ext4, 64 << 20, 1 << 20, 2 << 20},
		{Ext4, 1 << 30, 16 << 20, 17 << 20},
		{Ext4, 10 << 30, 33 << 20, 34 << 20},
		{Ext4, 100 << 30, 44 << 20, 50 << 20},
		{Ext4, 100<<30 + 12288, 44 << 20, 50 << 20},
		// The whole of the log, which the kernel reads, and little more.
		{XFS, XFS.MinBytes(), 10 << 20, 11 << 20},
		{XFS, 1 << 30, 16 << 20, 17 << 20},
		{XFS, 1<<30 + 4096, 16 << 20, 17 << 20},
		{XFS, 100 << 30, 16 << 20, 17 << 20},
		{XFS, 2 << 40, 16 << 20, 17 << 20},
	} {
		if n := written(t, newImage(t, c.kind, c.size)); n < c.least || n > c.most {
			t.Errorf("%s of %d bytes: %d bytes to copy, not %d to %d", c.kind, c.size, n, c.least, c.most)
		}
	}
}

// copied is a file with what a volume would hold.
func copied(t *testing.T, kind Type, size uint64) string {
	t.Helper()
	image := newImage(t, kind, size)
	name := filepath.Join(t.TempDir(), "device")
	file, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	if err := image.copyTo(t.Context(), file); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestCopyIsTheExt4(t *testing.T) {
	t.Parallel()
	device := copied(t, Ext4, 256<<20)
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

func TestCopyIsTheXFS(t *testing.T) {
	t.Parallel()
	device := copied(t, XFS, 256<<20)
	if output, err := exec.Command("/usr/sbin/xfs_repair", "-n", device).CombinedOutput(); err != nil {
		t.Errorf("xfs_repair: %v\n%s", err, output)
	}
	output, err := exec.Command("/usr/sbin/xfs_db", "-r", "-c", "info", device).Output()
	if err != nil {
		t.Fatal(err)
	}
	info := " " + strings.Join(strings.Fields(string(output)), " ") + " "
	for _, want := range []string{"isize=512", "sectsz=4096", "bsize=4096", "blocks=65536,", "crc=1", "finobt=1,", "sparse=1,", "rmapbt=0", "reflink=1", "bigtime=1", "inobtcount=1", "log =internal", "blocks=4096,"} {
		if !strings.Contains(info, " "+want+" ") {
			t.Errorf("%q is not there: %s", want, info)
		}
	}
}

func TestInodeTablesAreWhereTheToolsSeeThem(t *testing.T) {
	t.Parallel()
	for _, size := range []uint64{Ext4.MinBytes(), 1 << 30, 3<<30 + 12288, 10 << 30} {
		image := newImage(t, Ext4, size)
		copied := filepath.Join(t.TempDir(), "ext4")
		file, err := os.Create(copied)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := errors.Join(file.Truncate(int64(size)), image.copyTo(t.Context(), file)); err != nil {
			t.Fatal(err)
		}
		output, err := exec.Command("/usr/sbin/dumpe2fs", copied).Output()
		if err != nil {
			t.Fatal(err)
		}
		var tables []extent
		for _, found := range regexp.MustCompile(`Inode table at (\d+)-(\d+) `).FindAllStringSubmatch(string(output), -1) {
			first, firstErr := strconv.ParseInt(found[1], 10, 64)
			last, lastErr := strconv.ParseInt(found[2], 10, 64)
			if err := errors.Join(firstErr, lastErr); err != nil {
				t.Fatal(err)
			}
			tables = append(tables, extent{first * BlockBytes, (last + 1) * BlockBytes})
		}
		if d := cmp.Diff(tables, image.zeros, cmp.AllowUnexported(extent{})); d != "" {
			t.Errorf("%d bytes: %s", size, d)
		}
	}
}

func TestAnotherFormatIsNotTakenForExt4(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"nothing": "", "zeros": strings.Repeat("\x00", 8192), "noise": strings.Repeat("\xff", 8192),
		"no groups": strings.Repeat("\x00", 1024+0x38) + "\x53\xef" + strings.Repeat("\x00", 8192),
	} {
		if tables, err := inodeTables(strings.NewReader(content)); err == nil {
			t.Errorf("%s: %v", name, tables)
		}
	}
}

func TestXFSTakesItsLogAtEverySize(t *testing.T) {
	t.Parallel()
	for size := XFS.MinBytes(); size < 16<<40; size += size/2 - size/2%BlockBytes {
		newImage(t, XFS, size).Close()
	}
}

func TestMakeDoesNotReadTheImagesConfiguration(t *testing.T) {
	// The child gets an environment of ours; the parent's must not matter.
	config := filepath.Join(t.TempDir(), "mke2fs.conf")
	if err := os.WriteFile(config, []byte("[defaults]\n\tblocksize = 1024\n\tbase_features = has_journal\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("MKE2FS_CONFIG", config)
	if n := written(t, newImage(t, Ext4, 64<<20)); n > 2<<20 { // a journal has 4 MiB
		t.Errorf("%d bytes to copy", n)
	}
}

func TestMakeFails(t *testing.T) {
	t.Parallel()
	eachType(t, func(t *testing.T, kind Type) {
		absent := Tools{Ext4: "/nowhere/mkfs.ext4", XFS: "/nowhere/mkfs.xfs"}
		if _, err := kind.Make(t.Context(), absent, kind.MinBytes()); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("no mkfs: %v", err)
		}
		fails := Tools{Ext4: "/bin/false", XFS: "/bin/false"}
		if _, err := kind.Make(t.Context(), fails, kind.MinBytes()); err == nil {
			t.Error("mkfs that fails gave an image")
		}
		_, err := kind.Make(t.Context(), tools, kind.MinBytes()-BlockBytes)
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("too small: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := kind.Make(ctx, tools, kind.MinBytes()); !errors.Is(err, context.Canceled) {
			t.Errorf("context has ended: %v", err)
		}
	})
	if _, err := Type("vfat").Make(t.Context(), tools, 1<<30); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("unknown type: %v", err)
	}
}

func TestTooSmallNamesBothNumbers(t *testing.T) {
	t.Parallel()
	for kind, want := range map[Type]string{
		Ext4: "1044480 bytes are too few for ext4, which needs 1048576",
		XFS:  "67104768 bytes are too few for xfs, which needs 67108864",
	} {
		if _, err := kind.Make(t.Context(), tools, kind.MinBytes()-BlockBytes); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// TestTheEndOfTheContextEndsMkfs has a mkfs that would take for ever, and tells by a pipe that it runs and that it has ended. It is not
// parallel: a child that another test starts meanwhile would inherit the open program, which cannot be executed then.
func TestTheEndOfTheContextEndsMkfs(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	slow := filepath.Join(dir, "mkfs")
	if err := os.WriteFile(slow, []byte("#!/bin/sh\nexec >"+pipe+"\necho runs\nexec sleep 1000\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failed := make(chan error)
	go func() {
		_, err := Ext4.Make(ctx, Tools{Ext4: slow}, Ext4.MinBytes())
		failed <- err
	}()
	from, err := os.Open(pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if _, err := io.ReadFull(from, make([]byte, len("runs\n"))); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if n, err := from.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("mkfs still runs: %d, %v", n, err)
	}
}

// failingDevice takes a number of writes and no more.
type failingDevice struct{ left atomic.Int64 }

var errInjected = errors.New("injected")

func (d *failingDevice) WriteAt(p []byte, _ int64) (int, error) {
	if d.left.Add(-1) < 0 {
		return 0, errInjected
	}
	return len(p), nil
}

func TestACopyThatFailsIsAnError(t *testing.T) {
	t.Parallel()
	eachType(t, func(t *testing.T, kind Type) {
		image := newImage(t, kind, 64<<20)
		for n := int64(0); ; n++ {
			var device failingDevice
			device.left.Store(n)
			err := image.copyTo(t.Context(), &device)
			if err == nil {
				if n == 0 {
					t.Error("nothing was written")
				}
				break
			}
			if !errors.Is(err, errInjected) {
				t.Fatalf("write %d fails: %v", n, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := image.copyTo(ctx, new(failingDevice)); !errors.Is(err, context.Canceled) {
			t.Errorf("context has ended: %v", err)
		}
	})
}
