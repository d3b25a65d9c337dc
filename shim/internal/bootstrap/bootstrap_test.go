package bootstrap

import (
	"encoding/json"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestAnAnswerComesBackInItsForm(t *testing.T) {
	t.Parallel()
	detail, err := anypb.New(wrapperspb.String("detail"))
	if err != nil {
		t.Fatal(err)
	}
	result := &bootapi.BootstrapResult{
		Version: 3, Address: "unix:///run/s/1", Protocol: "ttrpc",
		Metadata: map[string]string{"a": "b"}, Extensions: []*bootapi.Extension{{Value: detail}},
	}
	encode := func() []byte {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(result)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	before := encode()
	result.Address = "unix:///run/mine"
	for name, test := range map[string]struct{ in, want string }{
		"plain":            {"unix:///run/s/1", "unix:///run/mine"},
		"plain with space": {"unix:///run/s/1\n", "unix:///run/mine"},
		"JSON": {
			`{"version":3,"address":"unix:///run/s/1","protocol":"ttrpc","later":{"x":[1.50]}}`,
			`{"address":"unix:///run/mine","later":{"x":[1.50]},"protocol":"ttrpc","version":3}`,
		},
		"protobuf": {string(before), string(encode())},
	} {
		answer, err := Parse([]byte(test.in))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if answer.Socket != "/run/s/1" {
			t.Errorf("%s: socket %q", name, answer.Socket)
		}
		got, err := answer.At("/run/mine")
		if err != nil || string(got) != test.want {
			t.Errorf("%s: got %q, %v, not %q", name, got, err, test.want)
		}
	}
}

func TestAnAnswerThatWeCannotFrontIsRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ answer, want string }{
		"nothing":           {" \n", "answered nothing"},
		"an error text":     {"time=now level=warn msg=oh", "is no unix socket"},
		"another transport": {"vsock://3:1024", "is no unix socket"},
		"a relative socket": {"unix://s/1", "is no unix socket"},
		"two lines":         {"a warning\nunix:///run/s/1", "is no unix socket"},
		"a line after":      {"unix:///run/s/1\na warning", "is no unix socket"},
		"gRPC":              {`{"version":3,"address":"unix:///run/s/1","protocol":"grpc"}`, `"grpc", not ttrpc`},
		"a later version":   {`{"version":4,"address":"unix:///run/s/1","protocol":"ttrpc"}`, "version 4"},
		"an early version":  {`{"version":1,"address":"unix:///run/s/1","protocol":"ttrpc"}`, "is no unix socket"},
	} {
		if _, err := Parse([]byte(test.answer)); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("unix:///run/s/1"))
	f.Add([]byte(`{"version":3,"address":"unix:///run/s/1","protocol":"ttrpc"}`))
	data, err := proto.Marshal(&bootapi.BootstrapResult{Version: 2, Address: "unix:///run/s/1", Protocol: "ttrpc"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		answer, err := Parse(data)
		if err != nil {
			return
		}
		moved, err := answer.At("/run/mine")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Parse(moved); err != nil || got.Socket != "/run/mine" {
			t.Errorf("%q became %q: %v, %v", data, moved, got.Socket, err)
		}
		if json.Valid(data) != json.Valid(moved) {
			t.Errorf("%q changed its form to %q", data, moved)
		}
	})
}
