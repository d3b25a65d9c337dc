package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

// access is a way to use the one file of a volume. Where speed is measured the file has been written from its beginning to its end
// before, so that no target has to allocate anything and none reads what was never written; and it is opened with O_DIRECT, but for
// fsync, where the data goes the way that a program's does.
type access struct {
	pattern string // as fio calls it
	block   string
	depth   int
	seconds int   // how long; 0: until bytes are moved
	bytes   int64 // 0: all of the file
	sync    bool  // after each write, buffered
}

// transfer is what fio measured.
type transfer struct {
	Bytes     float64 `json:"io_bytes"`
	Bandwidth float64 `json:"bw_bytes"` // bytes/s
	IOPS      float64 `json:"iops"`
}

type measured struct {
	transfer
	syncP50, syncP99 float64 // nanoseconds
	cpuSeconds       float64 // of the whole machine, without fio's start
}

// fio uses the volume's file, which is made if it is not there.
func (v *volume) fio(ctx context.Context, size int64, a access) (measured, error) {
	dir, err := os.MkdirTemp("", "fio-")
	if err != nil {
		return measured{}, err
	}
	defer os.RemoveAll(dir)
	args := []string{
		"--name=bench", "--output=report.json", "--output-format=json", "--thread", "--ioengine=libaio", "--fallocate=none",
		"--filename=" + filepath.Join(v.dir, "data"), "--size=" + strconv.FormatInt(size, 10),
		"--rw=" + a.pattern, "--bs=" + a.block, "--iodepth=" + strconv.Itoa(a.depth),
		// To the files bench.prerun.txt and bench.postrun.txt.
		"--exec_prerun=cat /proc/stat", "--exec_postrun=cat /proc/stat",
	}
	if a.sync {
		args = append(args, "--direct=0", "--fsync=1")
	} else {
		args = append(args, "--direct=1")
	}
	if a.seconds > 0 {
		args = append(args, "--time_based", "--runtime="+strconv.Itoa(a.seconds))
	}
	if a.bytes > 0 {
		args = append(args, "--io_size="+strconv.FormatInt(a.bytes, 10))
	}
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Dir = dir
	if _, err := output(cmd); err != nil {
		return measured{}, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.json"))
	if err != nil {
		return measured{}, err
	}
	m, err := parseReport(text, a)
	if err != nil {
		return measured{}, err
	}
	before, err := busySeconds(filepath.Join(dir, "bench.prerun.txt"))
	if err != nil {
		return measured{}, err
	}
	after, err := busySeconds(filepath.Join(dir, "bench.postrun.txt"))
	if err != nil {
		return measured{}, err
	}
	m.cpuSeconds = after - before
	return m, nil
}

// parseReport reads what fio reports of an access.
func parseReport(text []byte, a access) (measured, error) {
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write transfer
			Sync        struct {
				Latency struct{ Percentile map[string]float64 } `json:"lat_ns"`
			}
		}
	}
	// It also reports, before, that it ran our commands.
	if err := json.Unmarshal(text[max(0, bytes.IndexByte(text, '{')):], &report); err != nil {
		return measured{}, fmt.Errorf("report of fio: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return measured{}, fmt.Errorf("fio did not do its job: %s", text)
	}
	job := report.Jobs[0]
	m := measured{transfer: job.Write}
	if job.Read.Bytes > 0 {
		m.transfer = job.Read
	}
	if m.Bytes == 0 {
		return measured{}, errors.New("fio moved nothing")
	}
	if a.sync {
		m.syncP50, m.syncP99 = job.Sync.Latency.Percentile["50.000000"], job.Sync.Latency.Percentile["99.000000"]
		if m.syncP50 == 0 || m.syncP99 == 0 {
			return measured{}, errors.New("fio measured no fsync")
		}
	}
	return m, nil
}
