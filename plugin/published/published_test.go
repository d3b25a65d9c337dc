package published

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

const (
	target = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/pvc-1/mount"
	record = `{"version":1,"name":"pvc-1","target":"` + target + `","file":"/var/lib/sealvol/csi/pvc-1/disk.img","readOnly":false}`
)

var volume = Volume{Name: "pvc-1", Target: target, File: "/var/lib/sealvol/csi/pvc-1/disk.img"}

func newDir(t *testing.T) Dir { return Dir(filepath.Join(t.TempDir(), "run", "published")) }

// plant puts a file where the target's record is.
func plant(t *testing.T, d Dir, data string) {
	t.Helper()
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.path(target), []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAVolumeIsFoundByItsTarget(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	for _, readOnly := range []bool{false, true, true} { // also once more, and in another's place
		want := volume
		want.ReadOnly = readOnly
		if err := d.Write(want); err != nil {
			t.Fatal(err)
		}
		got, err := d.Find(target)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	if info, err := os.Stat(string(d)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder is %v (%v): others can see what is published", info.Mode(), err)
	}
	for range 2 {
		if err := d.Remove(target); err != nil {
			t.Error(err)
		}
		if v, err := d.Find(target); !errdefs.IsNotFound(err) {
			t.Errorf("a removed record gives %v (%v)", v, err)
		}
	}
	if entries, err := os.ReadDir(string(d)); err != nil || len(entries) > 0 {
		t.Errorf("the folder still holds %v (%v)", entries, err)
	}
}

func TestTheFormatIsAsDocumented(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	plant(t, d, record)
	if got, err := d.Find(target); err != nil || got != volume {
		t.Errorf("got %v (%v)", got, err)
	}
	data, err := encode(volume)
	if err != nil || string(data) != record+"\n" {
		t.Errorf("the record is %s (%v), not %s", data, err, record)
	}
}

func TestSourcesWithoutARecordAreNotFound(t *testing.T) {
	t.Parallel()
	written := newDir(t)
	if err := written.Write(volume); err != nil {
		t.Fatal(err)
	}
	for _, d := range []Dir{written, newDir(t)} {
		for _, source := range []string{"/etc/hosts", "proc", "", "/", target + "/", target + "/sub", "/a/../b", "/a\nb", filepath.Dir(target), d.path(target)} {
			if v, err := d.Find(source); !errdefs.IsNotFound(err) {
				t.Errorf("%q gives %v (%v)", source, v, err)
			}
		}
	}
}

// A container whose record cannot be read must be refused: taken for one without
// a record, it would run and write into a folder of the host.
func TestAMalformedRecordIsNeverNotFound(t *testing.T) {
	t.Parallel()
	edit := func(old, new string) string {
		if !strings.Contains(record, old) {
			t.Fatalf("%s is not in the record", old)
		}
		return strings.Replace(record, old, new, 1)
	}
	for name, test := range map[string]struct{ data, want string }{
		"nothing":                 {"", "unexpected end"},
		"half a record":           {record[:len(record)/2], "unexpected end"},
		"null":                    {"null", "version 0"},
		"another type":            {"[]", "cannot unmarshal"},
		"trailing data":           {record + "{}", "after top-level value"},
		"bytes that are no text":  {edit("pvc-1", "\xff"), "not UTF-8"},
		"more than fits":          {record + strings.Repeat(" ", MaxSize), "more than 65536 bytes"},
		"an unknown key":          {edit(`"name"`, `"fsType":"xfs","name"`), `unknown field "fsType"`},
		"a repeated key":          {edit(`"name"`, `"name":"a","name"`), `duplicate field "name"`},
		"a key in another case":   {edit(`"readOnly"`, `"readonly"`), `unknown field "readonly"`},
		"no version":              {edit(`"version":1,`, ``), "version 0"},
		"a version to come":       {edit(`"version":1`, `"version":2`), "version 2, not 1"},
		"no name":                 {edit(`"name":"pvc-1",`, ``), "volume name"},
		"a name that climbs":      {edit(`"name":"pvc-1"`, `"name":".."`), "volume name"},
		"another's target":        {edit(target, "/other"), `target "/other" is another's`},
		"a target that climbs":    {edit(target, "/a/../b"), "target"},
		"no file":                 {edit(`"file":"/var/lib/sealvol/csi/pvc-1/disk.img",`, ``), "file"},
		"a relative file":         {edit(`"file":"/var`, `"file":"var`), "not an absolute path"},
		"a file that climbs":      {edit(`csi/pvc-1`, `csi/../pvc-1`), "not a clean path"},
		"no word on read-only":    {edit(`,"readOnly":false`, ``), "no readOnly"},
		"a read-only that is not": {edit(`false`, `"no"`), "cannot unmarshal"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDir(t)
			plant(t, d, test.data)
			v, err := d.Find(target)
			if !errdefs.IsDataLoss(err) || errdefs.IsNotFound(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Find gives %v (%v), not data loss with %q", v, err, test.want)
			}
			if all, err := d.List(); !errdefs.IsDataLoss(err) || len(all) > 0 {
				t.Errorf("List gives %v (%v)", all, err)
			}
		})
	}
}

// Whoever can write a record lends any file of the node to a guest.
func TestRecordsThatOthersCouldHaveWrittenAreRefused(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(d Dir) error{
		"a folder that a group may enter": func(d Dir) error { return os.Chmod(string(d), 0o750) },
		"a file that all may write":       func(d Dir) error { return os.Chmod(d.path(target), 0o602) },
		"a link to the folder": func(d Dir) error {
			return errors.Join(os.Rename(string(d), string(d)+"2"), os.Symlink(string(d)+"2", string(d)))
		},
		"a link to the file": func(d Dir) error {
			return errors.Join(os.Rename(d.path(target), string(d)+"/x"), os.Symlink("x", d.path(target)))
		},
		"a pipe": func(d Dir) error {
			return errors.Join(os.Remove(d.path(target)), syscall.Mkfifo(d.path(target), 0o600))
		},
		"a folder in the file's place": func(d Dir) error {
			return errors.Join(os.Remove(d.path(target)), os.Mkdir(d.path(target), 0o700))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDir(t)
			plant(t, d, record)
			if err := spoil(d); err != nil {
				t.Fatal(err)
			}
			if v, err := d.Find(target); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("got %v (%v)", v, err)
			}
		})
	}
	d := newDir(t)
	plant(t, d, record)
	if err := os.Chmod(string(d), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := d.Write(volume); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a record was written where others can change it (%v)", err)
	}
}

