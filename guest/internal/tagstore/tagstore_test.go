package tagstore

import (
	"os"
	"path/filepath"
	"testing"
)

func TestAvailableMemory(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "meminfo")
	for text, want := range map[string]uint64{
		"MemTotal:        2030532 kB\nMemFree:         1000000 kB\nMemAvailable:    1500000 kB\nBuffers: 1 kB\n": 1500000 << 10,
		"MemTotal:        2030532 kB\n": 0, // an error
		"":                              0,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := availableMemory(file); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
}

func TestMaxBytesIsOne128thOfTheDevice(t *testing.T) {
	t.Parallel()
	for data, want := range map[uint64]uint64{0: 0, 1: 32, 4096: 32, 4097: 64, 1 << 30: 8 << 20, 100 << 30: 800 << 20} {
		if got := MaxBytes(data); got != want {
			t.Errorf("%d bytes of data: %d, want %d", data, got, want)
		}
	}
}
