package gate

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// bound is a gate whose policy is in force from the beginning.
func bound(source string) option {
	return func(c *Config) {
		c.Default = fakePolicy{text: "authors"}
		c.Origin = Origin{Source: source, Text: "authors", Fixed: true, InitData: &sealvolv1.InitData{Algorithm: "sha384", Digest: "d"}}
		c.Load = func(context.Context, []byte) (Policy, error) {
			return nil, fmt.Errorf("the host's text was loaded: %w", errdefs.ErrInternal)
		}
	}
}

func (h *harness) setPolicy(text string) error {
	_, err := h.host.SetPolicy(soon(h.t), &agent.SetPolicyRequest{Policy: text})
	return err
}

func (h *harness) wantInForce(source, digest string) {
	h.t.Helper()
	p, _ := h.gate.Describe()
	if p.Source != source || p.Digest != digest || !p.InForce {
		h.t.Errorf("in force: %v, want %s from %s", p, digest, source)
	}
}

func TestBoundPolicyNeedsNoSetPolicy(t *testing.T) {
	t.Parallel()
	for _, source := range []string{FromInitData, FromImage} {
		h := start(t, bound(source))
		h.wantInForce(source, "digest of authors")
		h.sandbox()
		must(t, h.create("c1", "app", "02/01"))
		if got := h.agent.last("SetPolicy").(*agent.SetPolicyRequest).Policy; got != "for the agent: authors" {
			t.Errorf("the agent got %q", got)
		}
		if got := h.all()[:2]; got[0] != "agent SetPolicy" || got[1] != "agent CreateSandbox" {
			t.Errorf("the agent had %v: it must have the policy before it does anything", got)
		}
		h.wantInForce(source, "digest of authors")
	}
}

// The image's policy is in force as long as the host has brought none, so the agent must not judge by one of its own.
func TestAgentIsToldTheImagesPolicyThatTheHostDidNotReplace(t *testing.T) {
	t.Parallel()
	image := func(c *Config) {
		c.Default, c.Origin = fakePolicy{text: "images"}, Origin{Source: FromImage, Text: "images"}
	}
	h := start(t, image).sandbox()
	h.wantJournal("agent SetPolicy", "agent CreateSandbox")
	if got := h.agent.last("SetPolicy").(*agent.SetPolicyRequest).Policy; got != "for the agent: images" {
		t.Errorf("the agent got %q", got)
	}
	h.wantInForce(FromImage, "digest of images")

	h = start(t, image)
	must(t, h.setPolicy("hosts"))
	h.sandbox()
	h.wantJournal("agent SetPolicy", "agent CreateSandbox")
	if got := h.agent.last("SetPolicy").(*agent.SetPolicyRequest).Policy; got != "for the agent: hosts" {
		t.Errorf("the agent got %q", got)
	}
	h.wantInForce(FromSetPolicy, "digest of hosts")

	// The agent may then hold the host's text or none, and not the image's rules.
	h = start(t, image)
	h.agent.refuse("SetPolicy", status.Error(codes.InvalidArgument, "no"))
	wants(t, h.setPolicy("hosts"), codes.InvalidArgument, "no")
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.FailedPrecondition, "not taken")

	h = start(t).sandbox() // the guest's own policy
	h.wantJournal("agent CreateSandbox")
}

// Kata sends SetPolicy when the pod has the annotation, so a pod that has both must still start.
func TestBoundPolicyMayBeRepeatedAndReachesTheAgentOnce(t *testing.T) {
	t.Parallel()
	h := start(t, bound(FromInitData))
	must(t, h.setPolicy("authors"))
	must(t, h.setPolicy("authors"))
	h.sandbox()
	h.wantJournal("agent SetPolicy", "agent CreateSandbox")
	h.wantInForce(FromInitData, "digest of authors")
	wants(t, h.setPolicy("authors"), codes.FailedPrecondition, "CreateSandbox")
}

