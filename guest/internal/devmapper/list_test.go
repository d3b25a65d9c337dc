package devmapper

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// encodeList writes what the kernel answers to DM_LIST_DEVICES.
func encodeList(mappings ...Mapping) (b []byte) {
	for i, m := range mappings {
		entry := binary.NativeEndian.AppendUint64(nil, unix.Mkdev(m.Number.Major, m.Number.Minor))
		entry = binary.NativeEndian.AppendUint32(entry, 0)
		entry = pad(append(append(entry, m.Name...), 0))
		entry = binary.NativeEndian.AppendUint32(entry, 7) // event_nr
		if m.UUID == "" {
			entry = binary.NativeEndian.AppendUint32(entry, unix.DM_NAME_LIST_FLAG_DOESNT_HAVE_UUID)
		} else {
			entry = binary.NativeEndian.AppendUint32(entry, unix.DM_NAME_LIST_FLAG_HAS_UUID)
			entry = pad(append(append(entry, m.UUID...), 0))
		}
		if i < len(mappings)-1 {
			binary.NativeEndian.PutUint32(entry[8:], uint32(len(entry)))
		}
		b = append(b, entry...)
	}
	return b
}

func pad(b []byte) []byte { return append(b, make([]byte, (8-len(b)%8)%8)...) }

var (
	plain  = Mapping{Name: "swap", Number: blockdev.Number{Major: 253}}
	sealed = Mapping{Name: "encrypted_disk_abcde", UUID: "CRYPT-SEALVOL-encrypted_disk_abcde", Number: blockdev.Number{Major: 253, Minor: 1 << 18}}
)

func TestListsAreDecoded(t *testing.T) {
	t.Parallel()
	for _, want := range [][]Mapping{{plain}, {sealed}, {plain, sealed}, {sealed, plain, sealed}} {
		if got, err := decodeList(encodeList(want...)); err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
	for _, empty := range [][]byte{nil, make([]byte, 8), make([]byte, 4096)} {
		if got, err := decodeList(empty); err != nil || len(got) != 0 {
			t.Errorf("got %v, %v, want none", got, err)
		}
	}
}

func TestListsThatAreNotTheKernels(t *testing.T) {
	t.Parallel()
	first := len(encodeList(sealed))
	tests := map[string]func(b []byte) []byte{
		"cut off in a device":      func(b []byte) []byte { return b[:7] },
		"cut off before the name":  func(b []byte) []byte { return b[:12] },
		"cut off in a name":        func(b []byte) []byte { return b[:20] },
		"cut off before the flags": func(b []byte) []byte { return encodeList(plain)[:20] },
		"cut off in a uuid":        func(b []byte) []byte { return encodeList(sealed)[:first-9] },
		"cut off before an entry":  func(b []byte) []byte { return b[:first] },
		"next beyond the end":      func(b []byte) []byte { b[9] = 255; return b },
		"next within the entry":    func(b []byte) []byte { b[8] = 16; return b },
		"next not aligned":         func(b []byte) []byte { b[8]++; return b },
		"no name":                  func(b []byte) []byte { b[12] = 0; return b },
		"a name that is too long": func(b []byte) []byte {
			return encodeList(Mapping{Number: plain.Number, Name: string(bytes.Repeat([]byte("x"), 128))})
		},
		"a uuid that is too long": func(b []byte) []byte {
			return encodeList(Mapping{Number: plain.Number, Name: "x", UUID: string(bytes.Repeat([]byte("x"), 129))})
		},
		"flags that nobody knows":    func(b []byte) []byte { return bytes.Replace(b, []byte{7, 0, 0, 0, 1}, []byte{7, 0, 0, 0, 3}, 1) },
		"a kernel that has no uuids": func(b []byte) []byte { return bytes.Replace(b, []byte{7, 0, 0, 0, 1}, []byte{7, 0, 0, 0, 0}, 1) },
	}
	for name, spoil := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got, err := decodeList(spoil(encodeList(sealed, plain))); err == nil {
				t.Errorf("read as %v", got)
			}
		})
	}
}

func TestDependenciesAreDecoded(t *testing.T) {
	t.Parallel()
	encode := func(count uint32, numbers ...blockdev.Number) []byte {
		b := binary.NativeEndian.AppendUint32(nil, count)
		b = binary.NativeEndian.AppendUint32(b, 0)
		for _, n := range numbers {
			b = binary.NativeEndian.AppendUint64(b, unix.Mkdev(n.Major, n.Minor))
		}
		return b
	}
	want := []blockdev.Number{{Major: 7, Minor: 3}, {Major: 253, Minor: 1 << 18}}
	if got, err := decodeDependencies(encode(2, want...)); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, empty := range [][]byte{nil, encode(0), encode(0, want...)} {
		if got, err := decodeDependencies(empty); err != nil || len(got) != 0 {
			t.Errorf("got %v, %v, want none", got, err)
		}
	}
	for _, bad := range [][]byte{make([]byte, 7), encode(3, want...), encode(1<<32 - 1), encode(2, want...)[:23]} {
		if got, err := decodeDependencies(bad); err == nil {
			t.Errorf("%v is read as %v", bad, got)
		}
	}
}

func TestAListOfAnySizeIsRead(t *testing.T) {
	t.Parallel()
	var want []Mapping
	for i := range 2000 {
		want = append(want, Mapping{Name: fmt.Sprint("mapping", i), UUID: "uuid", Number: blockdev.Number{Major: 253, Minor: uint32(i)}})
	}
	answer := encodeList(want...)
	c := &Control{ioctl: func(request uint, buffer []byte) error { return reply(buffer, answer) }}
	if got, err := c.List(); err != nil || !slices.Equal(got, want) {
		t.Errorf("%d mappings, %v", len(got), err)
	}
	c.ioctl = func(request uint, buffer []byte) error { return reply(buffer, make([]byte, maxListBytes+1)) }
	if _, err := c.List(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an endless list: %v", err)
	}
	c.ioctl = func(request uint, buffer []byte) error { return reply(buffer, answer[:50]) }
	if _, err := c.List(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a list that is cut off: %v", err)
	}
}

func FuzzList(f *testing.F) {
	f.Add(encodeList(sealed, plain))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := decodeList(b)
		if err != nil {
			return
		}
		again, err := decodeList(encodeList(list...))
		if err != nil || !slices.Equal(again, list) {
			t.Errorf("%q is read as %v, and that as %v, %v", b, list, again, err)
		}
		decodeDependencies(b)
	})
}
