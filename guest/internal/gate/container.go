package gate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/mountns"
	"github.com/sealvol/sealvol/policy"
)

// createContainer seals the container's volumes, shows them to the agent while it makes the
// container, and takes everything back if that fails at any step.
func (g *Gate) createContainer(ctx context.Context, req *agent.CreateContainerRequest) (proto.Message, error) {
	ctx, cancel := context.WithDeadline(ctx, beforeUndo(ctx))
	defer cancel()
	if req.ContainerId == "" || req.ExecId != req.ContainerId {
		return nil, fmt.Errorf("container_id %q and exec_id %q must be the same: %w", req.ContainerId, req.ExecId, errdefs.ErrInvalidArgument)
	}
	// The agent keeps a container in a folder named for it, and removes the whole of it at the
	// end: "sandbox" would take the pod's shared memory along.
	if _, err := os.Lstat(filepath.Join(g.Run, req.ContainerId)); !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("container_id %s is the name of something of the agent's own: %w", req.ContainerId, errdefs.ErrInvalidArgument)
	}
	pol, state, err := g.running()
	if err != nil {
		return nil, err
	}
	// A request with more storages than the policy has volumes is denied, whatever disks they are.
	state.Devices = g.devices(req.Storages[:min(len(req.Storages), len(pol.Volumes()))])
	dec, err := pol.Decide(ctx, "CreateContainer", req, state)
	if err != nil {
		return nil, err
	}
	volumes, err := attachments(dec, pol.Volumes(), req)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", dec.Container, err)
	}
	c, err := g.reserve(req.ContainerId, dec, pol.Sealed())
	if err != nil {
		return nil, err
	}
	defer func() { <-c.busy }()
	if pol.Sealed() {
		narrow(req.OCI)
	}

	forwarded, err := g.place(ctx, c, volumes, req)
	if err == nil {
		g.enter(c, ready)
		g.Log.Info("container created", "container", c.name, "id", c.id)
		return g.methods[agentService+"/CreateContainer"].out.New().Interface(), nil
	}
	undoCtx, cancelUndo := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancelUndo()
	g.undo(undoCtx, c, forwarded, err)
	return nil, err
}

// devices are the disks that the guest sees where the storages say. Not all are there yet, and
// whether they still are when they are sealed is looked at again then.
func (g *Gate) devices(storages []*agent.Storage) map[string]policy.Device {
	devices := map[string]policy.Device{}
	for _, s := range storages {
		address, err := device.Parse(s.Driver, s.Source)
		if err != nil {
			continue // no disk
		}
		disk, err := g.Disk(address)
		switch {
		case err == nil:
			devices[s.Source] = policy.Device{Plain: true, ReadOnly: disk.ReadOnly, Bytes: disk.Bytes}
		case errdefs.IsFailedPrecondition(err):
			devices[s.Source] = policy.Device{}
		}
	}
	return devices
}

// beforeUndo is when a create has to give up, so that it is undone by the time that the
// host's patience ends: ttrpc has no cancel, and the host unplugs at its own deadline.
func beforeUndo(ctx context.Context) time.Time {
	deadline, ok := ctx.Deadline()
	if !ok {
		return time.Now().Add(createTimeout)
	}
	return deadline.Add(-min(time.Until(deadline)/4, maxUndoReserve))
}

// attachment is a volume of a container that is being created.
type attachment struct {
	policy.Attachment
	spec    policy.Volume
	address device.Address
}

// attachments parses what the policy decided to attach.
func attachments(dec policy.Decision, specs map[string]policy.Volume, req *agent.CreateContainerRequest) ([]attachment, error) {
	var all []attachment
	for _, a := range dec.Attachments {
		spec, ok := specs[a.Volume]
		if !ok || a.Mount < 0 || a.Mount >= len(req.OCI.GetMounts()) || a.Storage < 0 || a.Storage >= len(req.Storages) {
			return nil, fmt.Errorf("the policy attaches what is not there: %+v: %w", a, errdefs.ErrInternal)
		}
		s := req.Storages[a.Storage]
		address, err := device.Parse(s.Driver, s.Source)
		if err != nil {
			return nil, fmt.Errorf("volume %s: %w", a.Volume, err)
		}
		all = append(all, attachment{Attachment: a, spec: spec, address: address})
	}
	return all, nil
}

// reserve enters a new container, locked for the caller, and takes its id for ever. The
// policy has judged the names of live containers already, but two requests may have been
// judged at once.
func (g *Gate) reserve(id string, dec policy.Decision, sealed bool) (*container, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.containers[id]; ok {
		return nil, fmt.Errorf("container id %s has been used, an id is never used twice: %w", id, errdefs.ErrAlreadyExists)
	}
	for _, c := range g.containers {
		if c.state != gone && sealed && c.name == dec.Container && c.sandbox == dec.Sandbox {
			return nil, fmt.Errorf("container %q lives already as %s, remove that one first: %w", c.name, c.id, errdefs.ErrPermissionDenied)
		}
	}
	c := &container{id: id, name: dec.Container, sandbox: dec.Sandbox, busy: make(chan struct{}, 1)}
	c.busy <- struct{}{}
	g.containers[id] = c
	return c, nil
}