func TestWriteRefusesWhatFindWould(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Volume){
		"no name":             func(v *Volume) { v.Name = "" },
		"a name that climbs":  func(v *Volume) { v.Name = "../a" },
		"a relative target":   func(v *Volume) { v.Target = "a" },
		"the root for target": func(v *Volume) { v.Target = "/" },
		"an unclean file":     func(v *Volume) { v.File = "/a//b" },
		"no file":             func(v *Volume) { v.File = "" },
	} {
		d := newDir(t)
		v := volume
		change(&v)
		if err := d.Write(v); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := os.Stat(string(d)); !os.IsNotExist(err) {
			t.Errorf("%s: something was made (%v)", name, err)
		}
	}
}

func TestListGivesAllThatIsWhole(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	if all, err := d.List(); err != nil || len(all) > 0 {
		t.Errorf("without a folder: %v (%v)", all, err)
	}
	plant(t, d, "torn")
	other := volume
	other.Target = "/other"
	if err := d.Write(other); err != nil {
		t.Fatal(err)
	}
	// What a writer left when it was killed.
	if err := os.WriteFile(filepath.Join(string(d), "."+filepath.Base(d.path(target))+"-123"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := d.List()
	if !errdefs.IsDataLoss(err) || len(all) != 1 || all[0] != other {
		t.Errorf("got %v (%v)", all, err)
	}
}

func TestSweepTakesWhatAKilledWriterLeft(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	if err := d.Sweep(); err != nil {
		t.Errorf("without a folder: %v", err)
	}
	if err := d.Write(volume); err != nil {
		t.Fatal(err)
	}
	record := filepath.Base(d.path(target))
	for _, name := range []string{"." + record + "-123", "." + record + "-mine", ".note"} {
		if err := os.WriteFile(filepath.Join(string(d), name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Sweep(); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]bool{record: true, "." + record + "-123": false, "." + record + "-mine": true, ".note": true} {
		if _, err := os.Stat(filepath.Join(string(d), name)); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReadersSeeWholeRecords(t *testing.T) {
	t.Parallel()
	d := newDir(t)
	if err := d.Write(volume); err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	for i := range 4 {
		work.Go(func() {
			v := volume
			v.ReadOnly = i%2 == 0
			for range 20 {
				if err := d.Write(v); err != nil {
					t.Error(err)
				}
				if _, err := d.Find(target); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(record))
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(strings.Replace(record, "pvc-1/mount", `<é\u00e9>&`, 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := parse(data)
		if err != nil {
			return
		}
		encoded, err := encode(v)
		if err != nil {
			t.Fatalf("%+v was read and cannot be written: %v", v, err)
		}
		if again, err := parse(bytes.TrimSpace(encoded)); err != nil || again != v {
			t.Fatalf("%+v becomes %+v (%v)", v, again, err)
		}
	})
}
