package author

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/policy"
)

// Check decides one request of the host as the guest would. rpc is CreateSandbox, CreateContainer, ExecProcess or UpdateEphemeralMounts,
// and request its message as protobuf JSON. The error is that of policy.Decide, or errdefs.ErrInvalidArgument for what is no request.
func Check(ctx context.Context, p *policy.Policy, rpc string, request []byte, state policy.State) (policy.Decision, error) {
	var message proto.Message
	switch rpc {
	case "CreateSandbox":
		message = &agent.CreateSandboxRequest{}
	case "CreateContainer":
		message = &agent.CreateContainerRequest{}
	case "ExecProcess":
		message = &agent.ExecProcessRequest{}
	case "UpdateEphemeralMounts":
		message = &agent.UpdateEphemeralMountsRequest{}
	default:
		return policy.Decision{}, fmt.Errorf("a policy has no say in %q, only in CreateSandbox, CreateContainer, ExecProcess and UpdateEphemeralMounts: %w",
			rpc, errdefs.ErrInvalidArgument)
	}
	if err := protojson.Unmarshal(request, message); err != nil {
		return policy.Decision{}, fmt.Errorf("%s request: %s: %w", rpc, oneLine(err), errdefs.ErrInvalidArgument)
	}
	return p.Decide(ctx, rpc, message, state)
}