func TestHostThatBringsAnotherPolicyThanTheBoundOne(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"hosts", "", "authors\n", " authors", "author", "Authors"} {
		h := start(t, bound(FromInitData))
		wants(t, h.setPolicy(text), codes.PermissionDenied, "init-data", "annotation")
		h.wantJournal()
		h.wantInForce(FromInitData, "digest of authors")
		must(t, h.setPolicy("authors"))
		wants(t, h.setPolicy(text), codes.PermissionDenied, "init-data")
		h.sandbox()
		h.wantInForce(FromInitData, "digest of authors")
	}
}

func TestAgentThatRefusesTheBoundPolicyGetsNoSandbox(t *testing.T) {
	t.Parallel()
	h := start(t, bound(FromInitData))
	h.agent.refuse("SetPolicy", status.Error(codes.InvalidArgument, "no"))
	wants(t, h.setPolicy("authors"), codes.FailedPrecondition, "agent", "init-data")
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.FailedPrecondition, "agent", "init-data")
	wants(t, h.create("c1", "app", "02/01"), codes.FailedPrecondition, "no sandbox")
	h.wantJournal("agent SetPolicy", "agent SetPolicy")
	// Nothing was done: once the agent is well the sandbox can be made.
	h.agent.on("SetPolicy", func(context.Context, proto.Message) (proto.Message, error) { return nil, nil })
	h.sandbox()
}

func TestGuestThatRefusesAllSaysWhy(t *testing.T) {
	t.Parallel()
	reason := fmt.Errorf("init-data: no disk has a document: %w", errdefs.ErrFailedPrecondition)
	h := start(t, func(c *Config) { c.Origin = Origin{Source: FromImage, Refused: reason} })
	wants(t, h.setPolicy("mine"), codes.FailedPrecondition, "no disk has a document")
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.FailedPrecondition, "no disk has a document")
	wants(t, h.create("c1", "app", "02/01"), codes.FailedPrecondition, "no disk has a document")
	_, err = h.host.ListInterfaces(soon(t), &agent.ListInterfacesRequest{})
	wants(t, err, codes.FailedPrecondition, "no disk has a document")
	h.wantJournal()
	p, warnings := h.gate.Describe()
	if p.InForce || len(warnings) == 0 || !strings.Contains(warnings[0], "no disk has a document") {
		t.Errorf("described as %v, %q", p, warnings)
	}
}

// Otherwise someone outside trusts the image's policy, and the host brings its own a moment later.
func TestAPolicyThatTheHostMayStillReplaceIsNotInForce(t *testing.T) {
	t.Parallel()
	h := start(t)
	p, warnings := h.gate.Describe()
	if p.InForce || len(warnings) == 0 || !strings.Contains(warnings[0], "SetPolicy") {
		t.Errorf("before SetPolicy: %v, %q", p, warnings)
	}
	h.sandbox()
	if p, _ := h.gate.Describe(); !p.InForce {
		t.Errorf("with the sandbox, after which SetPolicy is refused: %v", p)
	}
}

func TestDescribeTellsTheOrigin(t *testing.T) {
	t.Parallel()
	h := start(t, bound(FromInitData), func(c *Config) { c.Origin.Warnings = []string{"a test double"} })
	for range 2 { // it keeps nothing of the first answer
		p, warnings := h.gate.Describe()
		if p.InitData.GetDigest() != "d" || p.InitData.GetAlgorithm() != "sha384" || len(warnings) != 3 || warnings[0] != "a test double" {
			t.Errorf("described as %v, %q", p, warnings)
		}
	}
	h.sandbox()
	must(t, h.create("c1", "app", "02/01"))
	live := func() string {
		p, _ := h.gate.Describe()
		return p.Containers[0].Id + " " + p.Containers[0].State
	}
	if got := live(); got != "c1 created" {
		t.Errorf("container is %q", got)
	}
	must(t, h.begin("c1"))
	if got := live(); got != "c1 started" {
		t.Errorf("container is %q", got)
	}
	must(t, h.remove("c1"))
	if got := live(); got != " " {
		t.Errorf("container is %q", got)
	}
}
