package author

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	yamlnode "go.yaml.in/yaml/v3"
)

// change says that the object at a path, a pod template, gets this value of Annotation.
type change struct {
	template fieldPath
	value    string
}

// edit replaces the bytes from start to end of a document by text.
type edit struct {
	start, end int
	text       string
}

// rewrite makes the changes in the manifest's text, and nothing else.
func rewrite(manifest []byte, documents []*document, changes map[*document][]change) ([]byte, error) {
	var out bytes.Buffer
	at := 0
	for _, d := range documents {
		if len(changes[d]) == 0 {
			continue
		}
		text, err := d.rewrite(changes[d])
		if err != nil {
			return nil, fmt.Errorf("document %d: %w: %w", d.number, err, errdefs.ErrFailedPrecondition)
		}
		out.Write(manifest[at:d.start])
		out.Write(text)
		at = d.start + len(d.text)
	}
	out.Write(manifest[at:])
	return out.Bytes(), nil
}

func (d *document) rewrite(changes []change) ([]byte, error) {
	edits := make([]edit, len(changes))
	for i, c := range changes {
		var err error
		if edits[i], err = d.edit(c); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(edits, func(a, b edit) int { return cmp.Compare(a.start, b.start) })
	var out bytes.Buffer
	at := 0
	for _, e := range edits {
		if e.start < at || e.end < e.start {
			return nil, errors.New("two pod templates stand at one place; write each out")
		}
		out.Write(d.text[at:e.start])
		out.WriteString(e.text)
		at = e.end
	}
	out.Write(d.text[at:])
	return out.Bytes(), d.verify(out.Bytes(), changes)
}

// verify makes sure that the new text means the old one and the changes: whatever this package's understanding of YAML's syntax
// misses, an anchor that is used elsewhere for instance, ends here.
func (d *document) verify(text []byte, changes []change) error {
	got, err := meaning(text)
	if err != nil {
		return fmt.Errorf("the annotation does not fit into its text (%w); write metadata and annotations out, one key a line", err)
	}
	want, err := meaning(d.text) // a copy
	if err != nil {
		return err
	}
	copied := document{value: want}
	for _, c := range changes {
		template, ok := copied.at(c.template).(map[string]any)
		if !ok {
			return fmt.Errorf("%s is no object", c.template)
		}
		metadata := child(template, "metadata")
		child(metadata, "annotations")[Annotation] = c.value
	}
	if !reflect.DeepEqual(got, want) {
		return errors.New("the annotation would change more than its pod: an anchor or merge key uses the same metadata elsewhere; write each metadata out")
	}
	return nil
}

// child is the object under a key, made if there is none.
func child(o map[string]any, key string) map[string]any {
	c, ok := o[key].(map[string]any)
	if !ok {
		c = map[string]any{}
		o[key] = c
	}
	return c
}

// edit finds the place of one change.
func (d *document) edit(c change) (edit, error) {
	node, err := d.node(c.template)
	if err != nil {
		return edit{}, err
	}
	keys := []string{"metadata", "annotations", Annotation}
	place := placement{document: d, mapping: node.value, key: node.key, flow: node.flow}
	for i, key := range keys {
		where := c.template.with(anys(keys[:i+1])...)
		if place.mapping.Kind != yamlnode.MappingNode {
			return edit{}, fmt.Errorf("%s is no object", c.template.with(anys(keys[:i])...))
		}
		place.flow = place.flow || place.mapping.Style&yamlnode.FlowStyle != 0
		k, v, err := entry(place.mapping, key)
		switch {
		case err != nil:
			return edit{}, fmt.Errorf("%s: %w", where, err)
		case k == nil:
			return place.insert(keys[i:], c.value)
		case v.Kind == yamlnode.ScalarNode && key == Annotation:
			return d.replace(v, c.value)
		case v.Kind == yamlnode.ScalarNode && v.Tag == "!!null":
			return place.fill(k, v, keys[i+1:], c.value)
		}
		place = placement{document: d, mapping: v, key: k, flow: place.flow}
	}
	return edit{}, fmt.Errorf("annotation %s is no string", Annotation)
}

func anys(keys []string) []any {
	var steps []any
	for _, k := range keys {
		steps = append(steps, k)
	}
	return steps
}

// found is a node of a document, the key that it stands behind (nil in a list and at the root), and whether it stands inside braces.
type found struct {
	key, value *yamlnode.Node
	flow       bool
}

func (d *document) node(p fieldPath) (found, error) {
	f := found{value: d.root}
	for i, step := range p {
		f.flow = f.flow || f.value.Style&yamlnode.FlowStyle != 0
		switch step := step.(type) {
		case int:
			if f.value.Kind != yamlnode.SequenceNode || step >= len(f.value.Content) {
				return f, fmt.Errorf("%s is not where it is used; write it out", p[:i+1])
			}
			f.key, f.value = nil, f.value.Content[step]
		case string:
			var err error
			if f.key, f.value, err = entry(f.value, step); err != nil {
				return f, fmt.Errorf("%s: %w", p[:i+1], err)
			}
			if f.value == nil {
				return f, fmt.Errorf("%s comes from a merge key; write it out", p[:i+1])
			}
		}
		if f.value.Kind == yamlnode.AliasNode {
			return f, fmt.Errorf("%s is an alias (*%s); write it out", p[:i+1], f.value.Value)
		}
	}
	return f, nil
}

// entry finds a key of a mapping. The key is nil if the mapping has none such.
func entry(mapping *yamlnode.Node, key string) (k, v *yamlnode.Node, err error) {
	if mapping.Kind != yamlnode.MappingNode {
		return nil, nil, errors.New("stands in no object")
	}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		k, v := mapping.Content[i], mapping.Content[i+1]
		if k.Kind == yamlnode.ScalarNode && k.Value == key {
			if v.Kind == yamlnode.AliasNode {
				return nil, nil, fmt.Errorf("is an alias (*%s); write it out", v.Value)
			}
			return k, v, nil
		}
	}
	return nil, nil, nil
}

