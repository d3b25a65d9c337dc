package device

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

func TestParseTakesTheFormsOfKataOnly(t *testing.T) {
	t.Parallel()
	good := map[string][]string{
		"blk":     {"00", "1f", "02/01", "02/1f/00", strings.Repeat("01/", 7) + "01"},
		"scsi":    {"0:0", "0:1", "1:0", "9:99", "199:249", "255:255"},
		"mmioblk": {"/dev/vda", "/dev/vdz", "/dev/vdaa", "/dev/vdzzz"},
	}
	bad := []string{
		"", "/", "2", "2/1", "02/", "/02", "02//01", "20", "ff", "1F", "0x2", "+2", " 2", "02 ", "02/01\n", "02/01/", "20/00/02",
		"..", "02/..", "../..", "02/.1", "02.0", "0000:00:02.0", "02\\01", "٠٢", strings.Repeat("01/", 8) + "01",
		":", "0", "0:", ":0", "0:0:0", "0:0:0:0", "00:1", "0:01", "256:0", "0:256", "0:16384", "-1:0", "0:+1", "0: 1", " 0:1", "0:1\n", "0:1/",
		"0:0x1", "٠:١", "0:1*", "0:..",
		"/dev/", "/dev/vd", "vda", "/dev/sda", "/dev/vda1", "/dev/vda/", "/dev//vda", "/dev/../dev/vda", "/dev/VDA", "/dev/vda\n", "/dev/vd.",
		"/dev/vdaaaa", "/dev/dm-0", "/dev/disk/by-id/virtio-a", "/sys/block/vda", "/dev/vd\u0430",
	}
	for driver, sources := range good {
		for _, s := range sources {
			a, err := Parse(driver, s)
			if err != nil || a.Source() != s || !strings.HasSuffix(a.String(), " "+s) {
				t.Errorf("Parse(%q, %q) = %v, %v", driver, s, a, err)
			}
			// A form that two drivers read would let one disk pass for two.
			for other := range good {
				if a, err := Parse(other, s); other != driver && !errdefs.IsInvalidArgument(err) {
					t.Errorf("Parse(%q, %q) = %v, %v; want invalid argument", other, s, a, err)
				}
			}
		}
		for _, s := range bad {
			if a, err := Parse(driver, s); !errdefs.IsInvalidArgument(err) {
				t.Errorf("Parse(%q, %q) = %v, %v; want invalid argument", driver, s, a, err)
			}
		}
	}
	for _, driver := range []string{"", "BLK", "blk ", "blk-ccw", "nvdimm", "vfio-pci", "virtio-blk", "ephemeral", "local", "9p", "overlayfs", "virtio-fs"} {
		for _, s := range []string{"02/01", "0:1", "/dev/vda"} {
			if a, err := Parse(driver, s); !errdefs.IsInvalidArgument(err) {
				t.Errorf("Parse(%q, %q) = %v, %v; want invalid argument", driver, s, a, err)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for driver, sources := range map[string][]string{
		"blk":     {"02/01", "00", "1f/1f", "20", "2/1", "..", "0000:00:02.0", "02/01/"},
		"scsi":    {"0:1", "255:255", "256:0", "00:1", "0:0:0:1"},
		"mmioblk": {"/dev/vda", "/dev/vdzz", "/dev/vda1", "/dev/../vda"},
		"blk-ccw": {"0.0.0005"},
	} {
		for _, s := range sources {
			f.Add(driver, s)
		}
	}
	empty := f.TempDir()
	f.Fuzz(func(t *testing.T, driver, source string) {
		a, err := Parse(driver, source)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || a != (Address{}) {
				t.Fatalf("Parse(%q, %q) = %v, %v", driver, source, a, err)
			}
			return
		}
		if a.Source() != source || strings.Contains(source, "..") || strings.ContainsAny(source, "\\ *?\n") {
			t.Fatalf("Parse(%q, %q) = %v", driver, source, a)
		}
		for _, other := range []string{blk, scsi, mmioBlk} {
			if b, err := Parse(other, source); err == nil && b != a {
				t.Fatalf("%q is %v and %v", source, a, b)
			}
		}
		if _, err := Find(empty, a); !errdefs.IsNotFound(err) {
			t.Fatalf("Find(%v) in an empty sysfs: %v", a, err)
		}
	})
}

// tree makes a sysfs of files; a path that ends in "/" is a folder, a content that begins with "->" a link. Beside the devices it has
// the links to them that the kernel has below bus and class.
func tree(t *testing.T, files map[string]string) (sysfs string) {
	t.Helper()
	sysfs = t.TempDir()
	link := func(name, to string) {
		t.Helper()
		path := filepath.Join(sysfs, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range files {
		path := filepath.Join(sysfs, "devices", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		to, isLink := strings.CutPrefix(content, "->")
		switch {
		case strings.HasSuffix(name, "/"):
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
		case isLink:
			link("devices/"+name, to)
		default:
			if err := os.WriteFile(path, []byte(content+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		switch dir := filepath.Dir(path); {
		case virtioName.MatchString(filepath.Base(dir)) && filepath.Base(path) == "device":
			link("bus/virtio/devices/"+filepath.Base(dir), dir)
		case filepath.Base(filepath.Dir(dir)) == "block" && filepath.Base(path) == "dev":
			link("class/block/"+filepath.Base(dir), dir)
		}
	}
	return sysfs
}

const (
	function  = "pci0000:00/0000:00:02.0/0000:01:01.0/"
	transport = "virtio-mmio-cmdline/virtio-mmio.0/"
	host      = "pci0000:00/0000:00:03.0/virtio1/host2/"
)

// disk are the files of a disk.
func disk(dir, number string) map[string]string {
	return map[string]string{dir + "/dev": number, dir + "/size": "524288", dir + "/diskseq": "7", dir + "/ro": "0", dir + "/queue/": ""}
}

// virtioBlk are the files of a disk at a PCI function or its like.
func virtioBlk(transport string) map[string]string {
	return with(disk(transport+"virtio4/block/vda", "254:0"), transport+"virtio4/device", "0x0002")
}

// onMMIO are the files of a disk on virtio-mmio. The links are as deep as in a machine.
func onMMIO() map[string]string {
	return with(virtioBlk(transport), transport+"driver", "->../../../bus/platform/drivers/virtio-mmio")
}

// onSCSI are the files of a disk at address 0:1.
func onSCSI() map[string]string {
	unit := host + "target2:0:0/2:0:0:1/"
	return with(disk(unit+"block/sda", "254:0"), unit+"type", "0", "pci0000:00/0000:00:03.0/virtio1/device", "0x0008", host+"scsi_host/host2/", "")
}

func with(files map[string]string, more ...string) map[string]string {
	for i := 0; i < len(more); i += 2 {
		files[more[i]] = more[i+1]
	}
	return files
}

func without(files map[string]string, names ...string) map[string]string {
	for _, name := range names {
		delete(files, name)
	}
	return files
}

func TestFind(t *testing.T) {
	t.Parallel()
	found := func(err error) bool { return err == nil }
	type place = map[string]struct {
		files  map[string]string
		source string
		want   func(error) bool
	}
	unit := host + "target2:0:0/2:0:0:1/"
	for driver, tests := range map[string]place{
		"blk": {
			"a disk behind a bridge":                  {virtioBlk(function), "02/01", found},
			"a disk on the root bus":                  {virtioBlk("pci0000:00/0000:00:05.0/"), "05", found},
			"behind a root port and a bridge":         {virtioBlk("pci0000:00/0000:00:1c.0/0000:04:00.0/0000:05:03.0/"), "1c/00/03", found},
			"other slots do not matter":               {with(virtioBlk(function), "pci0000:00/0000:00:02.0/0000:01:02.0/virtio9/block/vdb/dev", "254:16", "pci0000:00/0000:00:02.0/0000:01:00.1/", ""), "02/01", found},
			"partitions are not other disks":          {with(virtioBlk(function), function+"virtio4/block/vda/vda1/dev", "254:1", function+"virtio4/block/vda/vda1/partition", "1"), "02/01", found},
			"nothing at all":                          {nil, "02/01", errdefs.IsNotFound},
			"another slot":                            {virtioBlk(function), "02/02", errdefs.IsNotFound},
			"the bridge itself":                       {virtioBlk(function), "02", errdefs.IsNotFound},
			"the slot without its bridge":             {virtioBlk(function), "01", errdefs.IsNotFound},
			"a level too many":                        {virtioBlk(function), "02/01/00", errdefs.IsNotFound},
			"another domain":                          {virtioBlk("pci0000:00/0000:00:02.0/0001:01:01.0/"), "02/01", errdefs.IsNotFound},
			"another root bus":                        {virtioBlk("pci0000:80/0000:80:02.0/"), "02", errdefs.IsNotFound},
			"driver not bound yet":                    {map[string]string{function: ""}, "02/01", errdefs.IsNotFound},
			"type not there yet":                      {map[string]string{function + "virtio4/": ""}, "02/01", errdefs.IsNotFound},
			"disk not there yet":                      {map[string]string{function + "virtio4/device": "0x0002"}, "02/01", errdefs.IsNotFound},
			"disk without its attributes yet":         {with(map[string]string{function + "virtio4/block/vda/": ""}, function+"virtio4/device", "0x0002"), "02/01", errdefs.IsNotFound},
			"a second function beside it":             {with(virtioBlk(function), "pci0000:00/0000:00:02.0/0000:01:01.1/", ""), "02/01", errdefs.IsFailedPrecondition},
			"a second function of the bridge":         {with(virtioBlk(function), "pci0000:00/0000:00:02.3/", ""), "02/01", errdefs.IsFailedPrecondition},
			"only a function that is not 0":           {virtioBlk("pci0000:00/0000:00:02.1/"), "02", errdefs.IsFailedPrecondition},
			"the slot on two buses":                   {with(virtioBlk(function), "pci0000:00/0000:00:02.0/0000:02:01.0/", ""), "02/01", errdefs.IsFailedPrecondition},
			"two virtio devices":                      {with(virtioBlk(function), function+"virtio5/", ""), "02/01", errdefs.IsFailedPrecondition},
			"two block devices":                       {with(virtioBlk(function), function+"virtio4/block/vdb/dev", "254:16"), "02/01", errdefs.IsFailedPrecondition},
			"a block device that is not virtio-blk's": {with(disk(function+"virtio4/block/sda", "8:0"), function+"virtio4/device", "0x0002"), "02/01", errdefs.IsFailedPrecondition},
			"a number that is none":                   {with(virtioBlk(function), function+"virtio4/block/vda/dev", "vda"), "02/01", errdefs.IsInvalidArgument},
			"the controller of a SCSI disk":           {onSCSI(), "03", errdefs.IsFailedPrecondition},
			"a network card":                          {map[string]string{function + "virtio4/device": "0x0001"}, "02/01", errdefs.IsFailedPrecondition},
		},
		"scsi": {
			"a disk":                             {onSCSI(), "0:1", found},
			"hosts of other kinds do not matter": {with(onSCSI(), "pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:1/block/sdb/dev", "8:16"), "0:1", found},
			"partitions are not other disks":     {with(onSCSI(), unit+"block/sda/sda1/dev", "8:1", unit+"block/sda/sda1/partition", "1"), "0:1", found},
			"nothing at all":                     {nil, "0:1", errdefs.IsNotFound},
			"another LUN":                        {onSCSI(), "0:2", errdefs.IsNotFound},
			"another ID":                         {onSCSI(), "1:1", errdefs.IsNotFound},
			"on another channel":                 {with(without(onSCSI(), unit+"type"), host+"target2:1:0/2:1:0:1/type", "0"), "0:1", errdefs.IsNotFound},
			"driver not bound yet":               {map[string]string{"pci0000:00/0000:00:03.0/virtio1/device": "0x0008"}, "0:1", errdefs.IsNotFound},
			"disk not there yet":                 {map[string]string{"pci0000:00/0000:00:03.0/virtio1/device": "0x0008", unit + "type": "0"}, "0:1", errdefs.IsNotFound},
			"a disk of a host of another kind":   {with(disk("pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:1/block/sda", "8:0"), "pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:1/type", "0"), "0:1", errdefs.IsNotFound},
			"a second controller":                {with(onSCSI(), "pci0000:00/0000:00:04.0/virtio2/device", "0x0008"), "0:1", errdefs.IsFailedPrecondition},
			"a second controller on another bus": {with(onSCSI(), transport+"virtio2/device", "0x0008"), "0:1", errdefs.IsFailedPrecondition},
			"two hosts of one controller":        {with(onSCSI(), "pci0000:00/0000:00:03.0/virtio1/host3/", ""), "0:1", errdefs.IsFailedPrecondition},
			"two block devices":                  {with(onSCSI(), unit+"block/sdb/dev", "8:16"), "0:1", errdefs.IsFailedPrecondition},
			"a block device of another driver":   {with(without(onSCSI(), unit+"block/sda/dev", unit+"block/sda/size", unit+"block/sda/diskseq", unit+"block/sda/ro", unit+"block/sda/queue/"), unit+"block/sr0/dev", "11:0"), "0:1", errdefs.IsFailedPrecondition},
			"a CD-ROM":                           {with(onSCSI(), unit+"type", "5"), "0:1", errdefs.IsFailedPrecondition},
			"a number that is none":              {with(onSCSI(), unit+"block/sda/size", "-1"), "0:1", func(err error) bool { return err != nil && !errdefs.IsNotFound(err) }},
		},
		"mmioblk": {
			"a disk of the command line":       {onMMIO(), "/dev/vda", found},
			"a disk of ACPI":                   {with(virtioBlk("platform/LNRO0005:00/"), "platform/LNRO0005:00/driver", "->../../../bus/platform/drivers/virtio-mmio"), "/dev/vda", found},
			"partitions are not other disks":   {with(onMMIO(), transport+"virtio4/block/vda/vda1/dev", "254:1", transport+"virtio4/block/vda/vda1/partition", "1"), "/dev/vda", found},
			"nothing at all":                   {nil, "/dev/vda", errdefs.IsNotFound},
			"another disk":                     {onMMIO(), "/dev/vdb", errdefs.IsNotFound},
			"disk without its attributes yet":  {without(onMMIO(), transport+"virtio4/block/vda/size"), "/dev/vda", errdefs.IsNotFound},
			"a disk that has a PCI path":       {with(virtioBlk(function), function+"driver", "->../../../../bus/pci/drivers/virtio-pci"), "/dev/vda", errdefs.IsFailedPrecondition},
			"a bus without a driver":           {virtioBlk(transport), "/dev/vda", errdefs.IsFailedPrecondition},
			"a driver that is only called so":  {with(virtioBlk(transport), transport+"driver", "->../../../bus/pci/drivers/virtio-mmio"), "/dev/vda", errdefs.IsFailedPrecondition},
			"a disk of another kind":           {with(onMMIO(), transport+"virtio4/device", "0x001a"), "/dev/vda", errdefs.IsFailedPrecondition},
			"two virtio devices":               {with(onMMIO(), transport+"virtio5/", ""), "/dev/vda", errdefs.IsFailedPrecondition},
			"two block devices":                {with(onMMIO(), transport+"virtio4/block/vdb/dev", "254:16"), "/dev/vda", errdefs.IsFailedPrecondition},
			"a name of something that is none": {disk("virtual/block/vda", "254:0"), "/dev/vda", errdefs.IsFailedPrecondition},
		},
	} {
		for name, test := range tests {
			t.Run(driver+"/"+name, func(t *testing.T) {
				t.Parallel()
				address, err := Parse(driver, test.source)
				if err != nil {
					t.Fatal(err)
				}
				got, err := Find(tree(t, test.files), address)
				if !test.want(err) {
					t.Fatalf("Find = %+v, %v", got, err)
				}
				if err != nil {
					if !strings.Contains(err.Error(), test.source) {
						t.Errorf("%v does not name the address", err)
					}
					return
				}
				want := Disk{Name: map[string]string{"blk": "vda", "scsi": "sda", "mmioblk": "vda"}[driver], Number: blockdev.Number{Major: 254}, Bytes: 256 << 20, Sequence: 7}
				if got != want || got.Node() != "/dev/"+want.Name {
					t.Fatalf("Find = %+v, want %+v", got, want)
				}
			})
		}
	}
}

func TestNothingIsAtNoAddress(t *testing.T) {
	t.Parallel()
	if got, err := Find(tree(t, virtioBlk(function)), Address{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Find = %+v, %v", got, err)
	}
}

func TestFindSaysThatADiskIsReadOnly(t *testing.T) {
	t.Parallel()
	address, err := Parse("blk", "02/01")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Find(tree(t, with(virtioBlk(function), function+"virtio4/block/vda/ro", "1")), address)
	if err != nil || !got.ReadOnly {
		t.Errorf("Find = %+v, %v", got, err)
	}
}

func TestWaitLooksAgainAfterEachArrival(t *testing.T) {
	t.Parallel()
	looks, arrivals := 0, 0
	got, err := wait(t.Context(), func() (Disk, error) {
		if looks++; looks < 3 {
			return Disk{}, errNotYet
		}
		return Disk{Name: "vda"}, nil
	}, func() error { arrivals++; return nil })
	if err != nil || got.Name != "vda" || looks != 3 || arrivals != 2 {
		t.Fatalf("wait = %+v, %v after %d looks and %d arrivals", got, err, looks, arrivals)
	}
}

func TestWaitEnds(t *testing.T) {
	t.Parallel()
	none := func() (Disk, error) { return Disk{}, errNotYet }
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
		_, err := wait(t.Context(), func() (Disk, error) { return Disk{}, notPlain("it is odd") }, nil)
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
