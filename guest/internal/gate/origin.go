package gate

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// The sources of a policy, as the control service names them.
const (
	FromInitData  = "init-data"
	FromImage     = "image"
	FromSetPolicy = "set-policy"
)

// Origin says where Config.Default comes from, and whether the host may bring another policy.
type Origin struct {
	// Source is FromInitData or FromImage.
	Source string
	// Text is that of Config.Default; "" for the guest's own, which is not the agent's business.
	Text string
	// Fixed says that SetPolicy may bring no text but that. Otherwise it may bring any, once.
	Fixed bool
	// InitData is the document that the guest was launched with; nil: none.
	InitData *sealvolv1.InitData
	// Refused is why nothing is accepted at all, fit for the host's eyes. It is nil otherwise.
	Refused error
	// Warnings are what weakens this, a line each.
	Warnings []string
}

// confirm answers a SetPolicy that can change nothing: Kata's shim sends one whenever the pod has the annotation, whatever else the
// guest knows.
func (g *Gate) confirm(ctx context.Context, text string) error {
	if text != g.Origin.Text {
		return fmt.Errorf("the policy in force comes from the %s, and the host brings another: remove the pod's annotation io.katacontainers.config.agent.policy, or give it the same text: %w",
			g.Origin.Source, errdefs.ErrPermissionDenied)
	}
	return g.tellAgent(ctx)
}

// tellAgent gives the agent the policy that is in force from the beginning, once, unless it has another by SetPolicy. The caller holds the
// paths whole.
func (g *Gate) tellAgent(ctx context.Context) error {
	g.mu.Lock()
	pol, told := g.policy, g.policySent
	g.mu.Unlock()
	if told {
		return nil
	}
	if _, err := g.forward(ctx, "SetPolicy", &agent.SetPolicyRequest{Policy: string(pol.AgentText())}); err != nil {
		return fmt.Errorf("the agent does not take the policy of the %s: %v: %w", g.Origin.Source, err, errdefs.ErrFailedPrecondition)
	}
	g.mu.Lock()
	g.policySent = true
	g.mu.Unlock()
	return nil
}
