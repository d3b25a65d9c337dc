package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Swept is a mapping that Sweep ended.
type Swept struct {
	Name string
	Held bool // somebody has it open still, and gets errors from it
}

// Sweep ends all mappings whose name begins with prefix, and removes their links. None of them gives or takes data afterwards, their keys are
// overwritten, and what they were made of, other than disks, is free. It does this to all of which it can, and then tells the errors of
// the others. These are errdefs.ErrUnavailable where a disk does not answer; those mappings fail as soon as it does, and another Sweep
// removes them.
//
// It is for mappings whose owner was killed, or could not remove them. What was not written yet is not written. An empty prefix is
// errdefs.ErrInvalidArgument: the guest's root may be a mapping.
func (c *Control) Sweep(ctx context.Context, prefix string) ([]Swept, error) {
	if prefix == "" {
		return nil, fmt.Errorf("sweep of all mappings: %w", errdefs.ErrInvalidArgument)
	}
	stack, err := c.stack(prefix)
	if err != nil {
		return nil, err
	}
	s := &sweep{control: c, hangs: map[string]bool{}}
	// First no disk is used any more. What follows would wait for one that does not answer, dm-integrity for as long as it takes.
	lowest := slices.DeleteFunc(slices.Clone(stack), func(l layer) bool { return !l.isLowest })
	half, cancel := halfTime(ctx)
	defer cancel()
	s.cutOff(half, lowest)
	for _, l := range slices.Backward(stack) {
		s.hangs[l.Name] = s.hangs[l.Name] || slices.ContainsFunc(l.below, func(name string) bool { return s.hangs[name] })
	}
	var waiting sync.WaitGroup
	for _, l := range stack {
		switch {
		case !s.hangs[l.Name]:
			s.kill(ctx, l.Name)
		case l.kind == (Integrity{}).kind():
			s.fails(fmt.Errorf("mapping %s waits for its disk: %w", l.Name, errdefs.ErrUnavailable))
		case !l.isLowest:
			waiting.Go(func() { s.kill(ctx, l.Name) })
		}
	}
	waiting.Wait()
	if err := c.removeLinks(prefix); err != nil {
		s.fails(err)
	}
	return s.swept, s.err
}

// sweep is what has become of the mappings.
type sweep struct {
	control *Control

	mu    sync.Mutex
	swept []Swept
	err   error
	hangs map[string]bool // mappings whose disk does not answer
}

// cutOff makes mappings fail, all at once because each may have to wait.
func (s *sweep) cutOff(ctx context.Context, layers []layer) {
	var wg sync.WaitGroup
	for _, l := range layers {
		wg.Go(func() {
			if err := s.control.fail(ctx, l.Name); err != nil && !errors.Is(err, unix.ENXIO) {
				s.fails(err)
				s.mu.Lock()
				defer s.mu.Unlock()
				s.hangs[l.Name] = true
			}
		})
	}
	wg.Wait()
}

func (s *sweep) kill(ctx context.Context, name string) {
	held, err := s.control.Kill(ctx, name)
	if err != nil {
		s.fails(err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.swept = append(s.swept, Swept{Name: name, Held: held})
}

// fails adds an error. Not errors.Join, which breaks lines.
func (s *sweep) fails(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		err = fmt.Errorf("%w; %w", s.err, err)
	}
	s.err = err
}

// halfTime is a context for half of the time that ctx has left.
func halfTime(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Until(deadline)/2)
}

// layer is a mapping and what it stands on.
type layer struct {
	Mapping
	kind     string   // of its live target; empty if it has none
	below    []string // mappings of the same stack that it uses
	isLowest bool     // it uses none
}

// stack returns the mappings whose name begins with prefix, each before those that it uses.
func (c *Control) stack(prefix string) ([]layer, error) {
	all, err := c.List()
	if err != nil {
		return nil, err
	}
	var layers []layer
	names := map[blockdev.Number]string{}
	for _, mapping := range all {
		if strings.HasPrefix(mapping.Name, prefix) {
			layers = append(layers, layer{Mapping: mapping})
			names[mapping.Number] = mapping.Name
		}
	}
	for i := range layers {
		l := &layers[i]
		spec, _, err := c.target(l.Name, 0)
		if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, unix.ENXIO) { // which went meanwhile
			return nil, err
		}
		l.kind = text(spec.Target_type[:])
		numbers, err := c.dependencies(l.Name)
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return nil, err
		}
		for _, number := range numbers {
			if name, ok := names[number]; ok {
				l.below = append(l.below, name)
			}
		}
		l.isLowest = len(l.below) == 0
	}
	return topFirst(layers), nil
}

// topFirst sorts layers so that each comes before those that it uses. The kernel has no circles; if it shows one, its layers come last.
func topFirst(layers []layer) (sorted []layer) {
	for len(layers) > 0 {
		used := map[string]bool{}
		for _, l := range layers {
			for _, below := range l.below {
				used[below] = true
			}
		}
		var left []layer
		for _, l := range layers {
			if used[l.Name] {
				left = append(left, l)
			} else {
				sorted = append(sorted, l)
			}
		}
		if len(left) == len(layers) {
			return append(sorted, left...)
		}
		layers = left
	}
	return sorted
}

// removeLinks removes the links of mappings that are not there any more.
func (c *Control) removeLinks(prefix string) error {
	dir := filepath.Join(c.dev, "mapper")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	left, err := c.List()
	if err != nil {
		return err
	}
	for _, entry := range entries {
		hasName := func(m Mapping) bool { return m.Name == entry.Name() }
		if !strings.HasPrefix(entry.Name(), prefix) || slices.ContainsFunc(left, hasName) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}
