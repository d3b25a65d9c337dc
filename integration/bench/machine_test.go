package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDriversAreTheBest(t *testing.T) {
	t.Parallel()
	const procCrypto = `name         : sha256
driver       : sha256-avx2
module       : sha256_ssse3
priority     : 170

name         : aegis128
driver       : aegis128-generic
priority     : 100
type         : aead

name         : sha256
driver       : sha256-generic
priority     : 100
`
	want := []string{"sha256 by sha256-avx2", "aegis128 by aegis128-generic", "xts(aes) by none"}
	if diff := cmp.Diff(want, drivers(procCrypto, "sha256", "aegis128", "xts(aes)")); diff != "" {
		t.Error(diff)
	}
}

func TestBusySeconds(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		text string
		want float64
	}{
		"of Linux": {"cpu  100 20 30 99999 88888 4 6 0 0 0\ncpu0 1 2 3\n", 1.6},
		"of none":  {"cat: /proc/stat: no such file\n", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "stat")
			if err := os.WriteFile(file, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := busySeconds(file)
			if got != test.want || (err == nil) != (test.want > 0) {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}
