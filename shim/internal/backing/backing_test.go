package backing

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
)

func TestOpenRefusesWhatIsNoBacking(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, link, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "pipe")
	if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		backing hotplug.Backing
		is      func(error) bool
		want    string
	}{
		"a file that is not there":   {hotplug.File(filepath.Join(dir, "absent")), errdefs.IsNotFound, "absent"},
		"a link":                     {hotplug.File(link), errdefs.IsInvalidArgument, "link"},
		"a folder":                   {hotplug.File(dir), errdefs.IsInvalidArgument, "directory"},
		"a pipe":                     {hotplug.File(pipe), errdefs.IsInvalidArgument, "not a regular file"},
		"a device":                   {hotplug.File("/dev/null"), errdefs.IsInvalidArgument, "not a regular file"},
		"a number that is not there": {hotplug.Device{Major: 4000, Minor: 77}, errdefs.IsNotFound, "no block device 4000:77"},
		"nothing":                    {nil, errdefs.IsInvalidArgument, "backing"},
	} {
		if _, err := Open(test.backing); !test.is(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestANodeMustBeTheDevice(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A character device with the very number, and a file.
	for path, number := range map[string]hotplug.Device{"/dev/null": {Major: 1, Minor: 3}, file: {Major: 7, Minor: 0}} {
		if _, err := openNode(path, number); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v", path, err)
		}
	}
}
