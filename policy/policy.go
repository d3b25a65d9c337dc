// Package policy reads a pod's policy and decides with it.
//
// The policy is Rego text of package agent_policy, as Kata carries it to the guest in SetPolicy. Its rule sealed_pod is data: the
// containers and the volumes of the pod, parsed here into types that cannot be wrong. What follows from that data for a request of
// the host is decided by the framework (framework.rego, embedded and so measured with the guest), never by the author's text.
//
// The package runs in the guest, on text and requests that the host wrote. It touches no file, no network and no clock, and imports
// nothing of the guest's other parts.
package policy

import (
	"context"

	"google.golang.org/protobuf/proto"
)

// MaxText bounds the policy's text, in bytes.
const MaxText = 1 << 20

// Policy is a pod's policy, loaded and found valid. It does not change and may be used by several goroutines at once.
type Policy struct {
	text       []byte
	digest     string
	sealed     bool
	containers map[string]Container
	volumes    map[string]Volume
}

// State is what the guest knows about the pod while it judges a request.
type State struct {
	// Containers maps the id of each live container to its name in the policy; "" is the sandbox container.
	Containers map[string]string `json:"containers"`
}

// Decision is what an allowed request stands for.
type Decision struct {
	// Container is the container's name in the policy. It is empty for the sandbox container and for pods without sealed_pod.
	Container string
	// Sandbox says that the request is about the pod's sandbox container.
	Sandbox bool
	// Attachments are the volumes that a CreateContainer gives the container, in the order of its mounts.
	Attachments []Attachment
}

// Attachment joins a volume of the policy with the mount and the storage that stand for it in a CreateContainer request.
type Attachment struct {
	Volume  string
	Mount   int // index into OCI.Mounts
	Storage int // index into storages
}

// Load parses and evaluates a policy. A text without sealed_pod is a policy too: its pod gets no volume.
//
// The error is errdefs.ErrInvalidArgument for a text or a value that is wrong, errdefs.ErrFailedPrecondition for one that this
// version does not support yet; it names the key.
func Load(ctx context.Context, text []byte) (*Policy, error) {
	panic("policy: not built yet")
}

// Default is the policy of a pod that brings none: any container, no volume, no block storage.
func Default() *Policy {
	panic("policy: not built yet")
}

// Sealed reports whether the policy has a sealed_pod, so that only what it names may run.
func (p *Policy) Sealed() bool { return p.sealed }

// Digest is the SHA-256 of the text as it arrived, in lower-case hex.
func (p *Policy) Digest() string { return p.digest }

// AgentText is what the agent gets in SetPolicy: the text, and a rule for each request that the gate passes and the text has none for.
func (p *Policy) AgentText() []byte {
	panic("policy: not built yet")
}

// Containers are the containers that may run in the pod, by name. The caller must not change them.
func (p *Policy) Containers() map[string]Container { return p.containers }

// Volumes are the pod's volumes, by name. The caller must not change them.
func (p *Policy) Volumes() map[string]Volume { return p.volumes }

// Decide judges one request of the host. rpc is the name of a method of the agent's service; the framework judges CreateSandbox,
// CreateContainer, ExecProcess and UpdateEphemeralMounts, and denies every other name.
//
// A denial is errdefs.ErrPermissionDenied: one line that names container, rule and next step and is fit for the host's eyes.
func (p *Policy) Decide(ctx context.Context, rpc string, req proto.Message, state State) (Decision, error) {
	panic("policy: not built yet")
}
