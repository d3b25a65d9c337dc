//go:build node

package node

import (
	"slices"
	"strings"
	"testing"

	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/policy"
	"github.com/sealvol/sealvol/policy/mutation"
)

// judge is what a host knows of a guest's mind: the policy, and the state that the host itself has brought about.
type judge struct {
	policy *policy.Policy
	state  policy.State
}

func (p *player) judge() judge {
	p.Helper()
	loaded, err := policy.Load(p.ctx, []byte(playedPolicy))
	if err != nil {
		p.Fatal(err)
	}
	at := p.status().Volumes[0].PciPath
	return judge{loaded, policy.State{
		Containers: map[string]string{p.sandbox: "", p.container: "my-container"},
		Volumes:    map[string]string{"encrypted": at},
		Paths:      map[string]string{storagePath(at): "encrypted"},
		Shared:     true,
	}}
}

// decide is nil for a request that the guest would seal volumes for.
func (p *player) decide(j judge, req proto.Message) error {
	_, err := j.policy.Decide(p.ctx, "CreateContainer", req, j.state)
	return err
}

// The stream of the policy's own test (policy/mutation), against the real gate: each change that is not on the list of what is harmless is
// refused, and nothing comes of it. By default each 45th is tried, with KINDS=all each.
func (p *player) mutatedRequests(t *testing.T) {
	p = p.in(t)
	j := p.judge()
	original := p.request("third", absent[:]...)
	if err := p.decide(j, original); err != nil {
		t.Fatalf("the request that is changed must be permitted as it is: %v", err)
	}
	stride := 45
	if every {
		stride = 1
	}
	list := mutation.Harmless()
	before := p.status().ResidentBytes
	refused, n := map[codes.Code]int{}, 0
	for m := range mutation.All(original) {
		if n++; n%stride != 0 || slices.ContainsFunc(list, func(h mutation.HarmlessChange) bool { return h.Matches(m) }) {
			continue
		}
		err := p.refusal(m.Message.(*kata.CreateContainerRequest))
		code := status.Code(err)
		refused[code]++
		switch {
		case code == codes.PermissionDenied && strings.Contains(err.Error(), "policy denies"):
		case code == codes.InvalidArgument: // ids and messages that are no such thing, before the policy is asked
		default:
			t.Errorf("%v: the gate must refuse it by the policy, and says %v", m, err)
		}
	}
	after := p.status().ResidentBytes
	if after > before+64*mib {
		t.Errorf("the guest's service has grown from %d to %d bytes", before, after)
	}
	t.Logf("%d changes, every %dth of them that is not harmless refused: %v; the service had %d bytes and has %d", n, stride, refused, before, after)
}
