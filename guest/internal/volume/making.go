package volume

import (
	"context"

	"github.com/sealvol/sealvol/guest/internal/filesystem"
)

// making is a file system that is being made in memory, while the mappings below it are set up.
type making struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when image and err are there
	image  image
	err    error
}

func startMaking(ctx context.Context, systems fileSystems, fs filesystem.Type, size uint64) *making {
	ctx, cancel := context.WithCancel(ctx)
	m := &making{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(m.done)
		m.image, m.err = systems.Make(ctx, fs, size)
	}()
	return m
}

// copyTo waits for the file system and copies it.
func (m *making) copyTo(ctx context.Context, node string) error {
	<-m.done // ends with ctx
	if m.err != nil {
		return m.err
	}
	return m.image.CopyTo(ctx, node)
}

// close ends the making, if it has not ended, and frees the image.
func (m *making) close() {
	m.cancel()
	<-m.done
	if m.err == nil {
		m.image.Close()
	}
}
