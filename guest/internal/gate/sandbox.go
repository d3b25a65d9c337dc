package gate

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/sealvol/sealvol/guest/internal/mountns"
	"github.com/sealvol/sealvol/policy"
)

// setPolicy loads the pod's policy and gives it to the agent. It counts once both accepted
// it, and only one ever reaches the agent. Where a policy is in force from the beginning, the
// host can only repeat it.
func (g *Gate) setPolicy(ctx context.Context, req *agent.SetPolicyRequest) (proto.Message, error) {
	release, err := g.own(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := g.beforeSandbox("SetPolicy"); err != nil {
		return nil, err
	}
	if g.Origin.Fixed {
		return &emptypb.Empty{}, g.confirm(ctx, req.Policy)
	}
	// Also a text that is refused is the only one: what reading it costs can outlast the answer.
	g.mu.Lock()
	sent := g.policySent
	g.policySent = true
	g.mu.Unlock()
	if sent {
		return nil, fmt.Errorf("the sandbox has had its policy, a second one is not taken: %w", errdefs.ErrPermissionDenied)
	}
	pol, err := g.Load(ctx, []byte(req.Policy))
	if err != nil {
		return nil, err
	}
	resp, err := g.forward(ctx, "SetPolicy", &agent.SetPolicyRequest{Policy: string(pol.AgentText())})
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	g.policy, g.policyTaken = pol, true
	g.mu.Unlock()
	g.Log.Info("policy in force", "source", FromSetPolicy, "digest", pol.Digest(), "sealed", pol.Sealed())
	_, warnings := g.Describe()
	for _, w := range warnings {
		g.Log.Warn(w)
	}
	return resp, nil
}

func (g *Gate) beforeSandbox(what string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.phase != fresh {
		return fmt.Errorf("%s after CreateSandbox: %w", what, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// createSandbox passes once. The agent may hold anything after a failure, so that is the end
// of the sandbox.
func (g *Gate) createSandbox(ctx context.Context, req *agent.CreateSandboxRequest) (proto.Message, error) {
	release, err := g.own(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := g.beforeSandbox("a second CreateSandbox"); err != nil {
		return nil, err
	}
	// The agent has opened by now what it opens.
	if err := g.Inspect(); err != nil {
		return nil, err
	}
	g.mu.Lock()
	pol, inDoubt := g.policy, g.policySent && !g.policyTaken && !g.Origin.Fixed
	g.mu.Unlock()
	if inDoubt {
		return nil, fmt.Errorf("the policy that the host brought was not taken: see why, and make the pod again: %w", errdefs.ErrFailedPrecondition)
	}
	if _, err := pol.Decide(ctx, "CreateSandbox", req, policy.State{}); err != nil {
		return nil, err
	}
	if g.Origin.Text != "" {
		if err := g.tellAgent(ctx); err != nil {
			return nil, err
		}
	}
	shared := false
	for _, s := range req.Storages {
		if s.Source == shareTag {
			shared = true
			if pol.Sealed() {
				s.Options = noDevices(s.Options)
			}
		}
	}
	g.mu.Lock()
	g.phase, g.shared = created, shared
	g.mu.Unlock()
	resp, err := g.forward(ctx, "CreateSandbox", req)
	if err != nil {
		g.poisoned("the agent did not create the sandbox")
		return nil, err
	}
	g.Log.Info("sandbox created", "sandbox", req.SandboxId, "share", shared)
	return resp, nil
}

// shareTag is what Kata calls the file system that the host serves, by 9p or virtio-fs.
const shareTag = "kataShared"

// destroySandbox ends what is under way, the agent's sandbox and the volumes. Whatever of
// it fails, nothing is accepted afterwards.
func (g *Gate) destroySandbox(ctx context.Context, req *agent.DestroySandboxRequest) (proto.Message, error) {
	g.stop()
	settled := make(chan struct{})
	go func() { // ends with the last of them
		g.ops.Wait()
		close(settled)
	}()
	select {
	case <-settled:
	case <-time.After(g.settle):
		// One that hangs in the host's file system must not keep the keys alive. None gets
		// anything from agent or volumes any more.
		g.Log.Error("requests under way do not end, the sandbox ends without them")
	}
	agentCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
	defer cancel()
	resp, err := g.forward(agentCtx, "DestroySandbox", req)
	// With a time of their own: an agent that hangs must not keep the keys alive.
	volumesCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
	defer cancel()
	if destroyErr := g.Volumes.Destroy(volumesCtx); destroyErr != nil {
		g.Log.Error("volumes not all closed at the sandbox's end", "error", destroyErr)
		if err == nil {
			err = fmt.Errorf("end of the sandbox's volumes: %w", destroyErr)
		}
	}
	g.Log.Info("sandbox destroyed", "error", err)
	return resp, err
}

// updateEphemeralMounts passes what the policy says: Kata sends the pod's memory volumes with
// their new size after each change of the guest's memory, and an empty list when it has none.
func (g *Gate) updateEphemeralMounts(ctx context.Context, req *agent.UpdateEphemeralMountsRequest) (proto.Message, error) {
	pol, state, err := g.running()
	if err != nil {
		return nil, err
	}
	if _, err := pol.Decide(ctx, "UpdateEphemeralMounts", req, state); err != nil {
		return nil, err
	}
	release, err := g.share(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return g.forward(ctx, "UpdateEphemeralMounts", req)
}

func (g *Gate) removeStaleMounts(ctx context.Context, req *agent.RemoveStaleVirtiofsShareMountsRequest) (proto.Message, error) {
	if err := g.allow(ctx, "RemoveStaleVirtiofsShareMounts", req); err != nil {
		return nil, err
	}
	release, err := g.share(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return g.forward(ctx, "RemoveStaleVirtiofsShareMounts", req)
}

// getVolumeStats answers from any container that has the volume. The path is the mount point
// that Kata chose for the storage, one for all containers; nothing is mounted there.
func (g *Gate) getVolumeStats(ctx context.Context, req *agent.VolumeStatsRequest) (proto.Message, error) {
	g.mu.Lock()
	volume, ok := g.storages[req.VolumeGuestPath]
	g.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("%.128q is not the path of a sealed volume: %w", req.VolumeGuestPath, errdefs.ErrPermissionDenied)
	}
	if err := g.allow(ctx, "GetVolumeStats", req); err != nil {
		return nil, err
	}
	space, inodes, err := g.usage(ctx, volume)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", volume, err)
	}
	usage := func(u mountns.Usage, unit agent.VolumeUsage_Unit) *agent.VolumeUsage {
		return &agent.VolumeUsage{Total: u.Total, Used: u.Used, Available: u.Available, Unit: unit}
	}
	return &agent.VolumeStatsResponse{
		Usage:           []*agent.VolumeUsage{usage(space, agent.VolumeUsage_BYTES), usage(inodes, agent.VolumeUsage_INODES)},
		VolumeCondition: &agent.VolumeCondition{},
	}, nil
}

// usage looks at a volume from the containers that have it, until one sees it.
func (g *Gate) usage(ctx context.Context, volume string) (space, inodes mountns.Usage, err error) {
	major, minor, err := g.Volumes.Number(ctx, volume)
	if err != nil {
		return space, inodes, err
	}
	err = fmt.Errorf("no container has it: %w", errdefs.ErrNotFound)
	for id, path := range g.places(volume) {
		space, inodes, err = g.Namespaces.Usage(id, mountns.Mount{Path: path, Major: major, Minor: minor})
		if err == nil {
			break
		}
	}
	return space, inodes, err
}

// places are where the containers that the agent has have a volume, by the container's id.
func (g *Gate) places(volume string) map[string]string {
	g.mu.Lock()
	defer g.mu.Unlock()
	places := map[string]string{}
	for _, m := range g.policy.Volumes()[volume].Mounts {
		for id, c := range g.containers {
			if c.name == m.Container && !c.sandbox && (c.state == ready || c.state == started) {
				places[id] = m.Path
			}
		}
	}
	return places
}
