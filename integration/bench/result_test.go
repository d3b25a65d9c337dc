package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSummarise(t *testing.T) {
	t.Parallel()
	s := samples{}
	for _, v := range []float64{3, 1, 2} {
		s.add("seq_write", "raw", "MB/s", v)
	}
	s.add("seq_write", "cdh-luks2", "MB/s", 7)
	want := []Result{
		{Bench: "seq_write", Target: "cdh-luks2", Unit: "MB/s", Median: 7, Min: 7, Max: 7, Runs: 1},
		{Bench: "seq_write", Target: "raw", Unit: "MB/s", Median: 2, Min: 1, Max: 3, Runs: 3},
	}
	if diff := cmp.Diff(want, s.summarise()); diff != "" {
		t.Error(diff)
	}
}

func TestMerge(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	a := in("a", `[{"bench": "run_pod", "target": "x", "unit": "s", "median": 1, "min": 1, "max": 1, "runs": 1}]`)
	b := in("b", `[{"bench": "fsync_p50", "target": "raw", "unit": "ms", "median": 2, "min": 1, "max": 3, "runs": 3}]`)
	out := filepath.Join(dir, "out")
	if err := merge(out, a, b); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	const want = `[
  {
    "bench": "fsync_p50",
    "target": "raw",
    "unit": "ms",
    "median": 2,
    "min": 1,
    "max": 3,
    "runs": 3
  },
  {
    "bench": "run_pod",
    "target": "x",
    "unit": "s",
    "median": 1,
    "min": 1,
    "max": 1,
    "runs": 1
  }
]
`
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Error(diff)
	}
	for name, inputs := range map[string][]string{
		"the same row twice": {a, b, a},
		"a file that is not": {a, filepath.Join(dir, "none")},
		"a file of no rows":  {in("c", "{")},
	} {
		if err := merge(out, inputs...); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	results := []Result{
		{Bench: "ready_1g", Target: "raw", Unit: "s", Median: 0.5},
		{Bench: "ready_1g", Target: "cdh-luks2", Unit: "s", Median: 20},
		{Bench: "ready_1g", Target: "ours", Unit: "s", Median: 1},
		{Bench: "seq_write", Target: "raw", Unit: "MB/s", Median: 400},
		{Bench: "seq_write", Target: "cdh-luks2", Unit: "MB/s", Median: 50},
		{Bench: "seq_write", Target: "ours", Unit: "MB/s", Median: 200},
		{Bench: "guest_bytes_per_gib", Target: "ours", Unit: "bytes/GiB", Median: 8388608},
		{Bench: "guest_available_per_gib", Target: "raw", Unit: "bytes/GiB", Median: -4096},
		{Bench: "guest_available_per_gib", Target: "ours", Unit: "bytes/GiB", Median: 9000000},
	}
	got := compare(results, []target{{name: "raw"}, {name: "cdh-luks2"}, {name: "ours"}})
	want := strings.Join([]string{
		"| median (× cdh-luks2, × raw: how many times better) | raw | cdh-luks2 | ours |",
		"|---|---|---|---|",
		"| ready, 1 GiB, s | 0.5 (40.00, –) | 20 (–, 0.03) | 1 (20.00, 0.50) |",
		"| sequential write, MB/s | 400 (8.00, –) | 50 (–, 0.12) | 200 (4.00, 0.50) |",
		"| guest memory per GiB written, sequential, bytes/GiB | – | – | 8388608 (–, –) |",
		"| MemAvailable lost per GiB written, sequential, bytes/GiB | -4096 (–, –) | – | 9000000 (–, –) |",
		"",
	}, "\n")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
