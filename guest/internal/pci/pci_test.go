package pci

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

func TestParseTakesSlotsOnly(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"00", "1f", "02/01", "02/1f/00", strings.Repeat("01/", 15) + "01"} {
		path, err := Parse(s)
		if err != nil || path.String() != s {
			t.Errorf("Parse(%q) = %q, %v", s, path, err)
		}
	}
	for _, s := range []string{
		"", "/", "2", "2/1", "02/", "/02", "02//01", "20", "ff", "1F", "0x2", "+2", " 2", "02 ", "02/01\n", "02/01/",
		"..", "02/..", "../..", "02/.1", "02.0", "0000:00:02.0", "vda", "02\\01", "٠٢", strings.Repeat("01/", 16) + "01",
	} {
		if path, err := Parse(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Parse(%q) = %q, %v; want invalid argument", s, path, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"02/01", "00", "1f/1f", "20", "2/1", "..", "0000:00:02.0", "02/01/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		path, err := Parse(s)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("Parse(%q): %v", s, err)
			}
			return
		}
		if path.String() != s || strings.ContainsAny(s, ".:\\ ") {
			t.Fatalf("Parse(%q) = %q", s, path)
		}
	})
}

// tree makes a sysfs of files; a path that ends in "/" is a folder.
func tree(t *testing.T, files map[string]string) (sysfs string) {
	t.Helper()
	sysfs = t.TempDir()
	for name, content := range files {
		path := filepath.Join(sysfs, "devices", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(path, []byte(content+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return sysfs
}

const function = "pci0000:00/0000:00:02.0/0000:01:01.0/"

// disk are the files of a disk.
func disk(dir, number string) map[string]string {
	return map[string]string{dir + "/dev": number, dir + "/size": "524288", dir + "/diskseq": "7", dir + "/ro": "0", dir + "/queue/": ""}
}

func with(files map[string]string, more ...string) map[string]string {
	for i := 0; i < len(more); i += 2 {
		files[more[i]] = more[i+1]
	}
	return files
}

func TestFind(t *testing.T) {
	t.Parallel()
	plain := func() map[string]string { return disk(function+"virtio4/block/vda", "254:0") }
	found := func(err error) bool { return err == nil }
	tests := map[string]struct {
		files map[string]string
		path  string
		want  func(error) bool
	}{
		"a disk behind a bridge":                    {plain(), "02/01", found},
		"a disk on the root bus":                    {disk("pci0000:00/0000:00:05.0/virtio0/block/vda", "254:0"), "05", found},
		"other slots do not matter":                 {with(plain(), "pci0000:00/0000:00:02.0/0000:01:02.0/virtio9/block/vdb/dev", "254:16", "pci0000:00/0000:00:02.0/0000:01:00.1/", ""), "02/01", found},
		"nothing at all":                            {nil, "02/01", errdefs.IsNotFound},
		"another slot":                              {plain(), "02/02", errdefs.IsNotFound},
		"the bridge itself":                         {plain(), "02", errdefs.IsNotFound},
		"the slot without its bridge":               {plain(), "01", errdefs.IsNotFound},
		"a level too many":                          {plain(), "02/01/00", errdefs.IsNotFound},
		"another domain":                            {disk("pci0000:00/0000:00:02.0/0001:01:01.0/virtio4/block/vda", "254:0"), "02/01", errdefs.IsNotFound},
		"another root bus":                          {disk("pci0000:80/0000:80:02.0/virtio4/block/vda", "254:0"), "02", errdefs.IsNotFound},
		"driver not bound yet":                      {map[string]string{function: ""}, "02/01", errdefs.IsNotFound},
		"disk not there yet":                        {map[string]string{function + "virtio4/": ""}, "02/01", errdefs.IsNotFound},
		"disk without its attributes yet":           {map[string]string{function + "virtio4/block/vda/": ""}, "02/01", errdefs.IsNotFound},
		"a second function beside it":               {with(plain(), "pci0000:00/0000:00:02.0/0000:01:01.1/", ""), "02/01", errdefs.IsFailedPrecondition},
		"a second function of the bridge":           {with(plain(), "pci0000:00/0000:00:02.3/", ""), "02/01", errdefs.IsFailedPrecondition},
		"only a function that is not 0":             {disk("pci0000:00/0000:00:02.1/virtio4/block/vda", "254:0"), "02", errdefs.IsFailedPrecondition},
		"the slot on two buses":                     {with(plain(), "pci0000:00/0000:00:02.0/0000:02:01.0/", ""), "02/01", errdefs.IsFailedPrecondition},
		"two virtio devices":                        {with(plain(), function+"virtio5/", ""), "02/01", errdefs.IsFailedPrecondition},
		"two block devices":                         {with(plain(), function+"virtio4/block/vdb/dev", "254:16"), "02/01", errdefs.IsFailedPrecondition},
		"a block device that is not virtio-blk's":   {disk(function+"virtio4/block/sda", "8:0"), "02/01", errdefs.IsFailedPrecondition},
		"a number that is none":                     {with(plain(), function+"virtio4/block/vda/dev", "vda"), "02/01", errdefs.IsInvalidArgument},
		"a scsi controller, which has disks deeper": {map[string]string{function + "virtio4/host0/target0:0:0/0:0:0:0/block/sda/dev": "8:0"}, "02/01", errdefs.IsNotFound},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, err := Parse(test.path)
			if err != nil {
				t.Fatal(err)
			}
			got, err := Find(tree(t, test.files), path)
			if !test.want(err) {
				t.Fatalf("Find = %+v, %v", got, err)
			}
			want := Device{Name: "vda", Number: blockdev.Number{Major: 254}, Bytes: 256 << 20, Sequence: 7}
			if err == nil && (got != want || got.Node() != "/dev/vda") {
				t.Fatalf("Find = %+v, want %+v", got, want)
			}
		})
	}
}

func TestFindSaysThatADiskIsReadOnly(t *testing.T) {
	t.Parallel()
	path, err := Parse("02/01")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Find(tree(t, with(disk(function+"virtio4/block/vda", "254:0"), function+"virtio4/block/vda/ro", "1")), path)
	if err != nil || !got.ReadOnly {
		t.Errorf("Find = %+v, %v", got, err)
	}
}

func TestWaitLooksAgainAfterEachArrival(t *testing.T) {
	t.Parallel()
	looks, arrivals := 0, 0
	got, err := wait(t.Context(), func() (Device, error) {
		if looks++; looks < 3 {
			return Device{}, notYet(Path{})
		}
		return Device{Name: "vda"}, nil
	}, func() error { arrivals++; return nil })
	if err != nil || got.Name != "vda" || looks != 3 || arrivals != 2 {
		t.Fatalf("wait = %+v, %v after %d looks and %d arrivals", got, err, looks, arrivals)
	}
}

func TestWaitEnds(t *testing.T) {
	t.Parallel()
	none := func() (Device, error) { return Device{}, notYet(Path{}) }
	t.Run("with its context", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		_, err := wait(ctx, none, func() error { cancel(); return os.ErrDeadlineExceeded })
		if !errdefs.IsUnavailable(err) || !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	})
	t.Run("when what arrives is wrong", func(t *testing.T) {
		t.Parallel()
		_, err := wait(t.Context(), func() (Device, error) { return Device{}, notPlain(Path{}, "it is odd") }, nil)
		if !errdefs.IsFailedPrecondition(err) {
			t.Fatal(err)
		}
	})
	t.Run("when the kernel's messages end", func(t *testing.T) {
		t.Parallel()
		if _, err := wait(t.Context(), none, func() error { return os.ErrClosed }); !errors.Is(err, os.ErrClosed) {
			t.Fatal(err)
		}
	})
}

func TestAnnouncesDisk(t *testing.T) {
	t.Parallel()
	for message, want := range map[string]bool{
		"add@/devices/pci0000:00/0000:00:02.0/virtio4/block/vda\x00ACTION=add\x00":   true,
		"add@/devices/pci0000:00/0000:00:02.0/virtio4\x00ACTION=add\x00":             false,
		"remove@/devices/pci0000:00/0000:00:02.0/virtio4/block/vda\x00ACTION=remove": false,
		"libudev\x00add@/devices/pci0000:00/0000:00:02.0/virtio4/block/vda\x00":      false,
		"": false,
	} {
		if got := announcesDisk([]byte(message)); got != want {
			t.Errorf("announcesDisk(%q) = %v", message, got)
		}
	}
}
