package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// spec converts the agent's form of the OCI specification to runc's, with what
// the real agent adds: the sandbox's namespaces and the guest's device numbers.
func (s *sandbox) spec(ctx context.Context, r *pb.CreateContainerRequest) (*specs.Spec, error) {
	in := r.OCI
	if in == nil || in.Process == nil || in.Root == nil || in.Linux == nil {
		return nil, fmt.Errorf("container %q: the OCI specification lacks process, root or linux: %w", r.ContainerId, errdefs.ErrInvalidArgument)
	}
	if r.StringUser != nil || len(r.SharedMounts) > 0 || in.Hooks != nil || in.Linux.Seccomp != nil {
		return nil, fmt.Errorf("container %q: user names, shared mounts, hooks and seccomp: %w", r.ContainerId, errdefs.ErrNotImplemented)
	}
	process, err := pb.ProcessGRPCtoOCI(in.Process)
	if err != nil {
		return nil, err
	}
	process.ApparmorProfile = "" // no AppArmor in the guest
	out := &specs.Spec{
		Version:     specs.Version,
		Process:     process,
		Root:        &specs.Root{Path: in.Root.Path, Readonly: in.Root.Readonly},
		Annotations: in.Annotations,
		Linux: &specs.Linux{
			CgroupsPath:       cgroupsPath(in.Linux.CgroupsPath, r.ContainerId),
			RootfsPropagation: in.Linux.RootfsPropagation,
			MaskedPaths:       in.Linux.MaskedPaths,
			ReadonlyPaths:     in.Linux.ReadonlyPaths,
			MountLabel:        in.Linux.MountLabel,
			Resources:         &specs.LinuxResources{},
		},
	}
	for _, m := range in.Mounts {
		out.Mounts = append(out.Mounts, specs.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source, Options: m.Options})
	}
	if in.Linux.Resources != nil {
		if out.Linux.Resources, err = pb.ResourcesGRPCtoOCI(in.Linux.Resources); err != nil {
			return nil, err
		}
	}
	if out.Linux.Namespaces, err = s.containerNamespaces(in.Linux.Namespaces, r.SandboxPidns); err != nil {
		return nil, err
	}
	// Pods with the host's network have the guest's UTS namespace too; runc
	// refuses a host name there, the real agent leaves it out.
	if slices.ContainsFunc(out.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UTSNamespace }) {
		out.Hostname = in.Hostname
	}
	if out.Linux.Sysctl, err = applySysctls(in.Linux.Sysctl); err != nil {
		return nil, err
	}
	return out, addDevices(ctx, out.Linux, in.Linux.Devices, r.Devices)
}

// cgroupsPath gives a path of cgroupfs also for systemd's form
// slice:prefix:name, as the real agent does without systemd.
func cgroupsPath(path, id string) string {
	if path == "" {
		return "/" + id
	}
	return "/" + strings.TrimPrefix(strings.ReplaceAll(path, ":", "/"), "/")
}

// containerNamespaces replaces IPC and UTS by the sandbox's and adds the PID
// namespace, which Kata always leaves out of the specification.
func (s *sandbox) containerNamespaces(in []*pb.LinuxNamespace, sharedPID bool) ([]specs.LinuxNamespace, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []specs.LinuxNamespace
	for _, ns := range in {
		if ns.Type == string(specs.PIDNamespace) {
			continue
		}
		path := ns.Path
		if shared, ok := s.namespaces[ns.Type]; ok {
			path = shared
		}
		out = append(out, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(ns.Type), Path: path})
	}
	pid := specs.LinuxNamespace{Type: specs.PIDNamespace}
	if sharedPID { // that of the sandbox's own container, which Kata creates first
		c := s.containers[s.id]
		if c == nil {
			return nil, fmt.Errorf("PID namespace of the sandbox, which has no container yet: %w", errdefs.ErrFailedPrecondition)
		}
		pid.Path = fmt.Sprintf("/proc/%d/ns/pid", c.initPID)
	}
	return append(out, pid), nil
}

// applySysctls sets those of the network itself, since all containers are in
// the guest's network namespace, where runc refuses them, and returns the rest.
func applySysctls(in map[string]string) (map[string]string, error) {
	out := map[string]string{}
	for key, value := range in {
		if !strings.HasPrefix(key, "net.") {
			out[key] = value
			continue
		}
		file := filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/"))
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			return nil, fmt.Errorf("sysctl %s: %w", key, err)
		}
	}
	return out, nil
}

// addDevices copies the device nodes and gives those that the host plugged in
// (devices, driver "blk") the numbers that they have in the guest.
func addDevices(ctx context.Context, out *specs.Linux, nodes []*pb.LinuxDevice, devices []*pb.Device) error {
	for _, n := range nodes {
		d := specs.LinuxDevice{Path: n.Path, Type: n.Type, Major: n.Major, Minor: n.Minor, UID: &n.UID, GID: &n.GID}
		if n.FileMode != 0 {
			mode := os.FileMode(n.FileMode)
			d.FileMode = &mode
		}
		if i := slices.IndexFunc(devices, func(p *pb.Device) bool { return p.ContainerPath == n.Path }); i >= 0 {
			if devices[i].Type != "blk" {
				return fmt.Errorf("device %s of type %q: %w", n.Path, devices[i].Type, errdefs.ErrNotImplemented)
			}
			var err error
			if _, d.Major, d.Minor, err = waitBlockDevice(ctx, devices[i].Id); err != nil {
				return err
			}
		}
		out.Devices = append(out.Devices, d)
		out.Resources.Devices = append(out.Resources.Devices, specs.LinuxDeviceCgroup{
			Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: "rwm",
		})
	}
	return nil
}
