// Package mutation changes a message in one place at a time, for tests of who judges messages: each scalar becomes other values, each
// absent field is set, each element of a list is dropped, doubled and swapped with its neighbour, each entry of a map is dropped, changed
// and joined by others. It is test support, deterministic, and part of no program.
package mutation

import (
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// A Mutation is one change to a message.
type Mutation struct {
	// Path is where, such as OCI.Mounts[6].source.
	Path string
	// Change is what, such as drop or = "/".
	Change string
	// Message is a changed copy.
	Message proto.Message

	original proto.Message
}

func (m Mutation) String() string { return m.Path + " " + m.Change }

// depth bounds how deep absent messages are filled.
const depth = 3

// texts are what a text becomes, beside changes to itself: nothing, places that matter in a guest, and words of the agent's protocol.
func texts() []string {
	return []string{
		"", "/", ".", "..", "x", "\x00", "\n", "/proc", "/dev/mapper", "/run/sealvol/volumes/encrypted", "/run/kata-containers/sandbox/shm",
		"/mnt/encrypted", "bind", "rshared", "blk", "scsi", "sandbox", "pod_sandbox", "02/02", "SCMP_ACT_NOTIFY", "CAP_SYS_ADMIN", "user",
	}
}

// keys join each map of texts.
func keys() []string {
	return []string{
		"", "x", "cdi.k8s.io/x", "io.kubernetes.cri-o.ContainerName", "io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri.x",
		"io.kubernetes.docker.type", "kernel.core_pattern",
	}
}

// All yields every mutation of a message, in an order that is always the same. A message that comes out equal to the original is not
// one.
func All(original proto.Message) iter.Seq[Mutation] {
	return func(yield func(Mutation) bool) {
		w := walker{original: original, yield: yield}
		w.message(nil, original.ProtoReflect())
	}
}

// A step leads from a message to one of its parts.
type step struct {
	field protoreflect.FieldDescriptor
	index int // in a list; -1 for the field itself
}

func pathText(path []step) string {
	var b strings.Builder
	for i, s := range path {
		if i > 0 {
			b.WriteByte('.')
		}
		b.WriteString(string(s.field.Name()))
		if s.index >= 0 {
			fmt.Fprintf(&b, "[%d]", s.index)
		}
	}
	return b.String()
}

type walker struct {
	original proto.Message
	yield    func(Mutation) bool
	stopped  bool
}

// change yields the message with one change, made to the message that path leads to.
func (w *walker) change(path []step, at, what string, do func(m protoreflect.Message)) {
	if w.stopped {
		return
	}
	changed := proto.Clone(w.original)
	m := changed.ProtoReflect()
	for _, s := range path {
		if s.index < 0 {
			m = m.Mutable(s.field).Message()
		} else {
			m = m.Mutable(s.field).List().Get(s.index).Message()
		}
	}
	do(m)
	if proto.Equal(changed, w.original) {
		return
	}
	w.stopped = !w.yield(Mutation{Path: at, Change: what, Message: changed, original: w.original})
}

func with(path []step, s step) []step { return append(slices.Clone(path), s) }

// message changes each field of a message that is there.
func (w *walker) message(path []step, m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		here := pathText(with(path, step{f, -1}))
		switch {
		case w.stopped:
			return
		case f.IsMap():
			w.dictionary(path, here, f, m.Get(f).Map())
		case f.IsList():
			w.list(path, here, f, m.Get(f).List())
		case f.Message() != nil && m.Has(f):
			w.change(path, here, "drop", func(m protoreflect.Message) { m.Clear(f) })
			w.message(with(path, step{f, -1}), m.Get(f).Message())
		case f.Message() != nil:
			for _, filled := range fill(f.Message(), depth) {
				w.change(path, here, "= {"+filled.what+"}", func(m protoreflect.Message) { filled.in(m.Mutable(f).Message()) })
			}
		default:
			for _, v := range others(f, m.Get(f)) {
				w.change(path, here, "= "+text(v), func(m protoreflect.Message) { m.Set(f, v) })
			}
		}
	}
}

func (w *walker) list(path []step, here string, f protoreflect.FieldDescriptor, l protoreflect.List) {
	for i := range l.Len() {
		at := fmt.Sprintf("%s[%d]", here, i)
		w.change(path, at, "drop", func(m protoreflect.Message) { leaveOut(m, f, i) })
		w.change(path, at, "double", func(m protoreflect.Message) {
			l := m.Mutable(f).List()
			l.Append(copyOf(l.Get(i)))
		})
		if i+1 < l.Len() {
			w.change(path, at, "swap with the next", func(m protoreflect.Message) {
				l := m.Mutable(f).List()
				a, b := l.Get(i), l.Get(i+1)
				l.Set(i, b)
				l.Set(i+1, a)
			})
		}
		if f.Message() != nil {
			w.message(with(path, step{f, i}), l.Get(i).Message())
			continue
		}
		for _, v := range others(f, l.Get(i)) {
			w.change(path, at, "= "+text(v), func(m protoreflect.Message) { m.Mutable(f).List().Set(i, v) })
		}
	}
	if l.Len() > 1 {
		w.change(path, here, "drop all", func(m protoreflect.Message) { m.Clear(f) })
	}
	if f.Message() != nil {
		for _, filled := range fill(f.Message(), depth) {
			w.change(path, here, "add {"+filled.what+"}", func(m protoreflect.Message) { filled.in(m.Mutable(f).List().AppendMutable().Message()) })
		}
		return
	}
	for _, v := range others(f, f.Default()) {
		w.change(path, here, "add "+text(v), func(m protoreflect.Message) { m.Mutable(f).List().Append(v) })
	}
}

