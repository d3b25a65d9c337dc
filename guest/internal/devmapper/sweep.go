package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

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
// the others. These are errdefs.ErrUnavailable where a disk did not answer until ctx was over.
//
// It is for mappings whose owner was killed, or could not remove them. Nothing of what was not written yet is written.
func (c *Control) Sweep(ctx context.Context, prefix string) ([]Swept, error) {
	stack, err := c.stack(prefix)
	if err != nil {
		return nil, err
	}
	var swept []Swept
	var errs []error
	// First no disk is used any more. What follows would wait for one that does not answer, and dm-integrity in a way that nothing
	// interrupts.
	hangs := map[string]bool{}
	for _, level := range slices.Backward(stack) { // lowest first
		if level.isLowest {
			if err := c.fail(ctx, level.Name); err != nil && !errors.Is(err, unix.ENXIO) {
				hangs[level.Name] = true
				errs = append(errs, err)
			}
		}
		for _, below := range level.below {
			hangs[level.Name] = hangs[level.Name] || hangs[below]
		}
	}
	for _, level := range stack {
		if hangs[level.Name] && level.kind == (Integrity{}).kind() {
			errs = append(errs, fmt.Errorf("mapping %s waits for its disk: %w", level.Name, errdefs.ErrUnavailable))
			continue
		}
		held, err := c.Kill(ctx, level.Name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		swept = append(swept, Swept{Name: level.Name, Held: held})
	}
	if err := c.removeLinks(prefix); err != nil {
		errs = append(errs, err)
	}
	return swept, oneLine(errs)
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

// oneLine is errors.Join without line breaks.
func oneLine(errs []error) (all error) {
	for _, err := range errs {
		if all == nil {
			all = err
		} else {
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}
