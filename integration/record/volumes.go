package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	nri "github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
)

// The plugin of the project turns annotations of a pod into hotplug requests, the same ones for each of its containers. A volume of a
// CSI driver is mounted by some of them, each at a path of its own: this plugin writes their requests in the same way.
type volumes struct {
	mu      sync.Mutex
	devices map[string]string // path where kubelet has a volume → block device
}

// serve connects to NRI until stop is called.
func (v *volumes) serve(ctx context.Context, socket string) (stop func(), err error) {
	s, err := stub.New(v, stub.WithPluginName("record"), stub.WithPluginIdx("99"), stub.WithSocketPath(socket))
	if err != nil {
		return nil, err
	}
	if err := s.Start(ctx); err != nil {
		return nil, err
	}
	return s.Stop, nil
}

func (v *volumes) set(devices map[string]string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.devices = devices
}

// CreateContainer puts a direct volume in the place of each mount of a volume that is ours. It is called by NRI.
func (v *volumes) CreateContainer(_ context.Context, sandbox *nri.PodSandbox, container *nri.Container) (*nri.ContainerAdjustment, []*nri.ContainerUpdate, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	adjustment := &nri.ContainerAdjustment{}
	var request hotplug.Request
	for _, m := range container.GetMounts() {
		device, ours := v.devices[m.GetSource()]
		if !ours {
			continue
		}
		var stat unix.Stat_t
		if err := unix.Stat(device, &stat); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", device, err)
		}
		name := strings.TrimPrefix(filepath.Base(filepath.Dir(m.GetSource())), claimPrefix)
		source := hotplug.Source(sandbox.GetId(), name)
		path := filepath.Clean(m.GetDestination())
		request.Volumes = append(request.Volumes, hotplug.Volume{
			Name: name, MountPath: path, Source: source,
			Backing: hotplug.Device{Major: unix.Major(stat.Rdev), Minor: unix.Minor(stat.Rdev)},
		})
		if path != m.GetDestination() { // kubelet passes paths on as they are written
			adjustment.RemoveMount(m.GetDestination())
		}
		adjustment.AddMount(&nri.Mount{Destination: path, Type: "bind", Source: source, Options: m.GetOptions()})
	}
	if len(request.Volumes) == 0 {
		return nil, nil, nil
	}
	encoded, err := request.Encode()
	if err != nil {
		return nil, nil, err
	}
	adjustment.AddAnnotation(hotplug.Annotation, string(encoded))
	return adjustment, nil, nil
}

// mountMemory mounts the pod's emptyDir volumes of medium Memory, as kubelet does: Kata knows them by their file system.
func (p *pod) mountMemory() (undo func() error, err error) {
	var mounted []string
	undo = func() error {
		for _, path := range mounted {
			if err := unix.Unmount(path, 0); err != nil {
				return fmt.Errorf("unmount %s: %w", path, err)
			}
		}
		return os.RemoveAll(p.dir())
	}
	for _, v := range p.spec.Volumes {
		if v.EmptyDir == nil || v.EmptyDir.Medium != "Memory" {
			continue
		}
		path, err := p.volumePath(v)
		if err != nil {
			return undo, err
		}
		options := ""
		if limit := v.EmptyDir.SizeLimit; limit != nil {
			options = fmt.Sprintf("size=%d", limit.Value())
		}
		if err := unix.Mount("tmpfs", path, "tmpfs", 0, options); err != nil {
			return undo, fmt.Errorf("mount %s: %w", path, err)
		}
		mounted = append(mounted, path)
	}
	return undo, nil
}
