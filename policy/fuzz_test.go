package policy

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/util"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/policy/mutation"
)

// FuzzSealedPod: whatever sealed_pod is, it is refused with a class or read into values that keep their bounds.
func FuzzSealedPod(f *testing.F) {
	f.Add([]byte(`{"version": 1, "containers": {"c": {"args": ["sleep"], "exec": [["df", "..."]], "rootfs": "host"}}}`))
	f.Add([]byte(`{"version": 1, "containers": {"c": {}}, "volumes": {"v": {"mode": "ephemeral", "size": {"min": 1, "max": 4096},
		"mounts": [{"container": "c", "path": "/v", "read_only": true}], "layering": "luks2", "fs_type": "xfs", "options": ["dev", "noatime"],
		"fs_group": {"gid": 7}}}}`))
	f.Add([]byte(`{"version": 1, "containers": {"c": {}}, "volumes": {"a": {"mode": "ephemeral", "size": {"max": 4096}, "mounts": [{"container": "c", "path": "/v"}]},
		"b": {"mode": "ephemeral", "size": {"max": 4096}, "mounts": [{"container": "c", "path": "/v/w"}], "max_tag_memory": 1, "preallocate_tags": true}}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		var value any
		if d.Decode(&value) != nil {
			return
		}
		p, err := parsePod(value)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("an error without a class: %v", err)
			}
			if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' }) {
				t.Errorf("must be one line: %q", err)
			}
			return
		}
		paths := map[string][]string{}
		for name, v := range p.Volumes {
			if len(v.Suites) == 0 || len(v.Mounts) == 0 || v.Size.Max == 0 || v.Size.Max%BlockSize != 0 || v.Size.Min > v.Size.Max {
				t.Errorf("volume %s is out of bounds: %+v", name, v)
			}
			for _, m := range v.Mounts {
				if _, ok := p.Containers[m.Container]; !ok {
					t.Errorf("volume %s is mounted in no container: %+v", name, m)
				}
				if resolve(m.Path) != m.Path || m.Path == "/" {
					t.Errorf("volume %s lies at %q", name, m.Path)
				}
				if slices.ContainsFunc(paths[m.Container], func(other string) bool { return touch(m.Path, other) }) {
					t.Errorf("volume %s touches another one at %q", name, m.Path)
				}
				paths[m.Container] = append(paths[m.Container], m.Path)
			}
		}
	})
}

// resolve is where a path leads in a tree without links, component by component, as the kernel goes.
func resolve(path string) string {
	var at []string
	for _, component := range strings.Split(path, "/") {
		switch component {
		case "", ".":
		case "..":
			if len(at) > 0 {
				at = at[:len(at)-1]
			}
		default:
			at = append(at, component)
		}
	}
	return "/" + strings.Join(at, "/")
}

// touch reports whether of two places one is the other or lies below it, by comparing each component.
func touch(a, b string) bool {
	as, bs := components(a), components(b)
	for i := range min(len(as), len(bs)) {
		if as[i] != bs[i] {
			return false
		}
	}
	return true
}

func components(path string) []string {
	return slices.DeleteFunc(strings.Split(resolve(path), "/"), func(s string) bool { return s == "" })
}

// FuzzMountPaths holds the framework's rules on where mounts lie against a slow reference that follows each path: a mount that the rules
// let pass beside a volume touches it nowhere, however it is written, and one that is written plainly and touches nothing is let pass.
func FuzzMountPaths(f *testing.F) {
	query, err := rego.New(
		rego.Module("framework.rego", framework),
		rego.Query("allowed := [rule | some rule in {\"mount_paths\", \"volume_shadowed\"}; data.sealvol.holds[rule]]"),
	).PrepareForEval(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	for _, mount := range []string{
		"/", "", ".", "/mnt", "/mnt/a", "/mnt/a/", "/mnt//a", "//mnt/a", "/mnt/./a", "/mnt/b/../a", "/mnt/a/..", "mnt/a", "/mnt/ab", "/mnt/a/b",
		"/mnt/..", "/..", "/mnt/a\x00", "/x\n/mnt/a", "/x\n/..", "/mnt/a\n", "/data", "/mnt/...", "/mnt/..a", "/MNT/A",
	} {
		f.Add("/mnt/a", mount)
	}
	f.Fuzz(func(t *testing.T, volume, mount string) {
		if _, err := parsePath(node{"path", volume}); err != nil || strings.ToValidUTF8(mount, "") != mount {
			return
		}
		at := func(path string) map[string]any { return map[string]any{"destination": path} }
		results, err := query.Eval(t.Context(), rego.EvalInput(map[string]any{
			"rpc": "CreateContainer",
			"pod": map[string]any{"volumes": map[string]any{"v": map[string]any{
				"mounts": []any{map[string]any{"container": "c", "path": volume, "read_only": false}},
			}}},
			"request": map[string]any{"OCI": map[string]any{
				"Annotations": map[string]any{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "c"},
				"Mounts":      []any{at(mount), at(volume)},
			}},
		}))
		if err != nil || len(results) != 1 {
			t.Fatalf("%v %v", results, err)
		}
		passes := len(results[0].Bindings["allowed"].([]any)) == 2
		plain := resolve(mount) == mount && mount != "/" && !strings.ContainsAny(mount, "\x00\n")
		switch {
		case passes && (touch(mount, volume) || strings.Contains(mount, "\x00")):
			t.Errorf("a mount at %q passes, which lies at %q, beside a volume at %q", mount, resolve(mount), volume)
		case !passes && plain && !touch(mount, volume):
			t.Errorf("a mount at %q does not pass beside a volume at %q", mount, volume)
		}
	})
}

// asJSON is the reference for messageTerm.
func asJSON(t *testing.T, m proto.Message) ast.Value {
	t.Helper()
	text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var document any
	if err := util.UnmarshalJSON(text, &document); err != nil {
		t.Fatal(err)
	}
	value, err := ast.InterfaceToValue(document)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// FuzzMessageTerm: what the framework sees of a request is what protobuf's own JSON says of it.
func FuzzMessageTerm(f *testing.F) {
	for _, base := range []string{"create-container.json", "create-container-two-volumes.json"} {
		b, err := proto.Marshal(recorded(f, "CreateContainer", base))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		req := &agent.CreateContainerRequest{}
		if proto.Unmarshal(b, req) != nil {
			return
		}
		got, err := messageTerm(req.ProtoReflect())
		if err != nil {
			t.Fatalf("what was decoded is not seen: %v", err)
		}
		if got.Value.Compare(asJSON(t, req)) != 0 {
			t.Errorf("the framework sees %v", got)
		}
	})
}

// The same for every field that a request has: each is set in some mutation.
func TestFrameworkSeesEveryFieldAsProtobufsJSONHasIt(t *testing.T) {
	t.Parallel()
	n := 0
	for m := range mutation.All(recorded(t, "CreateContainer", "create-container.json")) {
		if n++; n%5 != 0 && !strings.Contains(m.Change, "{") {
			continue // scalars have few forms
		}
		got, err := messageTerm(m.Message.ProtoReflect())
		if err != nil {
			t.Fatalf("%v: %v", m, err)
		}
		if got.Value.Compare(asJSON(t, m.Message)) != 0 {
			t.Errorf("%v: the framework sees %v", m, got)
		}
	}
	link := &agent.CopyFileRequest{Path: "/x", FileMode: 0o120777, Data: []byte("..data/key"), Offset: -1, Uid: -1}
	if got, err := messageTerm(link.ProtoReflect()); err != nil || got.Value.Compare(asJSON(t, link)) != 0 {
		t.Errorf("a link: %v, %v", got, err)
	}
	long := &agent.CopyFileRequest{Data: bytes.Repeat([]byte("x"), maxBytes+1)}
	got, err := messageTerm(long.ProtoReflect())
	if err != nil {
		t.Fatal(err)
	}
	if data := got.Get(ast.StringTerm("data")); data.Value.Compare(ast.Null{}) != 0 {
		t.Errorf("more bytes than any rule looks at, which must not look like none: %v", data)
	}
}
