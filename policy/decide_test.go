package policy

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/open-policy-agent/opa/v1/rego"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// request makes an empty message of a method.
func request(tb testing.TB, rpc string) proto.Message {
	tb.Helper()
	switch rpc {
	case "CreateContainer":
		return &grpc.CreateContainerRequest{}
	case "CreateSandbox":
		return &grpc.CreateSandboxRequest{}
	case "ExecProcess":
		return &grpc.ExecProcessRequest{}
	case "UpdateEphemeralMounts":
		return &grpc.UpdateEphemeralMountsRequest{}
	case "AddSwap":
		return &grpc.AddSwapRequest{}
	}
	tb.Fatalf("no message for %s", rpc)
	return nil
}

// decisionCase is a change to a request, in JSON Patch, and what comes of it.
type decisionCase struct {
	Description string
	Patch       []any
	State       map[string]string
	Allowed     bool
	Rule        string // that denies
	Container   string
	Sandbox     bool
	Attachments []Attachment
}

func read(tb testing.TB, path string) []byte {
	tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// patched is the request in a folder of test data with a patch applied.
func patched(ctx context.Context, tb testing.TB, dir, rpc string, patch []any) proto.Message {
	tb.Helper()
	var document any
	if err := json.Unmarshal(read(tb, filepath.Join(dir, "request.json")), &document); err != nil {
		tb.Fatal(err)
	}
	results, err := rego.New(
		rego.Query("x := json.patch(input.document, input.patch)"),
		rego.Input(map[string]any{"document": document, "patch": append([]any{}, patch...)}),
	).Eval(ctx)
	if err != nil || len(results) != 1 {
		tb.Fatalf("the patch does not apply: %v", err)
	}
	text, err := json.Marshal(results[0].Bindings["x"])
	if err != nil {
		tb.Fatal(err)
	}
	req := request(tb, rpc)
	if err := protojson.Unmarshal(text, req); err != nil {
		tb.Fatal(err)
	}
	return req
}

// TestDecisions runs testdata/<method>/<pod>/cases.json. The requests are what Kata 3.20 sent, recorded, but for names and ids.
func TestDecisions(t *testing.T) {
	t.Parallel()
	dirs, err := filepath.Glob("testdata/*/*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no test data: %v", err)
	}
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, "cases.json")); err != nil {
			continue // corpus of a fuzz target
		}
		rpc := filepath.Base(filepath.Dir(dir))
		p, err := Load(t.Context(), read(t, filepath.Join(dir, "policy.rego")))
		if err != nil {
			t.Fatal(err)
		}
		var cases []decisionCase
		if err := json.Unmarshal(read(t, filepath.Join(dir, "cases.json")), &cases); err != nil {
			t.Fatal(err)
		}
		for _, c := range cases {
			t.Run(strings.TrimPrefix(dir, "testdata/")+"/"+c.Description, func(t *testing.T) {
				t.Parallel()
				req := patched(t.Context(), t, dir, rpc, c.Patch)
				before := proto.Clone(req)
				got, err := p.Decide(t.Context(), rpc, req, State{Containers: c.State})
				if !proto.Equal(before, req) {
					t.Error("Decide must not change the request")
				}
				if !c.Allowed {
					wantDenial(t, err, c.Rule)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				want := Decision{Container: c.Container, Sandbox: c.Sandbox, Attachments: c.Attachments}
				if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// wantDenial says that a request was denied by a rule, in a line that a person can use and that carries nothing foreign.
func wantDenial(t *testing.T, err error, rule string) {
	t.Helper()
	if !errdefs.IsPermissionDenied(err) {
		t.Fatalf("want a denial by %s, got %v", rule, err)
	}
	if !strings.Contains(err.Error(), "(rule "+rule+"): ") {
		t.Errorf("want rule %s, got: %v", rule, err)
	}
	if len(err.Error()) > 400 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsPrint(r) }) {
		t.Errorf("must be a short printable line: %q", err)
	}
	if strings.Contains(err.Error(), "{}") || !strings.Contains(err.Error(), "; ") {
		t.Errorf("must say what is wrong and what to do: %v", err)
	}
}

func TestDenialNamesTheContainerAndTheNextStep(t *testing.T) {
	t.Parallel()
	const dir = "testdata/CreateContainer/one-volume"
	p, err := Load(t.Context(), read(t, dir+"/policy.rego"))
	if err != nil {
		t.Fatal(err)
	}
	req := patched(t.Context(), t, dir, "CreateContainer", []any{map[string]any{
		"op": "add", "path": "/OCI/Mounts/-", "value": map[string]any{"destination": "/mnt/encrypted/\x1b[2J", "type": "tmpfs"},
	}})
	_, err = p.Decide(t.Context(), "CreateContainer", req, State{})
	const want = `policy denies container "my-container" (rule volume_shadowed): another mount, at "/mnt/encrypted/\x1b[2J", ` +
		`lies on, above or below a volume; remove it from the pod: permission denied`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestDefaultHasNoVolumeAndLetsAnyContainerRun(t *testing.T) {
	t.Parallel()
	p := Default()
	if p.Sealed() || len(p.Containers()) > 0 || len(p.Volumes()) > 0 {
		t.Errorf("the default policy is not empty: %+v", p)
	}
	if _, err := p.Decide(t.Context(), "CreateContainer", patched(t.Context(), t, "testdata/CreateContainer/open", "CreateContainer", nil), State{}); err != nil {
		t.Error(err)
	}
	_, err := p.Decide(t.Context(), "CreateContainer", patched(t.Context(), t, "testdata/CreateContainer/one-volume", "CreateContainer", nil), State{})
	wantDenial(t, err, "open_storages")
}

// An empty message has every field absent: no rule may take that for consent.
func TestEmptyRequestsAreDenied(t *testing.T) {
	t.Parallel()
	sealed, err := Load(t.Context(), read(t, "testdata/CreateContainer/one-volume/policy.rego"))
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]*Policy{"sealed": sealed, "open": Default()} {
		for _, rpc := range []string{"CreateContainer", "SetPolicy", ""} {
			t.Run(fmt.Sprintf("%s %q", name, rpc), func(t *testing.T) {
				t.Parallel()
				if _, err := p.Decide(t.Context(), rpc, &grpc.CreateContainerRequest{}, State{}); !errdefs.IsPermissionDenied(err) {
					t.Errorf("want a denial, got %v", err)
				}
			})
		}
	}
}

func TestDecideEndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	req := patched(t.Context(), t, "testdata/CreateContainer/open", "CreateContainer", nil)
	if _, err := Default().Decide(ctx, "CreateContainer", req, State{}); err == nil {
		t.Error("a request judged after its context's end was allowed")
	}
}

// FuzzCreateContainer: whatever the host sends, what is allowed in a sealed pod is a named container with all its volumes, each from a
// device of its own, and nothing else of a block device.
func FuzzCreateContainer(f *testing.F) {
	policies := map[string]*Policy{}
	for _, pod := range []string{"one-volume", "two-volumes", "sandbox"} {
		dir := "testdata/CreateContainer/" + pod
		p, err := Load(f.Context(), read(f, dir+"/policy.rego"))
		if err != nil {
			f.Fatal(err)
		}
		policies[pod] = p
		b, err := proto.Marshal(patched(f.Context(), f, dir, "CreateContainer", nil))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(pod, b)
	}
	f.Fuzz(func(t *testing.T, pod string, b []byte) {
		p, ok := policies[pod]
		req := &grpc.CreateContainerRequest{}
		if !ok || proto.Unmarshal(b, req) != nil {
			return
		}
		got, err := p.Decide(t.Context(), "CreateContainer", req, State{})
		if err != nil {
			if !errdefs.IsPermissionDenied(err) && !errdefs.IsInvalidArgument(err) {
				t.Fatalf("neither allowed nor denied: %v", err)
			}
			return
		}
		var wants []string
		for name, v := range p.Volumes() {
			for _, m := range v.Mounts {
				if m.Container == got.Container {
					wants = append(wants, name+" at "+m.Path)
				}
			}
		}
		var has, devices []string
		for _, a := range got.Attachments {
			has = append(has, a.Volume+" at "+req.OCI.Mounts[a.Mount].Destination)
			devices = append(devices, req.Storages[a.Storage].Source)
			if req.OCI.Mounts[a.Mount].Source != req.Storages[a.Storage].MountPoint || req.Storages[a.Storage].Driver != "blk" {
				t.Errorf("attachment %+v is not of its storage", a)
			}
		}
		slices.Sort(wants)
		slices.Sort(has)
		slices.Sort(devices)
		if !slices.Equal(wants, has) || len(req.Storages) != len(has) || len(slices.Compact(devices)) != len(has) {
			t.Errorf("allowed with %v on %v, declared %v", has, devices, wants)
		}
		if _, ok := p.Containers()[got.Container]; ok == got.Sandbox || len(req.Devices)+len(req.OCI.Linux.Devices) > 0 {
			t.Errorf("allowed: %+v", got)
		}
	})
}

// BenchmarkDecide also bounds what the gate adds to a CreateContainer.
func BenchmarkDecide(b *testing.B) {
	const dir = "testdata/CreateContainer/two-volumes"
	p, err := Load(b.Context(), read(b, dir+"/policy.rego"))
	if err != nil {
		b.Fatal(err)
	}
	req := patched(b.Context(), b, dir, "CreateContainer", nil)
	for b.Loop() {
		if _, err := p.Decide(b.Context(), "CreateContainer", req, State{}); err != nil {
			b.Fatal(err)
		}
	}
	if per := b.Elapsed() / time.Duration(b.N); per > 10*time.Millisecond {
		b.Logf("%v for one decision is more than 10 ms", per)
	}
}

func BenchmarkLoad(b *testing.B) {
	text := read(b, "testdata/CreateContainer/two-volumes/policy.rego")
	for b.Loop() {
		if _, err := Load(b.Context(), text); err != nil {
			b.Fatal(err)
		}
	}
}
