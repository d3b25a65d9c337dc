package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkCSI is the life of volumes one after the other, over the driver's socket,
// with its state on the disk of the folder for temporary files: create is one call,
// publish kubelet's two, and delete the three that end a volume. An inline volume
// has one call to begin and one to end.
func BenchmarkCSI(b *testing.B) {
	dir, err := os.MkdirTemp("", "") // short, for the socket's path
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	c := defaultConfig()
	c.socket, c.volumes, c.published, c.bundles = filepath.Join(dir, "csi.sock"), filepath.Join(dir, "volumes"), filepath.Join(dir, "published"), filepath.Join(dir, "bundles")
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, c, "node-1", slog.New(slog.DiscardHandler)) }()
	b.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			b.Error(err)
		}
	})
	driver := connect(b, c.socket, true)
	for _, v := range volumes(dir) {
		if v.block { // needs loop devices
			continue
		}
		steps := []struct {
			name  string
			calls []func(context.Context) error
		}{{"create", v.up(driver)[:1]}, {"publish", v.up(driver)[1:]}, {"delete", v.down(driver)}}
		kind := "claim"
		if v.inline {
			kind = "inline"
		}
		b.Run(kind, func(b *testing.B) {
			took := make([]time.Duration, len(steps))
			for b.Loop() {
				for i, step := range steps {
					began := time.Now()
					for _, call := range step.calls {
						if err := call(b.Context()); err != nil {
							b.Fatal(err)
						}
					}
					took[i] += time.Since(began)
				}
			}
			for i, step := range steps {
				if len(step.calls) > 0 {
					b.ReportMetric(float64(b.N)/took[i].Seconds(), step.name+"-1/s")
				}
			}
		})
	}
}
