package policy

import (
	"encoding/base64"
	"fmt"
	"strconv"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxBytes bounds a bytes field of what the framework sees: no rule looks at what is copied or typed, and a link's target, which one
// does look at, is no longer than a path.
const maxBytes = 4096

// messageTerm is a message as protobuf's JSON has it, with the names of the .proto files and every field there (protojson's
// UseProtoNames and EmitUnpopulated): absent messages are null, absent members of a oneof are left out, numbers of 64 bits and bytes are
// text. Bytes fields of more than maxBytes are null, so that a rule of the author's on what they hold can tell them from empty ones.
func messageTerm(m protoreflect.Message) (*ast.Term, error) {
	fields := m.Descriptor().Fields()
	items := make([][2]*ast.Term, 0, fields.Len())
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.ContainingOneof() != nil && !m.Has(f) {
			continue
		}
		value, err := fieldTerm(m, f)
		if err != nil {
			return nil, err
		}
		items = append(items, ast.Item(ast.InternedTerm(f.TextName()), value))
	}
	return ast.ObjectTerm(items...), nil
}

func fieldTerm(m protoreflect.Message, f protoreflect.FieldDescriptor) (_ *ast.Term, err error) {
	v := m.Get(f)
	switch {
	case f.IsMap():
		items := make([][2]*ast.Term, 0, v.Map().Len())
		v.Map().Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
			var term *ast.Term
			if term, err = valueTerm(f.MapValue(), value); err == nil {
				items = append(items, ast.Item(ast.StringTerm(key.String()), term))
			}
			return err == nil
		})
		return ast.ObjectTerm(items...), err
	case f.IsList():
		terms := make([]*ast.Term, v.List().Len())
		for i := range terms {
			if terms[i], err = valueTerm(f, v.List().Get(i)); err != nil {
				return nil, err
			}
		}
		return ast.ArrayTerm(terms...), nil
	case f.Message() != nil && !m.Has(f):
		return ast.NullTerm(), nil
	}
	return valueTerm(f, v)
}

func valueTerm(f protoreflect.FieldDescriptor, v protoreflect.Value) (*ast.Term, error) {
	switch f.Kind() {
	case protoreflect.MessageKind:
		return messageTerm(v.Message())
	case protoreflect.StringKind:
		if !utf8.ValidString(v.String()) {
			return nil, fmt.Errorf("field %s is not UTF-8", f.Name())
		}
		return ast.StringTerm(v.String()), nil
	case protoreflect.BoolKind:
		return ast.InternedTerm(v.Bool()), nil
	case protoreflect.BytesKind:
		if len(v.Bytes()) > maxBytes {
			return ast.NullTerm(), nil
		}
		return ast.StringTerm(base64.StdEncoding.EncodeToString(v.Bytes())), nil
	case protoreflect.Int32Kind:
		return ast.IntNumberTerm(int(v.Int())), nil
	case protoreflect.Uint32Kind:
		return ast.UIntNumberTerm(v.Uint()), nil
	case protoreflect.Int64Kind:
		return ast.StringTerm(strconv.FormatInt(v.Int(), 10)), nil
	case protoreflect.Uint64Kind:
		return ast.StringTerm(strconv.FormatUint(v.Uint(), 10)), nil
	case protoreflect.EnumKind:
		if value := f.Enum().Values().ByNumber(v.Enum()); value != nil {
			return ast.StringTerm(string(value.Name())), nil
		}
		return ast.IntNumberTerm(int(v.Enum())), nil
	}
	return nil, fmt.Errorf("field %s is a %v, which no request has", f.Name(), f.Kind())
}
