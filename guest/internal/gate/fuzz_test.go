package gate

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/frame"
	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/policy"
)

// FuzzCreateContainer gives the gate a request frame's payload, whatever it is, and takes it
// through decoding and rewriting. The policy is a fake that attaches every storage: the real
// one is fuzzed beside its code, and evaluating Rego leaves no time for anything else.
func FuzzCreateContainer(f *testing.F) {
	seed := func(change func(*agent.CreateContainerRequest)) {
		req := sealedCreate()
		change(req)
		p, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		p, err = proto.Marshal(&ttrpc.Request{Service: agentService, Method: "CreateContainer", Payload: p, TimeoutNano: 1})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	seed(func(*agent.CreateContainerRequest) {})
	seed(func(r *agent.CreateContainerRequest) { r.Storages[0].Driver = "ephemeral" })
	seed(func(r *agent.CreateContainerRequest) { r.Storages[0].Source = "../01" })
	seed(func(r *agent.CreateContainerRequest) { r.OCI = nil })
	seed(func(r *agent.CreateContainerRequest) { r.OCI.Mounts[1].Source = "/run/sealvol/volumes/data" })
	seed(func(r *agent.CreateContainerRequest) { r.ProtoReflect().SetUnknown(unknownField()) })
	seed(func(r *agent.CreateContainerRequest) { r.Storages[0].ProtoReflect().SetUnknown([]byte(sharedTrue)) })
	pol := fakePolicy{}
	g := &Gate{methods: methods(), storages: map[string]string{}}
	f.Fuzz(func(t *testing.T, payload []byte) {
		m, msg, _, err := g.parse(payload)
		if err != nil || m.name != "CreateContainer" {
			if err != nil && hostStatus(err).Message() == "" {
				t.Errorf("%v says nothing to the host", err)
			}
			return
		}
		if err := frame.Unmarshal(mustMarshal(t, msg), m.in.New().Interface(), nil); err != nil {
			t.Errorf("what passed once does not pass again: %v", err)
		}
		req := msg.(*agent.CreateContainerRequest)
		dec, err := pol.Decide(t.Context(), "CreateContainer", req, policy.State{})
		if err != nil {
			t.Fatal(err)
		}
		all, err := attachments(dec, pol.Volumes(), req)
		if err != nil {
			if errdefs.IsInternal(err) && len(req.Storages) <= len(req.OCI.GetMounts()) {
				t.Error(err)
			}
			return
		}
		mounts := len(req.OCI.GetMounts())
		g.dropStorages(all, req)
		if len(req.Storages) != 0 || len(req.OCI.GetMounts()) != mounts {
			t.Errorf("left for the agent: %v", req.Storages)
		}
		for _, a := range all {
			if a.address == (device.Address{}) {
				t.Errorf("volume %s without a disk's address", a.Volume)
			}
		}
	})
}

func mustMarshal(t *testing.T, m proto.Message) []byte {
	p, err := proto.Marshal(m)
	must(t, err)
	return p
}