func (w *walker) dictionary(path []step, here string, f protoreflect.FieldDescriptor, entries protoreflect.Map) {
	var have []string
	entries.Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool {
		have = append(have, k.String())
		return true
	})
	slices.Sort(have)
	for _, key := range have {
		k := protoreflect.ValueOfString(key).MapKey()
		at := fmt.Sprintf("%s[%q]", here, key)
		w.change(path, at, "drop", func(m protoreflect.Message) { m.Mutable(f).Map().Clear(k) })
		for _, v := range others(f.MapValue(), entries.Get(k)) {
			w.change(path, at, "= "+text(v), func(m protoreflect.Message) { m.Mutable(f).Map().Set(k, v) })
		}
	}
	for _, key := range keys() {
		k := protoreflect.ValueOfString(key).MapKey()
		w.change(path, fmt.Sprintf("%s[%q]", here, key), "add", func(m protoreflect.Message) {
			m.Mutable(f).Map().Set(k, protoreflect.ValueOfString("x"))
		})
	}
}

// leaveOut drops an element of a list.
func leaveOut(m protoreflect.Message, f protoreflect.FieldDescriptor, drop int) {
	old := m.Get(f).List()
	list := m.NewField(f).List()
	for i := range old.Len() {
		if i != drop {
			list.Append(old.Get(i))
		}
	}
	m.Set(f, protoreflect.ValueOfList(list))
}

func copyOf(v protoreflect.Value) protoreflect.Value {
	if m, ok := v.Interface().(protoreflect.Message); ok {
		return protoreflect.ValueOfMessage(proto.Clone(m.Interface()).ProtoReflect())
	}
	return v
}

// filling is one way to fill an empty message.
type filling struct {
	what string
	in   func(protoreflect.Message)
}

// fill is nothing at all, and each field by itself with each of its values.
func fill(d protoreflect.MessageDescriptor, depth int) []filling {
	all := []filling{{"", func(protoreflect.Message) {}}}
	if depth == 0 {
		return all
	}
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		name := string(f.Name())
		switch {
		case f.IsMap():
			all = append(all, filling{name + ": {x}", func(m protoreflect.Message) {
				m.Mutable(f).Map().Set(protoreflect.ValueOfString("x").MapKey(), protoreflect.ValueOfString("x"))
			}})
		case f.IsList() && f.Message() != nil:
			for _, inner := range fill(f.Message(), depth-1) {
				all = append(all, filling{name + ": [{" + inner.what + "}]", func(m protoreflect.Message) {
					inner.in(m.Mutable(f).List().AppendMutable().Message())
				}})
			}
		case f.IsList():
			for _, v := range others(f, f.Default()) {
				all = append(all, filling{name + ": [" + text(v) + "]", func(m protoreflect.Message) { m.Mutable(f).List().Append(v) }})
			}
		case f.Message() != nil:
			for _, inner := range fill(f.Message(), depth-1) {
				all = append(all, filling{name + ": {" + inner.what + "}", func(m protoreflect.Message) { inner.in(m.Mutable(f).Message()) }})
			}
		default:
			for _, v := range others(f, f.Default()) {
				all = append(all, filling{name + ": " + text(v), func(m protoreflect.Message) { m.Set(f, v) }})
			}
		}
	}
	return all
}

// others are values that a scalar could have instead.
func others(f protoreflect.FieldDescriptor, v protoreflect.Value) (values []protoreflect.Value) {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return []protoreflect.Value{protoreflect.ValueOfBool(!(v.IsValid() && v.Bool()))}
	case protoreflect.EnumKind:
		for i := range f.Enum().Values().Len() {
			values = append(values, protoreflect.ValueOfEnum(f.Enum().Values().Get(i).Number()))
		}
	case protoreflect.Uint32Kind:
		for _, n := range []uint32{0, 1, 1024, math.MaxUint32} {
			values = append(values, protoreflect.ValueOfUint32(n))
		}
	case protoreflect.Uint64Kind:
		for _, n := range []uint64{0, 1, math.MaxUint64} {
			values = append(values, protoreflect.ValueOfUint64(n))
		}
	case protoreflect.Int32Kind:
		for _, n := range []int32{0, 1, -1, math.MinInt32} {
			values = append(values, protoreflect.ValueOfInt32(n))
		}
	case protoreflect.Int64Kind:
		for _, n := range []int64{0, 1, -1, math.MinInt64} {
			values = append(values, protoreflect.ValueOfInt64(n))
		}
	case protoreflect.BytesKind:
		return []protoreflect.Value{protoreflect.ValueOfBytes([]byte("x"))}
	case protoreflect.StringKind:
		old := ""
		if v.IsValid() {
			old = v.String()
		}
		list := texts()
		if old != "" {
			list = append(list, old+"x", "x"+old, old+"/", old+"/..", "/"+old, "/."+old, old+"\x00", strings.ToUpper(old), old[1:], old[:len(old)-1])
		}
		slices.Sort(list)
		for _, s := range slices.Compact(list) {
			values = append(values, protoreflect.ValueOfString(strings.ToValidUTF8(s, "?")))
		}
	}
	return values
}

func text(v protoreflect.Value) string {
	if s, ok := v.Interface().(string); ok {
		return fmt.Sprintf("%q", s)
	}
	return v.String()
}
