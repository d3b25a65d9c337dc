package policy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/proto"
)

// State is what the guest knows about the pod while it judges a request.
type State struct {
	// Containers maps the id of each live container to its name in the policy; "" is the sandbox container.
	Containers map[string]string `json:"containers"`
	// Volumes maps each volume that has a device at present to the device's address, as Storage.source has it.
	Volumes map[string]string `json:"volumes"`
	// Devices are the disks that the guest sees at the addresses of the request; one that has not come yet is not here.
	Devices map[string]Device `json:"devices"`
	// Paths maps the mount points by which the host knows volumes to their names.
	Paths map[string]string `json:"paths"`
	// Shared says that the sandbox has a file system that the host serves.
	Shared bool `json:"shared"`
}

// Device is a disk as the guest sees it.
type Device struct {
	Plain    bool   `json:"plain"` // it is one disk of the storage's driver and nothing else
	ReadOnly bool   `json:"read_only"`
	Bytes    uint64 `json:"bytes"`
}

// value is the state as the framework sees it.
func (s State) value() *ast.Term {
	devices := ast.NewObject()
	for path, d := range s.Devices {
		devices.Insert(ast.StringTerm(path), ast.ObjectTerm(
			ast.Item(ast.StringTerm("plain"), ast.BooleanTerm(d.Plain)),
			ast.Item(ast.StringTerm("read_only"), ast.BooleanTerm(d.ReadOnly)),
			ast.Item(ast.StringTerm("bytes"), ast.UIntNumberTerm(d.Bytes)),
		))
	}
	return ast.ObjectTerm(
		ast.Item(ast.StringTerm("containers"), texts(s.Containers)),
		ast.Item(ast.StringTerm("volumes"), texts(s.Volumes)),
		ast.Item(ast.StringTerm("devices"), ast.NewTerm(devices)),
		ast.Item(ast.StringTerm("paths"), texts(s.Paths)),
		ast.Item(ast.StringTerm("shared"), ast.BooleanTerm(s.Shared)),
	)
}

func texts(m map[string]string) *ast.Term {
	o := ast.NewObject()
	for key, value := range m {
		o.Insert(ast.StringTerm(key), ast.StringTerm(value))
	}
	return ast.NewTerm(o)
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
// driver and source are the address of a disk; its other fields, and the mount's source and options, are the host's words and to be replaced.
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

// Denial is a request that the policy does not allow. It is errdefs.ErrPermissionDenied, and its text is one line that names the
// container, the rule and the next step, fit for the host's eyes.
type Denial struct {
	// Subject is what was denied: a container, or the method where the request is about none.
	Subject string
	// Rules are the names of all rules that say no. Reason is about the first.
	Rules []string
	// Reason says what is wrong and what to do about it.
	Reason string
}

func (d *Denial) Error() string {
	return fmt.Sprintf("policy denies %s (rule %s): %s: %v", d.Subject, d.Rules[0], d.Reason, errdefs.ErrPermissionDenied)
}

// Unwrap gives the class.
func (d *Denial) Unwrap() error { return errdefs.ErrPermissionDenied }

// Judges reports whether it matters what a request of a method says. Decide allows every other, whatever the state.
func (p *Policy) Judges(rpc string) bool { return !p.framework.unjudged[rpc] || p.author != nil }

// Decide judges one request of the host. rpc is the name of a method of the agent's services and req its message. A method that the
// framework does not know is denied.
//
// What is denied is a *Denial. A request that cannot be judged is an error of another class, and no less denied.
func (p *Policy) Decide(ctx context.Context, rpc string, req proto.Message, state State) (Decision, error) {
	if !p.Judges(rpc) {
		return Decision{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, evalLimit)
	defer cancel()
	if err := ctx.Err(); err != nil { // the interpreter looks only now and then
		return Decision{}, fmt.Errorf("policy: judging %s: %w", printable(rpc), err)
	}
	input, err := p.input(rpc, req, state)
	if err != nil {
		return Decision{}, fmt.Errorf("policy: reading %s: %w", printable(rpc), errors.Join(errdefs.ErrInvalidArgument, err))
	}
	v, err := p.judge(ctx, input)
	if err != nil {
		return Decision{}, fmt.Errorf("policy: judging %s: %w", printable(rpc), err)
	}
	if len(v.Denied) == 0 && p.author != nil {
		v.Denied, v.Reason = p.ask(ctx, input)
	}
	if len(v.Denied) > 0 {
		return Decision{}, v.denial(rpc)
	}
	if !p.Sealed() {
		v.Container = ""
	}
	return v.Decision, nil
}

// judge asks the framework.
func (p *Policy) judge(ctx context.Context, input ast.Value) (v verdict, err error) {
	value, err := p.framework.eval(ctx, p.framework.verdict, ast.NewTerm(input))
	if err != nil {
		return v, errors.Join(errdefs.ErrInternal, err)
	}
	if value == nil {
		return v, fmt.Errorf("there is no verdict: %w", errdefs.ErrInternal)
	}
	if err := decode(value, &v); err != nil {
		return v, errors.Join(errdefs.ErrInternal, err)
	}
	return v, nil
}

// decode gives a value of the framework's a type.
func decode(value ast.Value, into any) error {
	plain, err := ast.JSON(value)
	if err != nil {
		return err
	}
	text, err := json.Marshal(plain)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

// ask asks the author's own rules. Whatever goes wrong with them is a denial too.
func (p *Policy) ask(ctx context.Context, input ast.Value) (denied []string, reason string) {
	reasons, err := p.author.denials(ctx, ast.NewTerm(input))
	switch {
	case err != nil:
		return []string{denyRule}, "the author's own rules came to no answer (" + OneLine(err.Error()) + "); correct them"
	case len(reasons) > 0:
		return []string{denyRule}, OneLine(reasons[0]) + "; the author's own rules say so"
	}
	return nil, ""
}

// denial says in one line what is wrong and what to do about it.
func (v verdict) denial(rpc string) *Denial {
	d := &Denial{Subject: printable(rpc), Rules: v.Denied}
	switch {
	case v.Sandbox:
		d.Subject = "the sandbox container"
	case v.Container != "":
		d.Subject = "container " + printable(v.Container)
	}
	culprit := ""
	if len(v.Culprits) > 0 {
		culprit = printable(v.Culprits[0])
	}
	d.Reason = strings.Join(strings.Fields(strings.Replace(v.Reason, "{}", culprit, 1)), " ")
	return d
}

// input is what the framework and the author's rules see.
func (p *Policy) input(rpc string, req proto.Message, state State) (ast.Value, error) {
	request, err := messageTerm(req.ProtoReflect())
	if err != nil {
		return nil, err
	}
	return ast.NewObject(
		ast.Item(ast.StringTerm("rpc"), ast.StringTerm(rpc)),
		ast.Item(ast.StringTerm("request"), request),
		ast.Item(ast.StringTerm("state"), state.value()),
		ast.Item(ast.StringTerm("pod"), p.document),
	), nil
}
