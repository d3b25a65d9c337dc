package author

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/policy"
)

// sealedPod is sealed_pod as this package writes it.
type sealedPod struct {
	Containers map[string]policy.Container
	Volumes    map[string]policy.Volume
}

// The lines around what this package writes into a policy. Between them it writes anew each time.
const (
	blockBegin = "# sealvol policy: begin. Written by `sealvol policy`, which overwrites what stands here.\n"
	blockEnd   = "# sealvol policy: end.\n"
)

// merge puts sealed_pod into the policy that is there. Of that, every byte outside the block stays.
func merge(ctx context.Context, there string, pod sealedPod) (string, error) {
	block := pod.block()
	alone := "package agent_policy\n\n" + block
	if there == "" {
		return alone, nil
	}
	merged, err := insert(ctx, there, block)
	if err != nil {
		return "", err
	}
	return merged, sameMeaning(ctx, merged, alone)
}

// sameMeaning fails unless the guest reads the same sealed_pod from a merged policy as from ours alone. Text around the block can begin a
// string that swallows it, or go on where it ends ("else := …").
func sameMeaning(ctx context.Context, merged, alone string) error {
	want, err := policy.Load(ctx, []byte(alone))
	if err != nil {
		return err
	}
	got, err := policy.Load(ctx, []byte(merged))
	if err != nil {
		return fmt.Errorf("annotation %s: with the policy that is there: %w", Annotation, err)
	}
	if !got.Sealed() || !reflect.DeepEqual(got.Containers(), want.Containers()) || !reflect.DeepEqual(got.Volumes(), want.Volumes()) {
		return fmt.Errorf("annotation %s: the policy that is there changes what sealvol's block says; remove it, or the whole annotation: %w", Annotation, errdefs.ErrInvalidArgument)
	}
	return nil
}

// insert puts the block in place of an older one, or at the end.
func insert(ctx context.Context, there, block string) (string, error) {
	before, rest, found := strings.Cut(there, blockBegin)
	if !found {
		if sealed, err := sealedByHand(ctx, there); err != nil {
			return "", err
		} else if sealed {
			return "", fmt.Errorf("annotation %s: holds a sealed_pod that was written by hand; remove it, or the whole annotation: %w", Annotation, errdefs.ErrFailedPrecondition)
		}
		return strings.TrimRight(there, "\n") + "\n\n" + block, nil
	}
	_, after, found := strings.Cut(rest, blockEnd)
	if !found || strings.Contains(before+after, blockBegin) || strings.Contains(before+after, blockEnd) {
		return "", fmt.Errorf("annotation %s: the marks of sealvol's block do not stand in pairs; remove the annotation: %w", Annotation, errdefs.ErrInvalidArgument)
	}
	if sealed, err := sealedByHand(ctx, before+after); err != nil {
		return "", err
	} else if sealed {
		return "", fmt.Errorf("annotation %s: holds a second sealed_pod, outside of sealvol's block; remove it: %w", Annotation, errdefs.ErrFailedPrecondition)
	}
	return before + block + after, nil
}

// sealedByHand reports whether a policy without this package's block has a sealed_pod.
func sealedByHand(ctx context.Context, text string) (bool, error) {
	if !strings.Contains(text, "sealed_pod") {
		return false, nil
	}
	p, err := policy.Load(ctx, []byte(text))
	if err != nil {
		return false, fmt.Errorf("annotation %s: the policy that is there: %w", Annotation, err)
	}
	return p.Sealed(), nil
}

func (p sealedPod) block() string {
	return blockBegin + "sealed_pod := " + p.literal() + "\n" + blockEnd
}

// literal is sealed_pod as JSON, for people: a line for each field of a container or volume.
func (p sealedPod) literal() string {
	containers := members{indent: "  "}
	for _, name := range slices.Sorted(maps.Keys(p.Containers)) {
		c := p.Containers[name]
		fields := members{indent: "    "}
		if c.Args != nil {
			fields.add("args", inline(c.Args))
		}
		if c.Image != "" {
			fields.add("image", inline(c.Image))
		}
		if c.Exec != nil {
			fields.add("exec", list(c.Exec, "      "))
		}
		fields.add("rootfs", inline(c.RootFS))
		containers.add(name, fields.object())
	}
	volumes := members{indent: "  "}
	for _, name := range slices.Sorted(maps.Keys(p.Volumes)) {
		v := p.Volumes[name]
		fields := members{indent: "    "}
		fields.add("mode", inline(v.Mode))
		fields.add("layering", inline(v.Layering))
		fields.add("suites", inline(v.Suites))
		fields.add("fs_type", inline(v.FSType))
		fields.add("options", inline(v.Options))
		fields.add("size", inline(v.Size))
		if v.FSGroup != nil {
			fields.add("fs_group", inline(v.FSGroup))
		}
		fields.add("mounts", list(v.Mounts, "      "))
		volumes.add(name, fields.object())
	}
	pod := members{}
	pod.add("version", "1")
	pod.add("containers", containers.object())
	pod.add("volumes", volumes.object())
	return pod.object()
}

// members are those of a JSON object that is written with one member a line.
type members struct {
	indent string // of the object
	lines  []string
}

func (m *members) add(key, value string) {
	m.lines = append(m.lines, m.indent+"  "+inline(key)+": "+value)
}

func (m *members) object() string {
	return "{\n" + strings.Join(m.lines, ",\n") + "\n" + m.indent + "}"
}

// list is a JSON array with one element a line, or on one line if it has only one.
func list[T any](elements []T, indent string) string {
	if len(elements) == 1 {
		return inline(elements)
	}
	var lines []string
	for _, e := range elements {
		lines = append(lines, indent+"  "+inline(e))
	}
	return "[\n" + strings.Join(lines, ",\n") + "\n" + indent + "]"
}

// inline writes a value as JSON on one line, with a space behind each comma and colon.
func inline(value any) string {
	var compact bytes.Buffer
	encoder := json.NewEncoder(&compact)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		panic(err) // of strings and numbers
	}
	var b strings.Builder
	quoted, escaped := false, false
	for _, c := range bytes.TrimSuffix(compact.Bytes(), []byte("\n")) {
		b.WriteByte(c)
		switch {
		case escaped:
			escaped = false
		case c == '\\':
			escaped = true
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ',' || c == ':'):
			b.WriteByte(' ')
		}
	}
	return b.String()
}
