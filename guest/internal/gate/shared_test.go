package gate

import (
	"testing"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

// upstreamCreate is sealedCreate as Kata 4.1 sends it for an emptyDir with emptydir_mode = "block-encrypted".
func upstreamCreate() *agent.CreateContainerRequest {
	req := sealedCreate()
	req.Storages[0].DriverOptions = []string{"encryption_key=ephemeral", "create_filesystem"}
	req.Storages[0].ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 8, protowire.VarintType), 1)) // shared = true
	return req
}

func TestUpstreamsEncryptedEmptyDirIsSealedByTheGate(t *testing.T) {
	t.Parallel()
	h := start(t, withRealPolicies)
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: realPolicy})
	must(t, err)
	h.sandbox().forget()
	_, err = h.host.CreateContainer(soon(t), upstreamCreate())
	must(t, err)
	h.wantJournal("acquire data", "attach data", "agent CreateContainer", "detach data")
	got := h.agent.last("CreateContainer").(*agent.CreateContainerRequest)
	if m := got.OCI.Mounts[1]; m.Source != "/run/sealvol/volumes/data" || len(got.Storages) != 0 {
		t.Errorf("the agent got %v and %v: it would ask the data hub for a key and a file system", m, got.Storages)
	}
}

func TestUpstreamsEncryptedEmptyDirWithoutPolicyIsDenied(t *testing.T) {
	t.Parallel()
	h := start(t, withRealPolicies).sandbox()
	h.forget()
	_, err := h.host.CreateContainer(soon(t), upstreamCreate())
	wants(t, err, codes.PermissionDenied, "write a policy")
	h.wantJournal()
}

// What the types of 3.20 do not have passes at one place with one value, and is refused everywhere else.
func TestSharedIsAnUnknownFieldWhereTheAgentMaySeeIt(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(s *agent.Storage){
		"on a memory volume":   func(s *agent.Storage) { s.Driver, s.Source = "ephemeral", "tmpfs" },
		"on the share":         func(s *agent.Storage) { s.Driver, s.Source = "virtio-fs", "kataShared" },
		"on a disk of no form": func(s *agent.Storage) { s.Source = "/dev/vda" },
		"twice":                func(s *agent.Storage) { s.ProtoReflect().SetUnknown([]byte(sharedTrue + sharedTrue)) },
		"with another value":   func(s *agent.Storage) { s.ProtoReflect().SetUnknown([]byte("\x40\x02")) },
		"false, which nobody writes": func(s *agent.Storage) {
			s.ProtoReflect().SetUnknown([]byte("\x40\x00"))
		},
		"true in more bytes":   func(s *agent.Storage) { s.ProtoReflect().SetUnknown([]byte("\x40\x81\x00")) },
		"of another type":      func(s *agent.Storage) { s.ProtoReflect().SetUnknown([]byte("\x42\x01\x01")) },
		"beside another field": func(s *agent.Storage) { s.ProtoReflect().SetUnknown([]byte(sharedTrue + "\x48\x01")) },
		"another field alone":  func(s *agent.Storage) { s.ProtoReflect().SetUnknown([]byte("\x48\x01")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t).sandbox()
			h.forget()
			req := upstreamCreate()
			change(req.Storages[0])
			_, err := h.host.CreateContainer(soon(t), req)
			wants(t, err, codes.InvalidArgument, "unknown field", "Storage")
			h.wantJournal()
		})
	}
	t.Run("on the mount", func(t *testing.T) {
		t.Parallel()
		h := start(t).sandbox()
		h.forget()
		req := upstreamCreate()
		req.OCI.Mounts[1].ProtoReflect().SetUnknown([]byte(sharedTrue))
		_, err := h.host.CreateContainer(soon(t), req)
		wants(t, err, codes.InvalidArgument, "unknown field", "Mount")
		h.wantJournal()
	})
}