// placement is a mapping that is to get an entry.
type placement struct {
	document *document
	mapping  *yamlnode.Node
	key      *yamlnode.Node // of the mapping; nil in a list and at the root
	flow     bool
}

// insert makes an entry, nested by keys, the mapping's first.
func (p placement) insert(keys []string, value string) (edit, error) {
	d := p.document
	if p.mapping.Style&yamlnode.FlowStyle != 0 {
		open, err := d.offset(p.mapping)
		if err != nil {
			return edit{}, err
		}
		if open >= len(d.text) || d.text[open] != '{' {
			return edit{}, fmt.Errorf("line %d: no brace stands where its object begins; write it out", p.mapping.Line)
		}
		if len(p.mapping.Content) == 0 {
			return edit{open + 1, open + 1, flow(keys, value)}, nil
		}
		first, err := d.offset(p.mapping.Content[0])
		if err != nil {
			return edit{}, err
		}
		// The first key keeps the white space before it, and so its line.
		space := string(d.text[open+1 : first])
		if strings.TrimSpace(space) != "" || space == "" {
			space = " "
		}
		return edit{first, first, flow(keys, value) + "," + space}, nil
	}
	if len(p.mapping.Content) == 0 {
		return edit{}, fmt.Errorf("line %d: its object is empty; write it as {}", p.mapping.Line)
	}
	first := p.mapping.Content[0]
	if p.key == nil || first.Line == p.key.Line {
		at, err := d.offset(first)
		if err != nil {
			return edit{}, err
		}
		indent := strings.Repeat(" ", first.Column-1)
		return edit{at, at, d.block(keys, value, indent, at) + indent}, nil
	}
	// Below the key, above the comments of the first entry.
	at := d.nextLine(p.key)
	indent := strings.Repeat(" ", first.Column-1)
	return edit{at, at, indent + d.block(keys, value, indent, at)}, nil
}

// fill gives a key that has null an object.
func (p placement) fill(k, v *yamlnode.Node, keys []string, value string) (edit, error) {
	d := p.document
	at, err := d.offset(v)
	if err != nil {
		return edit{}, err
	}
	if written := len(v.Value); written > 0 {
		if !bytes.HasPrefix(d.text[at:], []byte(v.Value)) {
			return edit{}, fmt.Errorf("line %d: null cannot be replaced; write {}", v.Line)
		}
		return edit{at, at + written, "{" + flow(keys, value) + "}"}, nil
	}
	if p.flow {
		return edit{}, fmt.Errorf("line %d: %s has no value; write {}", k.Line, k.Value)
	}
	at = d.nextLine(k)
	indent := strings.Repeat(" ", k.Column-1+2)
	if at > 0 && d.text[at-1] != '\n' && d.text[at-1] != '\r' {
		return edit{at, at, d.lineEnd(at) + indent + strings.TrimRight(d.block(keys, value, indent, at), "\r\n")}, nil
	}
	return edit{at, at, indent + d.block(keys, value, indent, at)}, nil
}

// replace overwrites a string. The text of a string in quotes or of one on a single line can be found; others are refused.
func (d *document) replace(v *yamlnode.Node, value string) (edit, error) {
	start, err := d.offset(v)
	if err != nil {
		return edit{}, err
	}
	text := d.text[start:]
	switch {
	case v.Style&yamlnode.DoubleQuotedStyle != 0 && len(text) > 0 && text[0] == '"':
		for i := 1; i < len(text); i++ {
			switch text[i] {
			case '\\':
				i++
			case '"':
				return edit{start + 1, start + i, value}, nil
			}
		}
	case v.Style&yamlnode.SingleQuotedStyle != 0 && len(text) > 0 && text[0] == '\'':
		for i := 1; i < len(text); i++ {
			if text[i] != '\'' {
				continue
			}
			if i+1 == len(text) || text[i+1] != '\'' {
				return edit{start + 1, start + i, value}, nil
			}
			i++
		}
	case v.Style == 0 && v.Value != "" && bytes.HasPrefix(text, []byte(v.Value)):
		return edit{start, start + len(v.Value), value}, nil
	}
	return edit{}, fmt.Errorf("line %d: the annotation's value is not in quotes nor on one line; write it so", v.Line)
}

// block is nested entries, one a line, and a line end. The first line is not indented.
func (d *document) block(keys []string, value, indent string, near int) string {
	end := d.lineEnd(near)
	var b strings.Builder
	for i, key := range keys {
		if i > 0 {
			b.WriteString(indent + strings.Repeat("  ", i))
		}
		b.WriteString(key + ":")
		if i == len(keys)-1 {
			b.WriteString(" " + value)
		}
		b.WriteString(end)
	}
	return b.String()
}

// lineEnd is how the document ends the line before an offset.
func (d *document) lineEnd(near int) string {
	end := bytes.LastIndexByte(d.text[:near], '\n')
	if end < 0 {
		end = bytes.IndexByte(d.text, '\n')
	}
	if end > 0 && d.text[end-1] == '\r' {
		return "\r\n"
	}
	return "\n"
}

// flow is nested entries inside the braces of the object around them, such that JSON stays JSON.
func flow(keys []string, value string) string {
	var b strings.Builder
	for i, key := range keys {
		if i > 0 {
			b.WriteString("{")
		}
		quoted, _ := json.Marshal(key) // of a constant
		b.Write(quoted)
		b.WriteString(": ")
	}
	b.WriteString(`"` + value + `"` + strings.Repeat("}", len(keys)-1))
	return b.String()
}
