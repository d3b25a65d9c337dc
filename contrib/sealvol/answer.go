package main

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/sealvol/sealvol/contrib/internal/guest"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Bounds of an answer: far above what a guest says, far below what would hurt.
const (
	maxText  = 4096 // bytes of one string
	maxItems = 1024 // elements of one list
)

// check verifies that an answer can be shown on a terminal: the guest is
// trusted but the host carries its answer and may write whatever it likes. It
// masks keys that the guest should have masked. The notes go to the reader.
func check(r *sealvolv1.StatusResponse) (notes []string, err error) {
	unknown, err := checkMessage("status", r.ProtoReflect())
	if err != nil {
		return nil, err
	}
	if unknown {
		notes = append(notes, "the guest says more than this version of sealvol understands: use the one that was built with the guest image")
	}
	for _, v := range r.Volumes {
		for _, m := range v.Mappings {
			if maskKeys(m) {
				notes = append(notes, fmt.Sprintf("volume %s: the guest did not mask a key of mapping %s, which must never happen; treat it as lost", v.Name, m.Name))
			}
		}
	}
	return notes, nil
}

func checkMessage(path string, m protoreflect.Message) (unknown bool, err error) {
	unknown = len(m.GetUnknown()) > 0
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := path + "." + string(fd.Name())
		one := func(name string, v protoreflect.Value) {
			switch fd.Kind() {
			case protoreflect.MessageKind:
				var sub bool
				sub, err = checkMessage(name, v.Message())
				unknown = unknown || sub
			case protoreflect.StringKind:
				err = checkText(name, v.String())
			}
		}
		if !fd.IsList() {
			one(name, v)
			return err == nil
		}
		list := v.List()
		if list.Len() > maxItems {
			err = fmt.Errorf("%s has %d elements, more than %d", name, list.Len(), maxItems)
		}
		for i := 0; i < list.Len() && err == nil; i++ {
			one(fmt.Sprintf("%s[%d]", name, i), list.Get(i))
		}
		return err == nil
	})
	return unknown, err
}

func checkText(name, s string) error {
	if len(s) > maxText {
		return fmt.Errorf("%s has %d bytes, more than %d", name, len(s), maxText)
	}
	if i := strings.IndexFunc(s, guest.Unprintable); i >= 0 {
		return fmt.Errorf("%s holds the character %q", name, []rune(s[i:])[0])
	}
	return nil
}

// A key in a table is hex or the name of a key in the kernel's keyring, which
// starts with a colon and is no secret.
var (
	cryptKey = regexp.MustCompile(`(^\d+ \d+ crypt \S+ )([^ :]\S*)`)
	// The hash algorithms of dm-integrity take their key after a colon.
	hashKey = regexp.MustCompile(`((?:internal_hash|journal_crypt|journal_mac):[^ :]+:)(\S+)`)
)

// maskKeys overwrites keys in a table and reports whether there was one.
func maskKeys(m *sealvolv1.Mapping) bool {
	masked := m.Table
	for _, key := range []*regexp.Regexp{cryptKey, hashKey} {
		masked = key.ReplaceAllStringFunc(masked, func(s string) string {
			parts := key.FindStringSubmatch(s)
			return parts[1] + strings.Repeat("0", len(parts[2]))
		})
	}
	found := masked != m.Table
	m.Table = masked
	return found
}
