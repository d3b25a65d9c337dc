package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// targets are what is compared. The first three are what ours are measured against.
func targets(testbed string) []target {
	return []target{
		plain("raw", raw),
		plain("dm-crypt", dmCrypt),
		plain("cdh-luks2", cdh),
		sealed(testbed, "memory-tags", "aegis128-random"),
		sealed(testbed, "memory-tags", "aes-xts-random+hmac-sha256"),
		sealed(testbed, "memory-tags", "aes-xts-plain64+hmac-sha256"),
		sealed(testbed, "luks2", "aes-xts-plain64+hmac-sha256"),
	}
}

// extent is how much is measured.
type extent struct {
	warm       bool // what takes longer the first time is done once before
	passes     int
	fill       int64 // bytes of the file that is used, on a disk of 1 GiB
	sequential int   // seconds for each access
	random     int   // likewise
	scattered  int64 // bytes of scattered writes
}

var (
	whole = extent{warm: true, passes: 3, fill: 512 << 20, sequential: 3, random: 2, scattered: 16 << 20}
	// quick is for work on the benchmark itself (SEALVOL_BENCH_QUICK=1). Its numbers are not to be shown to anyone.
	quick = extent{passes: 1, fill: 128 << 20, sequential: 1, random: 1, scattered: 1 << 20}
)

const (
	gib = 1 << 30
	// scatteredOver is the size of the file for scattered writes, on a disk of 10 GiB.
	scatteredOver = 8 * gib
	openTimeout   = 5 * time.Minute // cryptsetup's key derivation takes its time where the processor is emulated
	closeTimeout  = time.Minute
)

// benchSealing compares ways to make a volume of a disk, in passes over all of them, so that what changes meanwhile changes for each.
func benchSealing(testbed, output string) error {
	ctx := context.Background()
	e := whole
	if os.Getenv("SEALVOL_BENCH_QUICK") != "" {
		e = quick
	}
	disks, err := findDisks(3)
	if err != nil {
		return err
	}
	s := sealing{extent: e, samples: samples{}, small: disks[0], medium: disks[1], large: disks[2]}
	began := time.Now()
	if e.warm {
		if err := s.warmUp(ctx, targets(testbed)); err != nil {
			return err
		}
	}
	for pass := range e.passes {
		all := targets(testbed)
		for i := range all {
			t := all[(pass+i)%len(all)] // none is always the first
			progress("%4.0f s: pass %d of %d, %s", time.Since(began).Seconds(), pass+1, e.passes, t.name)
			if err := s.measure(ctx, t); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
		}
	}
	inUse, err := implementations("aegis128", "xts(aes)", "sha256")
	if err != nil {
		return err
	}
	results := s.samples.summarise()
	if err := write(output, results); err != nil {
		return err
	}
	fmt.Printf("%s\nThe kernel's ciphers: %s.\n", compare(results, targets(testbed)), strings.Join(inUse, ", "))
	return nil
}

// add adds a value of one target.
type add func(bench, unit string, value float64)

// sealing is one run.
type sealing struct {
	extent
	samples
	small, medium, large disk // 1, 10, 100 GiB
}

// warmUp does once, without counting it, what takes longer the first time: the machine loads modules and programs, its host makes room
// for the disk.
func (s *sealing) warmUp(ctx context.Context, all []target) error {
	progress("the host allocates the small disk")
	if _, err := command(ctx, nil, "fio", "--name=allocate", "--filename="+s.small.node(), "--rw=write", "--bs=1M", "--direct=1"); err != nil {
		return err
	}
	for _, t := range all {
		ready, err := s.with(ctx, t, s.small, func(*volume) error { return nil })
		if err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
		progress("%s: ready in %.2f s the first time", t.name, ready.Seconds())
	}
	return nil
}

// with calls do with a volume, and gives the time that it took to make it.
func (s *sealing) with(ctx context.Context, t target, d disk, do func(v *volume) error) (ready time.Duration, err error) {
	v := &volume{}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		err = errors.Join(err, v.close(ctx))
	}()
	open, err := t.start(ctx, v)
	if err != nil {
		return 0, err
	}
	if v.before, err = available(); err != nil {
		return 0, err
	}
	limited, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if ready, err = open(limited, d); err != nil {
		return 0, err
	}
	return ready, do(v)
}

// measure makes all measurements of one target once.
func (s *sealing) measure(ctx context.Context, t target) error {
	add := func(bench, unit string, value float64) { s.add(bench, t.name, unit, value) }
	ready, err := s.with(ctx, t, s.small, func(v *volume) error { return s.use(ctx, s.small, v, add) })
	if err != nil {
		return err
	}
	add("ready_1g", "s", ready.Seconds())
	undo, err := countPages()
	if err != nil {
		return err
	}
	ready, err = s.with(ctx, t, s.medium, func(v *volume) error { return s.remember(ctx, v, add) })
	if err = errors.Join(err, undo()); err != nil {
		return err
	}
	add("ready_10g", "s", ready.Seconds())
	ready, err = s.with(ctx, t, s.large, func(v *volume) error { return nil })
	if err != nil {
		return err
	}
	add("ready_100g", "s", ready.Seconds())
	return nil
}

