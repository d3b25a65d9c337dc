package author

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	yamlnode "go.yaml.in/yaml/v3"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// document is one document of a manifest, read twice: once by the parser that kubectl uses, for what it means, and once by one that says
// where everything stands. Where the two could disagree, rewrite finds out: it reads its own output by the first and compares.
type document struct {
	number int // from 1, for people
	start  int // offset of text in the manifest
	text   []byte
	lines  []int          // offsets of the lines in text, as YAML counts them
	root   *yamlnode.Node // a mapping; nil for a document without content
	value  map[string]any // what it means
}

var bom = []byte("\xef\xbb\xbf")

// parse reads a manifest: YAML documents, or JSON, which is YAML.
func parse(manifest []byte) ([]*document, error) {
	if len(manifest) > MaxManifest {
		return nil, fmt.Errorf("manifest of %d bytes is longer than %d: %w", len(manifest), MaxManifest, errdefs.ErrInvalidArgument)
	}
	if !utf8.Valid(manifest) {
		return nil, fmt.Errorf("manifest is not UTF-8: %w", errdefs.ErrInvalidArgument)
	}
	parts, err := split(manifest)
	if err != nil {
		return nil, err
	}
	var documents []*document
	for i, part := range parts {
		d := &document{number: i + 1, start: part.start, text: manifest[part.start:part.end]}
		if err := d.read(); err != nil {
			return nil, fmt.Errorf("document %d: %w: %w", d.number, err, errdefs.ErrInvalidArgument)
		}
		documents = append(documents, d)
	}
	return documents, nil
}

type span struct{ start, end int }

// split finds the documents of a manifest as kubectl does: by lines of three dashes. What YAML allows beyond that and kubectl
// reads otherwise, or not at all, is refused.
func split(manifest []byte) ([]span, error) {
	var parts []span
	start, at, ended := 0, 0, false
	for line := range bytes.Lines(manifest) {
		next := at + len(line)
		rest, separator := bytes.CutPrefix(line, []byte("---"))
		end, marker := bytes.CutPrefix(line, []byte("..."))
		content := bytes.TrimSpace(line)
		switch {
		case separator && (len(rest) == 0 || bytes.ContainsAny(rest[:1], " \t\r\n")):
			if rest = bytes.TrimSpace(rest); len(rest) > 0 && rest[0] != '#' {
				return nil, fmt.Errorf("document %d: kubectl drops what stands behind its ---; put it on the next line: %w", len(parts)+2, errdefs.ErrInvalidArgument)
			}
			parts, start, ended = append(parts, span{start, at}), next, false
		case marker && len(bytes.TrimSpace(end)) == 0:
			ended = true
		case ended && len(content) > 0 && content[0] != '#':
			return nil, fmt.Errorf("document %d: kubectl drops what follows after ...; separate documents with ---: %w", len(parts)+1, errdefs.ErrInvalidArgument)
		}
		at = next
	}
	return append(parts, span{start, len(manifest)}), nil
}

func (d *document) read() error {
	decoder := yamlnode.NewDecoder(bytes.NewReader(d.text))
	var node yamlnode.Node
	switch err := decoder.Decode(&node); {
	case errors.Is(err, io.EOF):
		return nil // only comments
	case err != nil:
		return fmt.Errorf("%s", oneLine(err))
	}
	if err := decoder.Decode(&yamlnode.Node{}); !errors.Is(err, io.EOF) {
		return errors.New("holds more than one document; separate documents with a line of three dashes")
	}
	var err error
	if d.value, err = meaning(d.text); err != nil || d.value == nil {
		return err
	}
	if len(node.Content) != 1 || node.Content[0].Kind != yamlnode.MappingNode {
		return errors.New("is not an object with fields")
	}
	d.root, d.lines = node.Content[0], lines(d.text)
	return nil
}

// meaning reads a document as kubectl does, but refuses repeated keys. It is nil for a document without content.
func meaning(text []byte) (map[string]any, error) {
	b, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, fmt.Errorf("%s", oneLine(err))
	}
	var value any
	if err := strictjson.UnmarshalCaseSensitivePreserveInts(b, &value); err != nil {
		return nil, fmt.Errorf("%s", oneLine(err))
	}
	if value == nil {
		return nil, nil
	}
	object, ok := value.(map[string]any)
	if !ok {
		return nil, errors.New("is not an object with fields")
	}
	return object, nil
}

// lines gives the offsets at which lines begin. YAML 1.1 breaks lines at more characters than \n.
func lines(text []byte) []int {
	offsets := []int{0}
	if bytes.HasPrefix(text, bom) {
		offsets[0] = len(bom)
	}
	for i := offsets[0]; i < len(text); {
		r, size := utf8.DecodeRune(text[i:])
		i += size
		switch r {
		case '\r':
			if i < len(text) && text[i] == '\n' {
				i++
			}
			fallthrough
		case '\n', '\u0085', '\u2028', '\u2029':
			offsets = append(offsets, i)
		}
	}
	return offsets
}

// offset is where in the text a node begins.
func (d *document) offset(n *yamlnode.Node) (int, error) {
	if n.Line < 1 || n.Line > len(d.lines) {
		return 0, fmt.Errorf("line %d: cannot be found again", n.Line)
	}
	at := d.lines[n.Line-1]
	for range n.Column - 1 {
		if at >= len(d.text) {
			return 0, fmt.Errorf("line %d: column %d cannot be found again", n.Line, n.Column)
		}
		_, size := utf8.DecodeRune(d.text[at:])
		at += size
	}
	return at, nil
}

