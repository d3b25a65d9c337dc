package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sealvol/sealvol/integration/testbed"
)

// sealed is a volume of ours, sealed by the guest's own code. One acquisition makes it, which is what a container waits for.
func sealed(program, layering, suite string) target {
	const name = "bench"
	return target{layering + "/" + suite, func(_ context.Context, v *volume) (open, error) {
		policy, err := testbed.Policy(map[string]testbed.Volume{name: {
			Layering: layering, Suites: []string{suite}, FSType: "ext4", Options: []string{"nosuid", "nodev", "noatime"}, Max: 1 << 40,
		}})
		if err != nil {
			return nil, err
		}
		dir, err := os.MkdirTemp("", "bench-")
		if err != nil {
			return nil, err
		}
		v.onClose(func(context.Context) error { return os.RemoveAll(dir) })
		bed, err := testbed.Start(testbed.Config{Program: program, Dir: dir, Policy: policy, Log: io.Discard})
		if err != nil {
			return nil, err
		}
		v.onClose(func(context.Context) error { return bed.Close() })
		// It answers when it has started, so that its start does not count.
		if _, err := bed.Status(); err != nil {
			return nil, err
		}
		return func(ctx context.Context, d disk) (time.Duration, error) {
			began := time.Now()
			if err := bed.Acquire(ctx, name, name, d.path); err != nil {
				return 0, err
			}
			ready := time.Since(began)
			v.onClose(func(ctx context.Context) error { return bed.Release(ctx, name) })
			status, err := bed.Volume(name)
			if err != nil {
				return 0, err
			}
			if status.Suite != suite || status.Layering != layering {
				return 0, fmt.Errorf("not what was asked for: %v", status)
			}
			if v.dir, err = bed.Attach(name); err != nil {
				return 0, err
			}
			v.onClose(func(context.Context) error { return bed.Detach(name) })
			v.tags = func(context.Context) (float64, error) {
				status, err := bed.Volume(name)
				if err != nil {
					return 0, err
				}
				if status.Counters == nil {
					return 0, errors.New("the volume's status has no counters")
				}
				return float64(status.Counters.TagBytes), nil
			}
			return ready, nil
		}, nil
	}}
}
