package mutation

import (
	"slices"
	"testing"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
)

// A test that fails names a mutation, and the next run must have the same one.
func TestStreamIsTheSameEachTimeAndLeavesTheOriginalAlone(t *testing.T) {
	t.Parallel()
	original := &agent.CreateContainerRequest{
		ContainerId: "c", Storages: []*agent.Storage{{Driver: "blk", Options: []string{"a", "b"}}, {Driver: "x"}},
		OCI: &agent.Spec{Annotations: map[string]string{"b": "1", "a": "2"}, Process: &agent.Process{Terminal: true}},
	}
	before := proto.Clone(original)
	names := func() (all []string) {
		for m := range All(original) {
			all = append(all, m.String())
			if proto.Equal(m.Message, original) {
				t.Errorf("%v changes nothing", m)
			}
		}
		return all
	}
	first := names()
	if !slices.Equal(first, names()) {
		t.Error("the stream is another one each time")
	}
	if !proto.Equal(original, before) {
		t.Errorf("the original has become %v", original)
	}
	for _, want := range []string{
		`container_id = ""`, `storages[0] drop`, `storages[0] double`, `storages[0] swap with the next`, `storages[0].options[1] drop`, `storages drop all`,
		`OCI.Annotations["a"] drop`, `OCI.Annotations["cdi.k8s.io/x"] add`, `OCI.Process.Terminal = false`, `OCI.Process drop`,
		`OCI.Root = {}`, `OCI.Linux = {Devices: [{Path: "/"}]}`, `devices add {type: "blk"}`, `sandbox_pidns = true`,
	} {
		if !slices.Contains(first, want) {
			t.Errorf("no mutation is %s", want)
		}
	}
	stopped := 0
	for range All(original) {
		if stopped++; stopped == 3 {
			break
		}
	}
	if stopped != 3 {
		t.Errorf("it went on for %d after it was told to stop", stopped)
	}
}