// nextLine is where the line after a node's first begins.
func (d *document) nextLine(n *yamlnode.Node) int {
	if n.Line < len(d.lines) {
		return d.lines[n.Line]
	}
	return len(d.text)
}

// object is one Kubernetes object of a manifest.
type object struct {
	document *document
	path     fieldPath // to the object
	value    map[string]any
	kind     string
	template fieldPath // to what has a pod's metadata and spec; nil for objects without
}

// fieldPath leads to a value in a document: keys and indices.
type fieldPath []any

func (p fieldPath) with(steps ...any) fieldPath { return append(p[:len(p):len(p)], steps...) }

// String is the path as Kubernetes writes one.
func (p fieldPath) String() string {
	var b strings.Builder
	for _, step := range p {
		switch step := step.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", step)
		case string:
			if b.Len() > 0 {
				b.WriteByte('.')
			}
			b.WriteString(step)
		}
	}
	return b.String()
}

// templates says where objects have their pod templates, by API group and kind.
var templates = map[[2]string]fieldPath{
	{"", "Pod"}:                   {},
	{"", "PodTemplate"}:           {"template"},
	{"", "ReplicationController"}: {"spec", "template"},
	{"apps", "Deployment"}:        {"spec", "template"},
	{"apps", "StatefulSet"}:       {"spec", "template"},
	{"apps", "DaemonSet"}:         {"spec", "template"},
	{"apps", "ReplicaSet"}:        {"spec", "template"},
	{"batch", "Job"}:              {"spec", "template"},
	{"batch", "CronJob"}:          {"spec", "jobTemplate", "spec", "template"},
}

// objects are the objects of a document: one, or those of a List.
func (d *document) objects() ([]object, error) {
	if d.value == nil {
		return nil, nil
	}
	return d.objectsAt(fieldPath{}, d.value)
}

func (d *document) objectsAt(at fieldPath, value map[string]any) ([]object, error) {
	fail := func(format string, args ...any) ([]object, error) {
		where := fmt.Sprintf("document %d", d.number)
		if len(at) > 0 {
			where += ": " + at.String()
		}
		return nil, fmt.Errorf("%s: %s: %w", where, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	kind, _ := value["kind"].(string)
	version, _ := value["apiVersion"].(string)
	if kind == "" || version == "" {
		return fail("has no kind or no apiVersion, and so is no Kubernetes object")
	}
	group, _, found := strings.Cut(version, "/")
	if !found {
		group = ""
	}
	if group == "extensions" { // where kinds of apps were before Kubernetes 1.16
		group = "apps"
	}
	if !strings.HasSuffix(kind, "List") || value["items"] == nil {
		o := object{document: d, path: at, value: value, kind: kind}
		if steps, ok := templates[[2]string{group, kind}]; ok {
			o.template = at.with(steps...)
		}
		return []object{o}, nil
	}
	items, ok := value["items"].([]any)
	if !ok {
		return fail("items is no list")
	}
	var objects []object
	for i, item := range items {
		entry, ok := item.(map[string]any)
		if !ok {
			return fail("items[%d] is no object", i)
		}
		if len(at) > 8 {
			return fail("lists are nested too deep")
		}
		found, err := d.objectsAt(at.with("items", i), entry)
		if err != nil {
			return nil, err
		}
		objects = append(objects, found...)
	}
	return objects, nil
}

// podSpec finds what looks like a pod's specification in an object of any kind: a list of containers with images. It is nil if there is none.
func podSpec(value any) fieldPath {
	switch value := value.(type) {
	case map[string]any:
		containers, _ := value["containers"].([]any)
		for _, c := range containers {
			if c, ok := c.(map[string]any); ok && c["image"] != nil {
				return fieldPath{}
			}
		}
		for _, key := range slices.Sorted(maps.Keys(value)) {
			if at := podSpec(value[key]); at != nil {
				return append(fieldPath{key}, at...)
			}
		}
	case []any:
		for i, entry := range value {
			if at := podSpec(entry); at != nil {
				return append(fieldPath{i}, at...)
			}
		}
	}
	return nil
}

// name is the object's kind and name, and its place where it has none.
func (o object) name() string {
	metadata, _ := o.value["metadata"].(map[string]any)
	for _, key := range []string{"name", "generateName"} {
		if name, _ := metadata[key].(string); name != "" {
			return o.kind + "/" + strings.Trim(strconv.QuoteToASCII(name), `"`)
		}
	}
	return fmt.Sprintf("%s in document %d", o.kind, o.document.number)
}

// at is the value at a path below the object's document; nil if there is none.
func (d *document) at(p fieldPath) any {
	var value any = d.value
	for _, step := range p {
		switch step := step.(type) {
		case int:
			list, _ := value.([]any)
			if step >= len(list) {
				return nil
			}
			value = list[step]
		case string:
			object, _ := value.(map[string]any)
			value = object[step]
		}
	}
	return value
}

// decode reads a value into one of Kubernetes' types. unknown are the fields that the type has not.
func decode(value any, into any) (unknown []string, err error) {
	b, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	strict, err := strictjson.UnmarshalStrict(b, into)
	if err != nil {
		return nil, err
	}
	for _, s := range strict {
		unknown = append(unknown, s.Error())
	}
	return unknown, nil
}

// oneLine makes a parser's error fit for a one-line message; it can hold pieces of the manifest.
func oneLine(err error) string {
	s := strings.Join(strings.Fields(err.Error()), " ")
	return strings.TrimPrefix(strings.TrimPrefix(s, "error converting YAML to JSON: "), "yaml: ")
}
