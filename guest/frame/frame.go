// Package frame reads and writes the messages of containerd's ttrpc protocol one at a
// time, so that a relay can judge each of them before it goes on.
//
// The format is that of https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md: a header
// of ten bytes (length of the payload, stream id, both big endian; type; flags) and the
// payload. Whatever the format does not name is an error here, never a thing to be skipped.
// Both sides of the trust boundary use this package; it imports nothing of either.
package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Type says what a frame carries.
type Type uint8

const (
	// Request opens a stream; the payload is a ttrpc.Request.
	Request Type = 1
	// Response ends a unary stream; the payload is a ttrpc.Response.
	Response Type = 2
	// Data belongs to a streaming call.
	Data Type = 3
)

// String names the type as the protocol's document does.
func (t Type) String() string {
	switch t {
	case Request:
		return "request"
	case Response:
		return "response"
	case Data:
		return "data"
	default:
		return fmt.Sprintf("unknown type %d", uint8(t))
	}
}

const (
	// MaxPayload is the largest payload in bytes, the bound of every ttrpc implementation.
	MaxPayload = 4 << 20

	headerSize = 10
)

// Frame is one message.
type Frame struct {
	Stream  uint32
	Type    Type
	Flags   uint8
	Payload []byte
}

// Read reads one frame. It returns io.EOF only when r ends between two frames; an end
// inside of one is io.ErrUnexpectedEOF. A payload over MaxPayload or an unknown type is
// errdefs.ErrInvalidArgument, after which r is not at the start of a frame any more.
func Read(r io.Reader) (Frame, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return Frame{}, io.EOF
		}
		return Frame{}, fmt.Errorf("read frame header: %w", err)
	}
	size := binary.BigEndian.Uint32(h[0:4])
	f := Frame{Stream: binary.BigEndian.Uint32(h[4:8]), Type: Type(h[8]), Flags: h[9]}
	if size > MaxPayload {
		return Frame{}, fmt.Errorf("frame of %d bytes, at most %d are allowed: %w", size, MaxPayload, errdefs.ErrInvalidArgument)
	}
	if f.Type < Request || f.Type > Data {
		return Frame{}, fmt.Errorf("frame of %v: %w", f.Type, errdefs.ErrInvalidArgument)
	}
	if size == 0 {
		return f, nil
	}
	f.Payload = make([]byte, size)
	if _, err := io.ReadFull(r, f.Payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, fmt.Errorf("read frame payload: %w", err)
	}
	return f, nil
}

// Write writes f with one call of w.Write. What Read would refuse is
// errdefs.ErrInvalidArgument, and nothing is written then.
func Write(w io.Writer, f Frame) error {
	if len(f.Payload) > MaxPayload {
		return fmt.Errorf("frame of %d bytes, at most %d are allowed: %w", len(f.Payload), MaxPayload, errdefs.ErrInvalidArgument)
	}
	if f.Type < Request || f.Type > Data {
		return fmt.Errorf("frame of %v: %w", f.Type, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, headerSize, headerSize+len(f.Payload))
	binary.BigEndian.PutUint32(b[0:4], uint32(len(f.Payload)))
	binary.BigEndian.PutUint32(b[4:8], f.Stream)
	b[8], b[9] = byte(f.Type), f.Flags
	if _, err := w.Write(append(b, f.Payload...)); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	return nil
}

// ParseRequest decodes the payload of a request frame. Bytes that are no ttrpc.Request,
// or hold a field that it does not have, are errdefs.ErrInvalidArgument.
func ParseRequest(p []byte) (*ttrpc.Request, error) {
	req := new(ttrpc.Request)
	if err := Unmarshal(p, req, nil); err != nil {
		return nil, err
	}
	return req, nil
}

// Unmarshal decodes p into m and refuses, with errdefs.ErrInvalidArgument, fields that
// m's type does not have, at any depth: a peer that knows more fields than we do would
// act on something that nobody judged. drop, if it is not nil, is called before that for each message that has
// such fields, and may take from it those that are known to mean nothing there.
func Unmarshal(p []byte, m proto.Message, drop func(protoreflect.Message)) error {
	name := m.ProtoReflect().Descriptor().FullName()
	if err := proto.Unmarshal(p, m); err != nil {
		return fmt.Errorf("decode %s: %v: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if path, ok := unknown(m.ProtoReflect(), drop); ok {
		return fmt.Errorf("decode %s: unknown field in %s: %w", name, path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// unknown finds a message at or below m that holds an unknown field, and its type's name.
func unknown(m protoreflect.Message, drop func(protoreflect.Message)) (protoreflect.FullName, bool) {
	if drop != nil && len(m.GetUnknown()) > 0 {
		drop(m)
	}
	if len(m.GetUnknown()) > 0 {
		return m.Descriptor().FullName(), true
	}
	var name protoreflect.FullName
	var found bool
	visit := func(v protoreflect.Message) bool {
		name, found = unknown(v, drop)
		return !found
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { return visit(v.Message()) })
			}
		case fd.Message() == nil:
		case fd.IsList():
			for i := 0; i < v.List().Len() && !found; i++ {
				visit(v.List().Get(i).Message())
			}
		default:
			visit(v.Message())
		}
		return !found
	})
	return name, found
}
