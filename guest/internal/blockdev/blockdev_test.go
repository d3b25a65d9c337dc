package blockdev

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseNumber(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", ":", "8", "8:", ":0", "8:0:0", "-1:0", "8:0\n", "0x8:0", "4294967296:0", "8: 0"} {
		if n, err := ParseNumber(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("ParseNumber(%q) = %v, %v; want invalid argument", s, n, err)
		}
	}
	for s, want := range map[string]Number{"0:0": {}, "254:16": {Major: 254, Minor: 16}, "259:1048575": {Major: 259, Minor: 1048575}} {
		n, err := ParseNumber(s)
		if err != nil || n != want || n.String() != s {
			t.Errorf("ParseNumber(%q) = %v, %v", s, n, err)
		}
	}
}

func TestOpenRefusesWhatIsNotTheDevice(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "vda")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file, Number{Major: 254}, os.O_RDONLY); !errdefs.IsUnavailable(err) {
		t.Errorf("a regular file: %v", err)
	}
	if _, err := Open("/dev/null", Number{Major: 1, Minor: 3}, os.O_RDONLY); !errdefs.IsUnavailable(err) {
		t.Errorf("a character device: %v", err)
	}
	if _, err := Open(file+"b", Number{}, os.O_RDONLY); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
}
