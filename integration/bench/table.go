package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A measure is a line of the table: what is measured, for people, and which way is better.
type measure struct {
	bench, title string
	lowerBetter  bool
}

// measures are in the order of the table.
var measures = []measure{
	{"ready_1g", "ready, 1 GiB", true},
	{"ready_10g", "ready, 10 GiB", true},
	{"ready_100g", "ready, 100 GiB", true},
	{"seq_write", "sequential write", false},
	{"seq_read", "sequential read", false},
	{"rand_write_qd16", "random write 4 KiB, depth 16", false},
	{"rand_read_qd16", "random read 4 KiB, depth 16", false},
	{"rand_write_qd1", "random write 4 KiB, depth 1", false},
	{"rand_read_qd1", "random read 4 KiB, depth 1", false},
	{"fsync_p50", "write 4 KiB and fsync, p50", true},
	{"fsync_p99", "write 4 KiB and fsync, p99", true},
	{"write_amplification_seq", "bytes to the disk per byte, sequential", true},
	{"write_amplification_rand", "bytes to the disk per byte, random", true},
	{"cpu_seconds_per_gib", "processor time to write, sequential", true},
	{"cpu_seconds_per_gib_read", "processor time to read, sequential", true},
	{"guest_bytes_per_gib", "guest memory per GiB written, sequential", true},
	{"guest_bytes_per_gib_random", "guest memory per GiB written, scattered", true},
	{"guest_available_per_gib", "MemAvailable lost per GiB written, sequential", true},
	{"guest_bytes_per_volume", "MemAvailable lost to an empty volume", true},
}

// compare is a table in Markdown: a line for each measure, a column for each target. After each median it has how many times better
// that is than CDH's and than the bare disk's of the same run.
func compare(results []Result, columns []target) string {
	find := func(bench, target string) (Result, bool) {
		i := slices.IndexFunc(results, func(r Result) bool { return r.Bench == bench && r.Target == target })
		if i < 0 {
			return Result{}, false
		}
		return results[i], true
	}
	var b strings.Builder
	b.WriteString("| median (× cdh-luks2, × raw: how many times better) |")
	for _, t := range columns {
		fmt.Fprintf(&b, " %s |", t.name)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, m := range measures {
		line, unit := "", ""
		for _, t := range columns {
			r, ok := find(m.bench, t.name)
			if !ok {
				line += " – |"
				continue
			}
			unit = r.Unit
			line += " " + number(r.Median)
			var ratios []string
			for _, reference := range []string{"cdh-luks2", "raw"} {
				other, ok := find(m.bench, reference)
				if ratio := better(r.Median, other.Median, m.lowerBetter); ok && t.name != reference && ratio > 0 {
					ratios = append(ratios, fmt.Sprintf("%.2f", ratio))
				} else {
					ratios = append(ratios, "–")
				}
			}
			line += " (" + strings.Join(ratios, ", ") + ") |"
		}
		if unit != "" {
			fmt.Fprintf(&b, "| %s, %s |%s\n", m.title, unit, line)
		}
	}
	return b.String()
}

// better is how many times better a is than b, or 0 if that has no answer.
func better(a, b float64, lowerBetter bool) float64 {
	if lowerBetter {
		a, b = b, a
	}
	if ratio := a / b; a > 0 && b > 0 && !math.IsInf(ratio, 0) {
		return ratio
	}
	return 0
}

// number is a number with three digits that count.
func number(v float64) string {
	if math.Abs(v) >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}
