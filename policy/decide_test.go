package policy

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
)

func TestDenialNamesTheContainerAndTheNextStep(t *testing.T) {
	t.Parallel()
	p := load(t, "testdata/volumes/one-volume/policy.rego")
	req := recorded(t, "CreateContainer", "create-container.json", map[string]any{
		"op": "add", "path": "/OCI/Mounts/-", "value": map[string]any{"destination": "/mnt/encrypted/\x1b[2J", "type": "tmpfs"},
	})
	_, err := p.Decide(t.Context(), "CreateContainer", req, State{})
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
	if _, err := p.Decide(t.Context(), "CreateContainer", recorded(t, "CreateContainer", "create-container-open.json"), State{}); err != nil {
		t.Error(err)
	}
	_, err := p.Decide(t.Context(), "CreateContainer", recorded(t, "CreateContainer", "create-container.json"), State{})
	wantDenial(t, err, "open_storages", "open_mounts")
}

// An empty message has every field absent: no rule may take that for consent.
func TestEmptyRequestsAreDenied(t *testing.T) {
	t.Parallel()
	sealed := load(t, "testdata/volumes/one-volume/policy.rego")
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

// The gate asks beforehand, and does not bring to Decide what is not judged: rules of the author's own must see it all the same.
func TestOnlyWhatPassesWhateverItSaysIsNotJudged(t *testing.T) {
	t.Parallel()
	for rpc, judged := range map[string]bool{"WriteStdin": false, "StartContainer": false, "CreateContainer": true, "CopyFile": true, "SetPolicy": true, "": true} {
		if Default().Judges(rpc) != judged {
			t.Errorf("%q is judged by the framework: %t, want %t", rpc, !judged, judged)
		}
		if own := load(t, "testdata/author/own-rules/policy.rego"); !own.Judges(rpc) {
			t.Errorf("%q must be judged: the author has rules of their own", rpc)
		}
	}
}

func TestDecideEndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	req := recorded(t, "CreateContainer", "create-container-open.json")
	if _, err := Default().Decide(ctx, "CreateContainer", req, State{}); err == nil {
		t.Error("a request judged after its context's end was allowed")
	}
}

// FuzzCreateContainer: whatever the host sends, what is allowed in a sealed pod is a named container with all its volumes, each from a
// device of its own, and nothing else of a block device.
func FuzzCreateContainer(f *testing.F) {
	policies := map[string]*Policy{}
	for pod, base := range map[string]string{"one-volume": "create-container.json", "two-volumes": "create-container-two-volumes.json"} {
		policies[pod] = load(f, "testdata/volumes/"+pod+"/policy.rego")
		b, err := proto.Marshal(recorded(f, "CreateContainer", base))
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

func BenchmarkDecide(b *testing.B) {
	p := load(b, "testdata/volumes/one-volume/policy.rego")
	req := recorded(b, "CreateContainer", "create-container.json")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Decide(b.Context(), "CreateContainer", req, State{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoad(b *testing.B) {
	text := read(b, "testdata/volumes/one-volume/policy.rego")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Load(b.Context(), text); err != nil {
			b.Fatal(err)
		}
	}
}
