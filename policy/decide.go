package policy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/util"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// State is what the guest knows about the pod while it judges a request.
type State struct {
	// Containers maps the id of each live container to its name in the policy; "" is the sandbox container.
	Containers map[string]string `json:"containers"`
}

// Decision is what an allowed request stands for.
type Decision struct {
	// Container is the container's name in the policy. It is empty for the sandbox container and for pods without sealed_pod.
	Container string `json:"container"`
	// Sandbox says that a CreateContainer makes the pod's sandbox container.
	Sandbox bool `json:"sandbox"`
	// Attachments are the volumes that a CreateContainer gives the container, in the order of its mounts: all that the policy
	// declares for it, and one for each storage of the request.
	Attachments []Attachment `json:"attachments"`
}

// Attachment joins a volume of the policy with the mount and the storage that stand for it in a CreateContainer request. The storage's
// source is a PCI path; its other fields, and the mount's source and options, are the host's words and to be replaced.
type Attachment struct {
	Volume   string `json:"volume"`
	Mount    int    `json:"mount"`     // index into OCI.Mounts
	Storage  int    `json:"storage"`   // index into storages
	ReadOnly bool   `json:"read_only"` // as the policy says for this container
}

// verdict is what the framework answers.
type verdict struct {
	Decision
	Denied   []string `json:"denied"` // rules that do not hold; none: allowed
	Reason   string   `json:"reason"` // of the first; {} stands for the culprit
	Culprits []string `json:"culprits"`
}

// Decide judges one request of the host. rpc is the name of a method of the agent's service and req its message. The framework judges
// CreateSandbox, CreateContainer, ExecProcess and UpdateEphemeralMounts, and denies every other name: what else may pass is a matter of
// protocol, and the gate's.
//
// A denial is errdefs.ErrPermissionDenied: one line that names the container, the rule and the next step, fit for the host's eyes. A
// request that cannot be judged is an error of another class, and no less denied.
func (p *Policy) Decide(ctx context.Context, rpc string, req proto.Message, state State) (Decision, error) {
	input, err := p.input(rpc, req, state)
	if err != nil {
		return Decision{}, fmt.Errorf("policy: reading %s: %w", printable(rpc), errors.Join(errdefs.ErrInvalidArgument, err))
	}
	ctx, cancel := context.WithTimeout(ctx, evalLimit)
	defer cancel()
	if err := ctx.Err(); err != nil { // the interpreter looks only now and then
		return Decision{}, fmt.Errorf("policy: judging %s: %w", printable(rpc), err)
	}
	results, err := p.framework.Eval(ctx, rego.EvalParsedInput(input))
	if err != nil {
		return Decision{}, fmt.Errorf("policy: judging %s: %w", printable(rpc), errors.Join(errdefs.ErrInternal, err))
	}
	if len(results) != 1 || len(results[0].Expressions) != 1 {
		return Decision{}, fmt.Errorf("policy: no verdict on %s: %w", printable(rpc), errdefs.ErrInternal)
	}
	text, err := json.Marshal(results[0].Expressions[0].Value)
	if err != nil {
		return Decision{}, fmt.Errorf("policy: verdict on %s: %w", printable(rpc), errors.Join(errdefs.ErrInternal, err))
	}
	var v verdict
	if err := json.Unmarshal(text, &v); err != nil {
		return Decision{}, fmt.Errorf("policy: verdict on %s: %w", printable(rpc), errors.Join(errdefs.ErrInternal, err))
	}
	if len(v.Denied) > 0 {
		return Decision{}, v.denial(rpc)
	}
	if !p.Sealed() {
		v.Container = ""
	}
	return v.Decision, nil
}

// denial says in one line what is wrong and what to do about it.
func (v verdict) denial(rpc string) error {
	subject := printable(rpc)
	switch {
	case v.Sandbox:
		subject = "the sandbox container"
	case v.Container != "":
		subject = "container " + printable(v.Container)
	}
	culprit := ""
	if len(v.Culprits) > 0 {
		culprit = printable(v.Culprits[0])
	}
	reason := strings.Join(strings.Fields(strings.Replace(v.Reason, "{}", culprit, 1)), " ")
	return fmt.Errorf("policy denies %s (rule %s): %s: %w", subject, v.Denied[0], reason, errdefs.ErrPermissionDenied)
}

// input is what the framework sees.
func (p *Policy) input(rpc string, req proto.Message, state State) (ast.Value, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(req)
	if err != nil {
		return nil, err
	}
	var request any
	if err := util.UnmarshalJSON(text, &request); err != nil {
		return nil, err
	}
	value, err := ast.InterfaceToValue(request)
	if err != nil {
		return nil, err
	}
	containers := ast.NewObject()
	for id, name := range state.Containers {
		containers.Insert(ast.StringTerm(id), ast.StringTerm(name))
	}
	return ast.NewObject(
		ast.Item(ast.StringTerm("rpc"), ast.StringTerm(rpc)),
		ast.Item(ast.StringTerm("request"), ast.NewTerm(value)),
		ast.Item(ast.StringTerm("state"), ast.ObjectTerm(ast.Item(ast.StringTerm("containers"), ast.NewTerm(containers)))),
		ast.Item(ast.StringTerm("pod"), p.document),
	), nil
}
