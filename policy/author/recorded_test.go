package author

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/policy"
)

// recorded is what Kata's runtime sends for the pods of a manifest; see testdata/recorded/README.md.
type recorded struct {
	Pods []struct {
		Kind, Name string
		Requests   []struct {
			RPC, Container string
			Request        json.RawMessage
		}
	}
}

// recordedImages are the configurations of the manifests' images.
func recordedImages(t *testing.T) map[string]ImageConfig {
	t.Helper()
	images := map[string]ImageConfig{}
	if err := json.Unmarshal(read(t, "testdata/recorded/images.json"), &images); err != nil {
		t.Fatal(err)
	}
	images[""] = ImageConfig{Cmd: []string{"sh"}}
	return images
}

// recordedManifests are the names of the manifests that have a record.
func recordedManifests(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/recorded/*.json")
	if err != nil || len(files) < 2 {
		t.Fatalf("no records: %v", err)
	}
	var names []string
	for _, f := range files {
		if name := strings.TrimSuffix(filepath.Base(f), ".json"); name != "images" {
			names = append(names, name)
		}
	}
	return names
}

// message decodes a recorded request.
func message(t *testing.T, rpc string, text []byte) proto.Message {
	t.Helper()
	m, err := messageOf(rpc)
	if err != nil {
		t.Fatal(err)
	}
	if err := protojson.Unmarshal(text, m); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestPoliciesAllowWhatKataSendsAndNothingMore: the policy that the tool makes from a manifest allows each request that Kata's runtime
// really sends for that pod, and none of its mutations. Where the tool warned that the guest will refuse a container's other mounts,
// the guest must do so: a warning that is wrong is as bad as one that is missing.
func TestPoliciesAllowWhatKataSendsAndNothingMore(t *testing.T) {
	t.Parallel()
	images := recordedImages(t)
	for _, name := range recordedManifests(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			manifest := read(t, "testdata/manifests/"+name+".yaml")
			result, err := Annotate(t.Context(), manifest, Options{Images: images})
			if err != nil {
				t.Fatal(err)
			}
			if !isPart(string(manifest), string(result.Manifest)) {
				t.Error("bytes of the manifest are gone")
			}
			var record recorded
			if err := json.Unmarshal(read(t, "testdata/recorded/"+name+".json"), &record); err != nil {
				t.Fatal(err)
			}
			for _, pod := range record.Pods {
				i := slices.IndexFunc(result.Pods, func(p Pod) bool { return p.Name == pod.Kind+"/"+pod.Name })
				if i < 0 {
					t.Fatalf("no policy for %s/%s", pod.Kind, pod.Name)
				}
				p, err := policy.Load(t.Context(), result.Pods[i].Policy)
				if err != nil {
					t.Fatal(err)
				}
				player := player{policy: p, live: map[string]string{}}
				for _, w := range result.Warnings {
					if strings.HasPrefix(w, result.Pods[i].Name+": ") && strings.Contains(w, "the guest refuses containers with mounts") {
						player.warned = append(player.warned, w)
					}
				}
				for n, r := range pod.Requests {
					t.Run(fmt.Sprintf("%s/%d %s %s", pod.Name, n, r.RPC, r.Container), func(t *testing.T) {
						player.play(t, r.RPC, r.Container, message(t, r.RPC, r.Request))
					})
				}
			}
		})
	}
}

// player sends a pod's requests to its policy, in their order.
type player struct {
	policy *policy.Policy
	live   map[string]string // containers, by id
	warned []string          // that the guest will refuse mounts
}

func (p *player) decide(t *testing.T, rpc string, req proto.Message) error {
	t.Helper()
	_, err := p.policy.Decide(t.Context(), rpc, req, policy.State{Containers: p.live})
	return err
}

func (p *player) play(t *testing.T, rpc, container string, req proto.Message) {
	err := p.decide(t, rpc, req)
	create, _ := req.(*agent.CreateContainerRequest)
	refused := create != nil && slices.ContainsFunc(p.warned, func(w string) bool { return strings.Contains(w, fmt.Sprintf("%q: volumeMounts", container)) })
	if rpc == "UpdateEphemeralMounts" {
		refused = len(p.warned) > 0
	}
	switch {
	case !refused && err != nil:
		t.Errorf("what Kata really sends for the pod must be allowed: %v", err)
	case refused && err == nil:
		t.Errorf("the author was warned for nothing: %q", p.warned)
	case refused && !errdefs.IsPermissionDenied(err):
		t.Error(err)
	}
	if err == nil && create != nil && container != "" {
		for what, mutated := range mutations(create) {
			if p.policy.Containers()[container].Args == nil && strings.HasPrefix(what, "argument") {
				continue // the author was warned
			}
			if err := p.decide(t, rpc, mutated); !errdefs.IsPermissionDenied(err) {
				t.Errorf("%s: must be denied, got %v", what, err)
			}
		}
	}
	if exec, ok := req.(*agent.ExecProcessRequest); ok && err == nil {
		mutated := proto.Clone(exec).(*agent.ExecProcessRequest)
		mutated.Process.Args = append(mutated.Process.Args, "more")
		if err := p.decide(t, rpc, mutated); !errdefs.IsPermissionDenied(err) {
			t.Errorf("another command must be denied, got %v", err)
		}
	}
	if create != nil {
		p.live[create.ContainerId] = container
	}
}

// mutations are changes of a request, each of which asks for more or other than the manifest does.
func mutations(request *agent.CreateContainerRequest) map[string]*agent.CreateContainerRequest {
	mutated := map[string]*agent.CreateContainerRequest{}
	change := func(what string, f func(*agent.CreateContainerRequest)) {
		m := proto.Clone(request).(*agent.CreateContainerRequest)
		f(m)
		mutated[what] = m
	}
	const share = "/run/kata-containers/shared/containers/"
	change("argument more", func(m *agent.CreateContainerRequest) { m.OCI.Process.Args = append(m.OCI.Process.Args, "more") })
	change("argument less", func(m *agent.CreateContainerRequest) {
		m.OCI.Process.Args = m.OCI.Process.Args[:len(m.OCI.Process.Args)-1]
	})
	change("another image", func(m *agent.CreateContainerRequest) { m.OCI.Annotations["io.kubernetes.cri.image-name"] += "x" })
	change("another name", func(m *agent.CreateContainerRequest) { m.OCI.Annotations["io.kubernetes.cri.container-name"] += "x" })
	change("another mount", func(m *agent.CreateContainerRequest) {
		m.OCI.Mounts = append(m.OCI.Mounts, &agent.Mount{Destination: "/more", Type: "bind", Source: share + "more", Options: []string{"rbind", "rw"}})
	})
	change("another storage", func(m *agent.CreateContainerRequest) {
		m.Storages = append(m.Storages, &agent.Storage{Driver: "blk", Source: "1f/1f", Fstype: "ext4", MountPoint: "/run/kata-containers/sandbox/storage/more"})
	})
	change("a device", func(m *agent.CreateContainerRequest) {
		m.OCI.Linux.Devices = append(m.OCI.Linux.Devices, &agent.LinuxDevice{Path: "/dev/sda", Type: "b", Major: 8})
	})
	change("a capability", func(m *agent.CreateContainerRequest) {
		m.OCI.Process.Capabilities.Bounding = append(m.OCI.Process.Capabilities.Bounding, "CAP_SYS_ADMIN")
	})
	change("the guest's mount namespace", func(m *agent.CreateContainerRequest) {
		m.OCI.Linux.Namespaces = slices.DeleteFunc(m.OCI.Linux.Namespaces, func(n *agent.LinuxNamespace) bool { return n.Type == "mount" })
	})
	for i, mount := range request.OCI.Mounts {
		if !slices.ContainsFunc(request.Storages, func(s *agent.Storage) bool { return s.Driver == "blk" && s.MountPoint == mount.Source }) {
			continue
		}
		at := mount.Destination
		change("volume left out at "+at, func(m *agent.CreateContainerRequest) { m.OCI.Mounts = slices.Delete(m.OCI.Mounts, i, i+1) })
		change("volume moved from "+at, func(m *agent.CreateContainerRequest) { m.OCI.Mounts[i].Destination += "x" })
		change("volume from the host at "+at, func(m *agent.CreateContainerRequest) { m.OCI.Mounts[i].Source = share + "x" })
		change("volume hidden at "+at, func(m *agent.CreateContainerRequest) {
			m.OCI.Mounts = append(m.OCI.Mounts, &agent.Mount{Destination: at + "/in", Type: "tmpfs", Source: "tmpfs"})
		})
		for j, s := range request.Storages {
			if s.Driver == "blk" && s.MountPoint != mount.Source {
				change(fmt.Sprintf("volume at %s and another on one device", at), func(m *agent.CreateContainerRequest) {
					m.Storages[j].Source = m.Storages[slices.IndexFunc(m.Storages, func(s *agent.Storage) bool { return s.MountPoint == mount.Source })].Source
				})
			}
		}
	}
	return mutated
}

// TestManifestsThatAreRefused: each has a trap, and the error names it.
func TestManifestsThatAreRefused(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/manifests/refused/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			result, err := Annotate(t.Context(), read(t, file), Options{})
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("want a refusal, got %v\n%s", err, result.Manifest)
			}
		})
	}
}

// TestManifestsOfAllKinds: each manifest gets policies, whether or not its pods were recorded.
func TestManifestsOfAllKinds(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/manifests/*.yaml")
	if err != nil || len(files) < 30 {
		t.Fatalf("%d manifests, %v", len(files), err)
	}
	images := recordedImages(t)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			manifest := read(t, file)
			result, err := Annotate(t.Context(), manifest, Options{Images: images})
			if err != nil {
				t.Fatal(err)
			}
			wantOnlyAnnotations(t, manifest, Options{Images: images}, result)
		})
	}
}
