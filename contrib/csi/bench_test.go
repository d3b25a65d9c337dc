package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkVolume is a volume's whole life, call by call over the socket: make,
// stage, publish, unpublish, unstage, delete. The inline one has two calls.
func BenchmarkVolume(b *testing.B) {
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
	for {
		if _, err := os.Stat(c.socket); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	driver := connect(b, c.socket, true)
	for _, v := range volumes(dir) {
		if v.block { // needs root
			continue
		}
		b.Run(v.id, func(b *testing.B) {
			calls := append(v.up(driver), v.down(driver)...)
			for b.Loop() {
				for _, call := range calls {
					if err := call(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "volumes/s")
		})
	}
}
