package receipt

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
)

// maxInteger is the largest integer that RFC 8785, section 3.2.2.3, carries exactly.
const maxInteger = 1<<53 - 1

// canonical brings JSON into the form of RFC 8785, as far as receipts need it: null becomes an empty array, since Go's encoder makes
// it of nothing but empty slices, and a number that is no integer of 53 bits is refused.
func canonical(text []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrFailedPrecondition)
	}
	return appendValue(nil, v)
}

func appendValue(b []byte, v any) ([]byte, error) {
	switch v := v.(type) {
	case nil:
		return append(b, "[]"...), nil
	case bool:
		return strconv.AppendBool(b, v), nil
	case string:
		return appendString(b, v), nil
	case json.Number:
		n, err := strconv.ParseInt(v.String(), 10, 64)
		if err != nil || n > maxInteger || n < -maxInteger {
			return nil, fmt.Errorf("number %s has no canonical form: %w", v, errdefs.ErrFailedPrecondition)
		}
		return strconv.AppendInt(b, n, 10), nil
	case []any:
		return appendArray(b, v)
	default:
		return appendObject(b, v.(map[string]any))
	}
}

func appendArray(b []byte, list []any) (_ []byte, err error) {
	b = append(b, '[')
	for i, v := range list {
		if i > 0 {
			b = append(b, ',')
		}
		if b, err = appendValue(b, v); err != nil {
			return nil, err
		}
	}
	return append(b, ']'), nil
}

// appendObject sorts the keys by their bytes. RFC 8785 sorts by UTF-16, which is the same for keys that are ASCII, as a receipt's are.
func appendObject(b []byte, object map[string]any) (_ []byte, err error) {
	b = append(b, '{')
	for i, key := range slices.Sorted(maps.Keys(object)) {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(appendString(b, key), ':')
		if b, err = appendValue(b, object[key]); err != nil {
			return nil, err
		}
	}
	return append(b, '}'), nil
}

// appendString escapes what RFC 8785, section 3.2.2.2, wants escaped, and nothing else.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	for _, r := range s {
		switch r {
		case '"', '\\':
			b = append(b, '\\', byte(r))
		case '\b':
			b = append(b, `\b`...)
		case '\t':
			b = append(b, `\t`...)
		case '\n':
			b = append(b, `\n`...)
		case '\f':
			b = append(b, `\f`...)
		case '\r':
			b = append(b, `\r`...)
		default:
			if r < ' ' {
				b = fmt.Appendf(b, `\u%04x`, r)
				continue
			}
			b = append(b, string(r)...)
		}
	}
	return append(b, '"')
}
