package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// container is one runc container. Its init process has the container's own
// id among the processes, as in the agent's protocol.
type container struct {
	id      string
	bundle  string
	initPID int
	cgroup  string   // below the cgroup v2 mount
	mounts  []string // mount points of its storages

	mu        sync.Mutex
	processes map[string]*process // by exec id
}

var validID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

func (s *sandbox) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

func (s *sandbox) process(id, execID string) (*process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.processes[execID]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %q of container %q: %w", execID, id, errdefs.ErrNotFound)
}

// forget closes what the agent holds of an exec that has ended.
func (c *container) forget(execID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.processes[execID]; p != nil {
		p.io.Close()
		delete(c.processes, execID)
	}
}

func (s *sandbox) CreateContainer(ctx context.Context, r *pb.CreateContainerRequest) (_ *emptypb.Empty, err error) {
	if err := s.reserve(r.ContainerId); err != nil {
		return nil, err
	}
	c := &container{id: r.ContainerId, bundle: filepath.Join(stateDir, "bundles", r.ContainerId), processes: map[string]*process{}}
	defer func() {
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
			defer cancel()
			err = errors.Join(err, s.remove(undo, c))
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.containers[c.id] = c; err != nil {
			delete(s.containers, c.id)
		}
	}()
	if c.mounts, err = s.storages.add(ctx, r.Storages); err != nil {
		return nil, err
	}
	spec, err := s.spec(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.bundle, 0o700); err != nil {
		return nil, err
	}
	if err := writeJSON(filepath.Join(c.bundle, "config.json"), spec); err != nil {
		return nil, err
	}
	args := []string{"--bundle", c.bundle}
	if s.runc.noPivot {
		args = append(args, "--no-pivot")
	}
	p, err := s.runc.spawn(ctx, spec.Process.Terminal, "create", c.id, args...)
	if err != nil {
		return nil, err
	}
	c.processes[c.id], c.initPID = p, p.os.Pid
	if c.cgroup, err = cgroupOf(p.os.Pid); err != nil {
		return nil, err
	}
	s.log.Info("container created", "container", c.id, "pid", p.os.Pid)
	return &emptypb.Empty{}, nil
}

// reserve takes the id, so that nobody else creates it meanwhile.
func (s *sandbox) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !validID.MatchString(id) {
		return fmt.Errorf("container id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	if !s.created {
		return fmt.Errorf("no sandbox yet: %w", errdefs.ErrFailedPrecondition)
	}
	if _, ok := s.containers[id]; ok {
		return fmt.Errorf("container %q: %w", id, errdefs.ErrAlreadyExists)
	}
	s.containers[id] = nil
	return nil
}

func (s *sandbox) StartContainer(ctx context.Context, r *pb.StartContainerRequest) (*emptypb.Empty, error) {
	return s.runcCommand(ctx, r.ContainerId, "start")
}

func (s *sandbox) PauseContainer(ctx context.Context, r *pb.PauseContainerRequest) (*emptypb.Empty, error) {
	return s.runcCommand(ctx, r.ContainerId, "pause")
}

func (s *sandbox) ResumeContainer(ctx context.Context, r *pb.ResumeContainerRequest) (*emptypb.Empty, error) {
	return s.runcCommand(ctx, r.ContainerId, "resume")
}

func (s *sandbox) UpdateContainer(ctx context.Context, r *pb.UpdateContainerRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.Resources == nil {
		return &emptypb.Empty{}, nil
	}
	resources, err := pb.ResourcesGRPCtoOCI(r.Resources)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	file := filepath.Join(c.bundle, "resources.json")
	if err := writeJSON(file, resources); err != nil {
		return nil, err
	}
	return s.runcCommand(ctx, c.id, "update", "--resources", file)
}

func (s *sandbox) runcCommand(ctx context.Context, id, verb string, args ...string) (*emptypb.Empty, error) {
	if _, err := s.container(id); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, s.runc.run(ctx, nil, append(append([]string{verb}, args...), id)...)
}

func (s *sandbox) RemoveContainer(ctx context.Context, r *pb.RemoveContainerRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.Timeout)*time.Second)
		defer cancel()
	}
	if err := s.remove(ctx, c); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, c.id)
	s.log.Info("container removed", "container", c.id)
	return &emptypb.Empty{}, nil
}

// remove kills the container in whatever state it is and undoes its creation,
// also a partial one. It may be called again after an error.
func (s *sandbox) remove(ctx context.Context, c *container) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := killCgroup(ctx, c.cgroup); err != nil {
		return fmt.Errorf("container %q: %w", c.id, err)
	}
	if err := s.runc.run(ctx, nil, "delete", "--force", c.id); err != nil {
		return err
	}
	for _, p := range c.processes {
		if _, err := p.wait(ctx); err != nil {
			return fmt.Errorf("container %q was killed but is still there: %w", c.id, err)
		}
		p.io.Close()
	}
	err := s.storages.release(c.mounts)
	c.mounts = nil
	return errors.Join(err, os.RemoveAll(c.bundle))
}
