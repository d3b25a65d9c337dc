package author

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/sealvol/sealvol/policy"
)

// Check decides one request of the host as the guest would. rpc is a method of the agent's service, and request its message as protobuf
// JSON. The error is that of policy.Decide, or errdefs.ErrInvalidArgument for what is no request.
func Check(ctx context.Context, p *policy.Policy, rpc string, request []byte, state policy.State) (policy.Decision, error) {
	message, err := messageOf(rpc)
	if err != nil {
		return policy.Decision{}, err
	}
	if err := protojson.Unmarshal(request, message); err != nil {
		return policy.Decision{}, fmt.Errorf("%s request: %s: %w", rpc, oneLine(err), errdefs.ErrInvalidArgument)
	}
	return p.Decide(ctx, rpc, message, state)
}

// messageOf makes an empty message of a method of the agent's service (Kata's src/libs/protocols/protos/agent.proto).
func messageOf(rpc string) (proto.Message, error) {
	service := agent.File_agent_proto.Services().ByName("AgentService")
	method := service.Methods().ByName(protoreflect.Name(rpc))
	if method == nil {
		return nil, fmt.Errorf("the agent has no method %q: %w", rpc, errdefs.ErrInvalidArgument)
	}
	message, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
	if err != nil {
		return nil, fmt.Errorf("method %s: %w: %w", rpc, err, errdefs.ErrInternal)
	}
	return message.New().Interface(), nil
}
