package record

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"testing"

	"github.com/sealvol/sealvol/shim/hotplug"
)

func TestWriteIsWhatKataReads(t *testing.T) {
	t.Parallel()
	dir := Dir(filepath.Join(t.TempDir(), "direct-volumes"))
	if err := dir.Write(hotplug.Source("sb", "vol"), "/dev/loop0"); err != nil {
		t.Fatal(err)
	}
	name := base64.URLEncoding.EncodeToString([]byte("/run/sealvol/direct/sb/vol"))
	got, err := os.ReadFile(filepath.Join(string(dir), name, "mountInfo.json"))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"volume-type":"block","device":"/dev/loop0","fstype":"ext4"}`; string(got) != want {
		t.Errorf("got %s, not %s", got, want)
	}
}

func TestWriteThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := Dir(t.TempDir())
	source := hotplug.Source("sb", "vol")
	// A folder where the file belongs makes the last step fail.
	if err := os.MkdirAll(filepath.Join(dir.path(source), "mountInfo.json", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := dir.Write(source, "/dev/loop0"); err == nil {
		t.Fatal("no error")
	}
	wantRecords(t, dir)
}

func TestRemoveSandboxRemovesItsRecordsOnly(t *testing.T) {
	t.Parallel()
	dir := Dir(t.TempDir())
	for _, source := range []string{hotplug.Source("sb", "a"), hotplug.Source("sb", "b"), hotplug.Source("sb2", "a"), "/elsewhere"} {
		if err := dir.Write(source, "/dev/loop0"); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir.path(hotplug.Source("sb", "a")), "sb"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(string(dir), "no base64!"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := dir.RemoveSandbox("sb"); err != nil {
		t.Fatal(err)
	}
	wantRecords(t, dir, dir.path("/elsewhere"), dir.path(hotplug.Source("sb2", "a")), filepath.Join(string(dir), "no base64!"))
}

func TestRemoveSandboxWithoutAnyRecord(t *testing.T) {
	t.Parallel()
	if err := Dir(filepath.Join(t.TempDir(), "absent")).RemoveSandbox("sb"); err != nil {
		t.Error(err)
	}
}

func wantRecords(t *testing.T, dir Dir, want ...string) {
	t.Helper()
	got, err := filepath.Glob(filepath.Join(string(dir), "*"))
	if err != nil || len(got) != len(want) {
		t.Fatalf("records are %q (%v), not %q", got, err, want)
	}
	for _, path := range want {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}
