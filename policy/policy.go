// Package policy reads a pod's policy and decides with it.
//
// The policy is Rego text of package agent_policy, as Kata carries it to the guest in SetPolicy. Its rule sealed_pod is data: the
// containers and the volumes of the pod, parsed here into types that cannot be wrong. What follows from that data for a request of
// the host is decided by the framework (framework.rego, embedded and so measured with the guest). Rules of the author's own,
// sealed_pod_deny, see the same input and can only say no to what the framework allows.
//
// The package runs in the guest, on text and requests that the host wrote. It touches no file, no network and no device, and imports
// nothing of the guest's other parts.
package policy

import (
	"github.com/open-policy-agent/opa/v1/ast"
)

// Policy is a pod's policy, loaded and found valid. It does not change and may be used by several goroutines at once.
type Policy struct {
	text      []byte
	digest    string
	rules     map[string]bool // the names that the text defines
	pod       *pod            // nil: the text has no sealed_pod
	document  *ast.Term       // pod as the framework sees it
	author    *author         // nil: the text has no rules of its own
	framework judges
}

// Sealed reports whether the policy has a sealed_pod, so that only what it names may run.
func (p *Policy) Sealed() bool { return p.pod != nil }

// Digest is the SHA-256 of the text as it arrived, in lower-case hex.
func (p *Policy) Digest() string { return p.digest }

// Containers are the containers that may run in a sealed pod, by name. The caller must not change them.
func (p *Policy) Containers() map[string]Container {
	if p.pod == nil {
		return nil
	}
	return p.pod.Containers
}

// Volumes are the pod's volumes, by name. The caller must not change them.
func (p *Policy) Volumes() map[string]Volume {
	if p.pod == nil {
		return nil
	}
	return p.pod.Volumes
}