// use measures what reading and writing a file costs.
func (s *sealing) use(ctx context.Context, d disk, v *volume, add add) error {
	if _, err := v.fio(ctx, s.fill, fill); err != nil {
		return err
	}
	for _, a := range []struct {
		bench  string
		access access
		add    func(m measured, written float64)
	}{
		{"seq_write", access{pattern: "write", block: "1M", depth: 4, seconds: s.sequential}, func(m measured, written float64) {
			add("seq_write", "MB/s", m.Bandwidth/1e6)
			add("write_amplification_seq", "bytes/byte", written/m.Bytes)
			add("cpu_seconds_per_gib", "s/GiB", m.cpuSeconds/m.Bytes*gib)
		}},
		{"seq_read", access{pattern: "read", block: "1M", depth: 4, seconds: s.sequential}, func(m measured, _ float64) {
			add("seq_read", "MB/s", m.Bandwidth/1e6)
			add("cpu_seconds_per_gib_read", "s/GiB", m.cpuSeconds/m.Bytes*gib)
		}},
		{"rand_write_qd16", access{pattern: "randwrite", block: "4k", depth: 16, seconds: s.random}, func(m measured, written float64) {
			add("rand_write_qd16", "1/s", m.IOPS)
			add("write_amplification_rand", "bytes/byte", written/m.Bytes)
		}},
		{"rand_read_qd16", access{pattern: "randread", block: "4k", depth: 16, seconds: s.random}, func(m measured, _ float64) {
			add("rand_read_qd16", "1/s", m.IOPS)
		}},
		{"rand_write_qd1", access{pattern: "randwrite", block: "4k", depth: 1, seconds: s.random}, func(m measured, _ float64) {
			add("rand_write_qd1", "1/s", m.IOPS)
		}},
		{"rand_read_qd1", access{pattern: "randread", block: "4k", depth: 1, seconds: s.random}, func(m measured, _ float64) {
			add("rand_read_qd1", "1/s", m.IOPS)
		}},
		{"fsync", access{pattern: "randwrite", block: "4k", depth: 1, seconds: s.random, sync: true}, func(m measured, _ float64) {
			add("fsync_p50", "ms", m.syncP50/1e6)
			add("fsync_p99", "ms", m.syncP99/1e6)
		}},
	} {
		before, err := d.written()
		if err != nil {
			return err
		}
		m, err := v.fio(ctx, s.fill, a.access)
		if err != nil {
			return fmt.Errorf("%s: %w", a.bench, err)
		}
		unix.Sync()
		after, err := d.written()
		if err != nil {
			return err
		}
		a.add(m, after-before)
	}
	return nil
}

// fill writes all of a file.
var fill = access{pattern: "write", block: "1M", depth: 4}

// remember measures what guest memory a volume takes: when it is new, when a file is written from beginning to end, and when blocks are
// written here and there.
func (s *sealing) remember(ctx context.Context, v *volume, add add) error {
	before, err := available()
	if err != nil {
		return err
	}
	add("guest_bytes_per_volume", "bytes", v.before-before)
	err = v.tagged(ctx, func() (float64, error) {
		m, err := v.fio(ctx, s.fill, fill)
		return m.Bytes, err
	}, func(tagBytesPerGiB float64) { add("guest_bytes_per_gib", "bytes/GiB", tagBytesPerGiB) })
	if err != nil {
		return err
	}
	after, err := available()
	if err != nil {
		return err
	}
	add("guest_available_per_gib", "bytes/GiB", (before-after)/float64(s.fill)*gib)
	if v.tags == nil {
		return nil
	}
	f, err := os.Create(filepath.Join(v.dir, "data"))
	if err != nil {
		return err
	}
	// Allocated, so that each block has its place on the disk already, and that is not beside the one that was written before.
	if err := errors.Join(os.NewSyscallError("fallocate", unix.Fallocate(int(f.Fd()), 0, 0, scatteredOver)), f.Close()); err != nil {
		return err
	}
	return v.tagged(ctx, func() (float64, error) {
		m, err := v.fio(ctx, scatteredOver, access{pattern: "randwrite", block: "4k", depth: 16, bytes: s.scattered})
		return m.Bytes, err
	}, func(tagBytesPerGiB float64) { add("guest_bytes_per_gib_random", "bytes/GiB", tagBytesPerGiB) })
}

// tagged calls do, which gives the bytes that it wrote, and then add, if the volume keeps tags in guest memory.
func (v *volume) tagged(ctx context.Context, do func() (written float64, err error), add func(tagBytesPerGiB float64)) error {
	if v.tags == nil {
		_, err := do()
		return err
	}
	before, err := v.tags(ctx)
	if err != nil {
		return err
	}
	written, err := do()
	if err != nil {
		return err
	}
	unix.Sync()
	after, err := v.tags(ctx)
	if err != nil {
		return err
	}
	add((after - before) / written * gib)
	return nil
}
