package gate

import (
	"fmt"
	"maps"
	"slices"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/policy"
)

// Describe returns the policy in force with the containers that live, and what weakens this
// sandbox, a line each.
func (g *Gate) Describe() (*sealvolv1.Policy, []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	described := &sealvolv1.Policy{
		Source: g.Origin.Source, Digest: g.policy.Digest(), InForce: g.Origin.Refused == nil, InitData: g.Origin.InitData,
	}
	warnings := slices.Clone(g.Origin.Warnings)
	if g.Origin.Refused != nil {
		warnings = append(warnings, "nothing is accepted: "+g.Origin.Refused.Error())
	}
	if g.phase == fresh && !g.policyTaken && !g.Origin.Fixed {
		described.InForce = false
		warnings = append(warnings, "the host may still bring another policy (SetPolicy), until the sandbox is made")
	}
	if g.policyTaken {
		described.Source = FromSetPolicy
		warnings = append(warnings, "the policy is the host's word: nothing binds it to the guest's measurement")
	}
	if g.poison != nil {
		warnings = append(warnings, "the sandbox can only be removed: "+g.poison.Error())
	}
	alive := map[string]*container{}
	for _, c := range g.containers {
		if c.state != gone && !c.sandbox {
			alive[c.name] = c
		}
	}
	containers := g.policy.Containers()
	for _, name := range slices.Sorted(maps.Keys(containers)) {
		c := containers[name]
		line := &sealvolv1.Container{Name: name, Rootfs: string(c.RootFS), ArgsPinned: c.Args != nil}
		if live := alive[name]; live != nil {
			line.Id, line.State = live.id, live.state.String()
		}
		described.Containers = append(described.Containers, line)
		if c.RootFS == policy.HostRootFS {
			warnings = append(warnings, fmt.Sprintf("container %s: its root file system is the host's, so sealing protects the disk only", name))
		}
		if c.Args == nil {
			warnings = append(warnings, fmt.Sprintf("container %s: its arguments are the host's choice", name))
		}
	}
	return described, warnings
}
