package frame_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/frame"
)

func header(size, stream uint32, typ, flags byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, size)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, typ, flags)
}

func TestReadReturnsWhatWriteWrote(t *testing.T) {
	t.Parallel()
	frames := []frame.Frame{
		{Stream: 1, Type: frame.Request, Payload: []byte("a")},
		{Stream: 0xffffffff, Type: frame.Response, Flags: 0xff},
		{Stream: 2, Type: frame.Data, Payload: bytes.Repeat([]byte{7}, frame.MaxPayload)},
	}
	var w writes
	for _, f := range frames {
		if err := frame.Write(&w, f); err != nil {
			t.Fatal(err)
		}
	}
	if w.calls != len(frames) {
		t.Errorf("%d calls of Write for %d frames", w.calls, len(frames))
	}
	for _, want := range frames {
		got, err := frame.Read(&w)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(want, got) {
			t.Errorf("stream %d came back as %d, %v, flags %#x, %d bytes", want.Stream, got.Stream, got.Type, got.Flags, len(got.Payload))
		}
	}
	if _, err := frame.Read(&w); err != io.EOF {
		t.Errorf("after the last frame: %v", err)
	}
}

type writes struct {
	bytes.Buffer
	calls int
}

func (w *writes) Write(p []byte) (int, error) {
	w.calls++
	return w.Buffer.Write(p)
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"nothing":             {nil, io.EOF},
		"half a header":       {header(0, 1, 1, 0)[:5], io.ErrUnexpectedEOF},
		"no payload":          {header(3, 1, 1, 0), io.ErrUnexpectedEOF},
		"half a payload":      {append(header(3, 1, 1, 0), 'a'), io.ErrUnexpectedEOF},
		"a byte too many":     {header(frame.MaxPayload+1, 1, 1, 0), errdefs.ErrInvalidArgument},
		"largest length":      {header(0xffffffff, 1, 1, 0), errdefs.ErrInvalidArgument},
		"type 0":              {header(0, 1, 0, 0), errdefs.ErrInvalidArgument},
		"type after the last": {header(0, 1, 4, 0), errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := frame.Read(bytes.NewReader(c.in))
			if !errors.Is(err, c.want) {
				t.Errorf("got %+v, %v; want %v", f, err, c.want)
			}
		})
	}
}

func TestWriteRefusesWhatReadWould(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]frame.Frame{
		"oversize": {Type: frame.Request, Payload: make([]byte, frame.MaxPayload+1)},
		"type 0":   {},
		"type 4":   {Type: 4},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w writes
			if err := frame.Write(&w, f); !errdefs.IsInvalidArgument(err) || w.calls != 0 {
				t.Errorf("%v, %d writes", err, w.calls)
			}
		})
	}
}

func TestParseRequestRefusesUnknownFields(t *testing.T) {
	t.Parallel()
	good, err := proto.Marshal(&ttrpc.Request{Service: "s", Method: "m", Payload: []byte("p"), TimeoutNano: 1})
	if err != nil {
		t.Fatal(err)
	}
	if req, err := frame.ParseRequest(good); err != nil || req.Method != "m" {
		t.Fatal(req, err)
	}
	extra := protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1)
	metadata := protowire.AppendBytes(protowire.AppendTag(bytes.Clone(good), 5, protowire.BytesType), extra)
	for name, in := range map[string][]byte{
		"at the top":     append(bytes.Clone(good), extra...),
		"in metadata":    metadata,
		"no protobuf":    {0xff},
		"invalid string": {0x0a, 1, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if req, err := frame.ParseRequest(in); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v, %v", req, err)
			}
		})
	}
}

// Each kind of field that can hold a message: plain, list and map.
func TestUnmarshalRefusesUnknownFieldsAtEachDepth(t *testing.T) {
	t.Parallel()
	extra := protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1)
	for name, spoil := range map[string]func(*agent.CreateContainerRequest) proto.Message{
		"top":     func(r *agent.CreateContainerRequest) proto.Message { return r },
		"plain":   func(r *agent.CreateContainerRequest) proto.Message { return r.OCI },
		"deeper":  func(r *agent.CreateContainerRequest) proto.Message { return r.OCI.Process.User },
		"list":    func(r *agent.CreateContainerRequest) proto.Message { return r.OCI.Mounts[1] },
		"storage": func(r *agent.CreateContainerRequest) proto.Message { return r.Storages[0] },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			req := &agent.CreateContainerRequest{
				Storages: []*agent.Storage{{}},
				OCI: &agent.Spec{
					Process: &agent.Process{User: &agent.User{}, Env: []string{"A=B"}},
					Mounts:  []*agent.Mount{{}, {}}, Annotations: map[string]string{"a": "b"},
				},
			}
			p, err := proto.Marshal(req)
			if err != nil {
				t.Fatal(err)
			}
			if err := frame.Unmarshal(p, new(agent.CreateContainerRequest), nil); err != nil {
				t.Fatal("before it was spoilt: ", err)
			}
			spoil(req).ProtoReflect().SetUnknown(extra)
			if p, err = proto.Marshal(req); err != nil {
				t.Fatal(err)
			}
			if err := frame.Unmarshal(p, new(agent.CreateContainerRequest), nil); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("map", func(t *testing.T) {
		t.Parallel()
		stats := &agent.CgroupStats{HugetlbStats: map[string]*agent.HugetlbStats{"2MB": {}}}
		stats.HugetlbStats["2MB"].ProtoReflect().SetUnknown(extra)
		p, err := proto.Marshal(stats)
		if err != nil {
			t.Fatal(err)
		}
		if err := frame.Unmarshal(p, new(agent.CgroupStats), nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("got %v", err)
		}
	})
}

func FuzzRead(f *testing.F) {
	f.Add(header(0, 1, 1, 0))
	f.Add(append(header(3, 1, 2, 1), "abc"...))
	f.Add(append(header(1, 3, 3, 4), "abc"...))
	f.Add(header(0xffffffff, 0, 9, 0xff))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		got, err := frame.Read(r)
		if err != nil {
			if err == io.EOF && len(in) != 0 {
				t.Error("io.EOF inside of a frame")
			}
			return
		}
		var out bytes.Buffer
		if err := frame.Write(&out, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), in[:len(in)-r.Len()]) {
			t.Errorf("%x was read, %x written", in, out.Bytes())
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	for _, r := range []*ttrpc.Request{
		{},
		{Service: "grpc.AgentService", Method: "CreateContainer", Payload: []byte{1}, TimeoutNano: 7},
		{Metadata: []*ttrpc.KeyValue{{Key: "k", Value: "v"}}},
	} {
		p, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		req, err := frame.ParseRequest(in)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
			return
		}
		p, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		again, err := frame.ParseRequest(p)
		if err != nil || !proto.Equal(req, again) {
			t.Errorf("%v became %v, %v", req, again, err)
		}
	})
}