// place makes the volumes ready, all at once, and then has the agent create the container
// while they are attached. It says whether the agent has seen the request.
func (g *Gate) place(ctx context.Context, c *container, volumes []attachment, req *agent.CreateContainerRequest) (forwarded bool, err error) {
	group, groupCtx := errgroup.WithContext(ctx)
	for _, v := range volumes {
		group.Go(func() error {
			if err := g.Volumes.Acquire(groupCtx, c.id, v.Volume, v.spec, v.address); err != nil {
				return fmt.Errorf("container %s: volume %s: %w", c.name, v.Volume, err)
			}
			g.Log.Info("volume ready", "volume", v.Volume, "container", c.name, "id", c.id, "address", v.address.String())
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return false, err
	}
	release, err := g.own(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	if _, _, err := g.running(); err != nil {
		return false, err
	}
	for _, v := range volumes {
		dir, attachErr := g.Volumes.Attach(ctx, v.Volume)
		if attachErr != nil {
			return false, fmt.Errorf("container %s: volume %s: attach: %w", c.name, v.Volume, attachErr)
		}
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
			defer cancel()
			if detachErr := g.Volumes.Detach(ctx, v.Volume); detachErr != nil {
				g.poisoned("volume "+v.Volume+" stayed attached", "error", detachErr)
				err = errors.Join(err, fmt.Errorf("container %s: volume %s: detach: %w", c.name, v.Volume, detachErr))
			}
		}()
		m := req.OCI.Mounts[v.Mount]
		m.Source, m.Type, m.Options = dir, "bind", mountOptions(v.spec.Options, v.ReadOnly)
	}
	g.dropStorages(volumes, req)
	_, err = g.forward(ctx, "CreateContainer", req)
	return true, err
}

// mountOptions are those of the policy that a bind mount can have, whatever the host asked.
func mountOptions(policyOptions []policy.Option, readOnly bool) []string {
	options := []string{"rbind"}
	for _, o := range policyOptions {
		switch o {
		case policy.NoSUID, policy.NoDev, policy.NoExec, policy.NoATime, policy.RelATime, policy.StrictATime, policy.NoDirATime:
			options = append(options, string(o))
		}
	}
	if readOnly {
		return append(options, "ro")
	}
	return append(options, "rw")
}

// dropStorages takes the volumes' storages out of the request, since the agent must not
// touch the devices, and remembers where Kata believes them mounted.
func (g *Gate) dropStorages(volumes []attachment, req *agent.CreateContainerRequest) {
	drop := map[*agent.Storage]bool{}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, v := range volumes {
		s := req.Storages[v.Storage]
		drop[s] = true
		g.storages[s.MountPoint] = v.Volume
	}
	req.Storages = slices.DeleteFunc(req.Storages, func(s *agent.Storage) bool { return drop[s] })
}

// undo ends a container that must not live, for the given cause, and lets go of its volumes.
// When it cannot be known that the container is gone, the volumes stay and the sandbox is
// poisoned.
func (g *Gate) undo(ctx context.Context, c *container, forwarded bool, cause error) {
	if forwarded {
		if err := g.confirmGone(ctx, c, cause); err != nil {
			g.poisoned("it is not known whether container "+c.id+" lives", "container", c.name, "cause", cause, "error", err)
			return
		}
	}
	g.letGo(ctx, c)
}

// confirmGone makes sure that the agent has no such container. An agent that refused the
// container has none, if no process is left of the attempt; one that was late may still be
// at work, and only its word that it removed the container ends that.
func (g *Gate) confirmGone(ctx context.Context, c *container, cause error) error {
	if answered(cause) {
		if alive, err := g.Namespaces.Alive(c.id); err == nil && !alive {
			return nil
		}
	}
	release, err := g.share(ctx)
	if err != nil {
		return err
	}
	defer release()
	_, err = g.forward(ctx, "RemoveContainer", &agent.RemoveContainerRequest{ContainerId: c.id})
	return err
}

// letGo releases the volumes of a container that is gone and then forgets it.
func (g *Gate) letGo(ctx context.Context, c *container) error {
	err := g.Volumes.Release(ctx, c.id)
	if err != nil {
		g.Log.Error("volumes not released", "container", c.name, "id", c.id, "error", err)
		err = fmt.Errorf("container %s is gone, but its volumes did not close: %w", c.name, err)
	} else {
		g.Log.Info("container gone, its volumes released", "container", c.name, "id", c.id)
		g.forgetPaths()
	}
	g.enter(c, gone)
	return err
}

// forgetPaths forgets where the host believes volumes mounted that have no disk any more. Kata names the place by the disk's slot, and
// another volume's disk may come into that next.
func (g *Gate) forgetPaths() {
	g.mu.Lock()
	defer g.mu.Unlock()
	disks := g.Volumes.Disks()
	maps.DeleteFunc(g.storages, func(_, volume string) bool { _, ok := disks[volume]; return !ok })
}

// startContainer lets a container run that has the policy's volumes at the policy's paths,
// and removes any other: between the gate's rewriting and the agent's mounting lies the
// container's root file system, where a link can lead a mount astray.
func (g *Gate) startContainer(ctx context.Context, req *agent.StartContainerRequest) (proto.Message, error) {
	c, err := g.find(req.ContainerId)
	if err != nil {
		return nil, err
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := g.inState(c, ready); err != nil {
		return nil, err
	}
	if err := g.allow(ctx, "StartContainer", req); err != nil {
		return nil, err
	}
	resp, checked, err := g.start(ctx, c, req)
	if !checked {
		undoCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		g.undo(undoCtx, c, true, err)
	}
	return resp, err
}

// start says beside the agent's answer whether the container may live on.
func (g *Gate) start(ctx context.Context, c *container, req *agent.StartContainerRequest) (resp proto.Message, checked bool, err error) {
	release, err := g.share(ctx)
	if err != nil {
		return nil, true, err
	}
	defer release()
	pol, _, err := g.running()
	if err != nil {
		return nil, true, err
	}
	if pol.Sealed() {
		want, err := g.expected(ctx, pol, c)
		if err == nil {
			err = g.Namespaces.Check(c.id, want)
		}
		if err != nil {
			return nil, false, fmt.Errorf("container %s is removed before its start: %w", c.name, err)
		}
	}
	g.enter(c, started)
	resp, err = g.forward(ctx, "StartContainer", req)
	return resp, true, err
}

// expected are the mounts that the policy declares for the container.
func (g *Gate) expected(ctx context.Context, pol Policy, c *container) ([]mountns.Mount, error) {
	var want []mountns.Mount
	for name, v := range pol.Volumes() {
		for _, m := range v.Mounts {
			if c.sandbox || m.Container != c.name {
				continue
			}
			major, minor, err := g.Volumes.Number(ctx, name)
			if err != nil {
				return nil, fmt.Errorf("volume %s: %w", name, err)
			}
			want = append(want, mountns.Mount{Path: m.Path, Major: major, Minor: minor, Options: mountOptions(v.Options, m.ReadOnly)[1:]})
		}
	}
	return want, nil
}

// removeContainer releases the container's volumes once the agent confirmed that it is gone,
// and answers after that: Kata unplugs next. An agent that does not confirm it keeps the
// volumes open, since whatever else the host can bring about, the container may live.
func (g *Gate) removeContainer(ctx context.Context, req *agent.RemoveContainerRequest) (proto.Message, error) {
	empty := g.methods[agentService+"/RemoveContainer"].out.New().Interface()
	c, err := g.find(req.ContainerId)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	unlock, err := c.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if g.inState(c, gone) == nil {
		return empty, nil // the host asks again, or the gate removed it
	}
	release, err := g.share(ctx)
	if err != nil {
		return nil, err
	}
	// Without the host's timeout: with one the agent answers first and removes later.
	_, err = g.forward(ctx, "RemoveContainer", &agent.RemoveContainerRequest{ContainerId: c.id})
	release()
	if err != nil {
		g.Log.Error("container not removed, its volumes stay open", "container", c.name, "id", c.id, "error", err)
		return nil, err
	}
	return empty, g.letGo(ctx, c)
}

// execProcess passes the commands that the policy names.
func (g *Gate) execProcess(ctx context.Context, req *agent.ExecProcessRequest) (proto.Message, error) {
	c, err := g.find(req.ContainerId)
	if err != nil {
		return nil, err
	}
	if err := g.inState(c, started); err != nil {
		return nil, err
	}
	if req.ExecId == "" || req.ExecId == req.ContainerId {
		return nil, fmt.Errorf("container %s: exec_id %q is not one of a new process: %w", c.name, req.ExecId, errdefs.ErrInvalidArgument)
	}
	pol, state, err := g.running()
	if err != nil {
		return nil, err
	}
	if _, err := pol.Decide(ctx, "ExecProcess", req, state); err != nil {
		return nil, err
	}
	if pol.Sealed() {
		dropMknod(req.Process)
	}
	release, err := g.share(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return g.forward(ctx, "ExecProcess", req)
}

// updateContainer passes a change of limits. The device rules that CRI sends along are
// dropped: which devices a container may use was decided when it was created.
func (g *Gate) updateContainer(ctx context.Context, req *agent.UpdateContainerRequest) (proto.Message, error) {
	c, err := g.find(req.ContainerId)
	if err != nil {
		return nil, err
	}
	if err := g.inState(c, ready, started); err != nil {
		return nil, err
	}
	if err := g.allow(ctx, "UpdateContainer", req); err != nil {
		return nil, err
	}
	if req.Resources != nil {
		req.Resources.Devices = nil
	}
	release, err := g.share(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return g.forward(ctx, "UpdateContainer", req)
}
