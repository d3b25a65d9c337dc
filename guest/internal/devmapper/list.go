package devmapper

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Mapping is a mapping that the kernel has, whoever made it.
type Mapping struct {
	Name   string
	UUID   string // empty if it has none
	Number blockdev.Number
}

// maxListBytes bounds an answer. A mapping takes some hundred bytes.
const maxListBytes = 16 << 20

// List returns all mappings, in the order of their names.
func (c *Control) List() ([]Mapping, error) {
	payload, err := c.answer(unix.DM_LIST_DEVICES, "", unix.DM_UUID_FLAG)
	if err != nil {
		return nil, fmt.Errorf("list mappings: %w", err)
	}
	list, err := decodeList(payload)
	if err != nil {
		return nil, fmt.Errorf("list mappings: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return list, nil
}

// dependencies are the devices that a mapping's live table uses.
func (c *Control) dependencies(name string) ([]blockdev.Number, error) {
	payload, err := c.answer(unix.DM_TABLE_DEPS, name, 0)
	if err != nil {
		return nil, fmt.Errorf("dependencies of mapping %s: %w", name, err)
	}
	numbers, err := decodeDependencies(payload)
	if err != nil {
		return nil, fmt.Errorf("dependencies of mapping %s: %w: %w", name, err, errdefs.ErrFailedPrecondition)
	}
	return numbers, nil
}

// answer makes an ioctl whose answer may be of any size.
func (c *Control) answer(request uint, name string, flags uint32) ([]byte, error) {
	for size := 16 << 10; size <= maxListBytes; size *= 4 {
		m := newMessage(name)
		m.Flags |= flags
		payload, err := c.send(request, m, make([]byte, size))
		if err != nil || m.Flags&unix.DM_BUFFER_FULL_FLAG == 0 {
			return payload, err
		}
	}
	return nil, fmt.Errorf("the answer has more than %d bytes: %w", maxListBytes, errdefs.ErrFailedPrecondition)
}

// decodeList reads a list of struct dm_name_list, each at a multiple of 8 bytes:
//
//	u64 dev; u32 next; char name[]; to the next multiple of 8: u32 event_nr; u32 flags; if there is a uuid: char uuid[]
//
// next is the distance to the next entry, 0 in the last one. An empty list has no entry or one with dev 0.
func decodeList(b []byte) (list []Mapping, err error) {
	const nameOffset = 12
	if len(b) == 0 || len(b) >= 8 && binary.NativeEndian.Uint64(b) == 0 {
		return nil, nil
	}
	for {
		if len(b) < nameOffset {
			return nil, fmt.Errorf("entry %d is cut off", len(list))
		}
		number, next := blockdev.FromDev(binary.NativeEndian.Uint64(b)), int(binary.NativeEndian.Uint32(b[8:]))
		entry := b
		if next != 0 {
			if next%8 != 0 || next > len(b) {
				return nil, fmt.Errorf("entry %d has %d bytes of %d", len(list), next, len(b))
			}
			entry = b[:next]
		}
		name, end, ok := cString(entry, nameOffset, unix.DM_NAME_LEN)
		if !ok || name == "" || len(entry) < end+8 {
			return nil, fmt.Errorf("entry %d has no name or is cut off", len(list))
		}
		mapping := Mapping{Name: name, Number: number}
		switch flags := binary.NativeEndian.Uint32(entry[end+4:]); flags {
		case unix.DM_NAME_LIST_FLAG_HAS_UUID:
			if mapping.UUID, _, ok = cString(entry, end+8, unix.DM_UUID_LEN); !ok {
				return nil, fmt.Errorf("uuid of mapping %q is cut off", name)
			}
		case unix.DM_NAME_LIST_FLAG_DOESNT_HAVE_UUID:
		default:
			return nil, fmt.Errorf("flags of mapping %q are %#x", name, flags)
		}
		list = append(list, mapping)
		if next == 0 {
			return list, nil
		}
		b = b[next:]
	}
}

// cString reads the string at an offset; size is that of the longest and its zero byte. end is where the next field begins.
func cString(b []byte, offset, size int) (s string, end int, ok bool) {
	if offset > len(b) {
		return "", 0, false
	}
	before, _, ok := bytes.Cut(b[offset:min(len(b), offset+size)], []byte{0})
	return string(before), (offset + len(before) + 1 + 7) / 8 * 8, ok
}

// decodeDependencies reads a struct dm_target_deps: u32 count; u32 padding; u64 dev[count].
func decodeDependencies(b []byte) (numbers []blockdev.Number, err error) {
	if len(b) == 0 { // no live table
		return nil, nil
	}
	const devOffset = 8
	if len(b) < devOffset {
		return nil, fmt.Errorf("%d bytes", len(b))
	}
	if count := binary.NativeEndian.Uint32(b); uint64(len(b)) < devOffset+8*uint64(count) {
		return nil, fmt.Errorf("%d devices in %d bytes", count, len(b))
	} else {
		b = b[devOffset:][:8*count]
	}
	for ; len(b) > 0; b = b[8:] {
		numbers = append(numbers, blockdev.FromDev(binary.NativeEndian.Uint64(b)))
	}
	return numbers, nil
}
