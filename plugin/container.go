package main

import (
	"fmt"
	"math"
	"path"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"

	"github.com/sealvol/sealvol/shim/hotplug"
)

// adjust turns what a pod asks for into the changes of one of its containers:
// for each volume its device goes, a mount comes, and a hotplug request says
// how the two belong together. It gives nil for a pod that asks for nothing,
// and an error that refuses the container for whatever it does not understand.
//
// The annotations apply to each container of the pod, so each must have the
// devices: one that silently came up without its volume would write elsewhere.
func adjust(handlers handlerPatterns, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, error) {
	if err := checkContainerAnnotations(pod, container); err != nil {
		return nil, err
	}
	volumes, err := parseAnnotations(pod.GetAnnotations())
	if err != nil || len(volumes) == 0 {
		return nil, err
	}
	if !handlers.match(pod.GetRuntimeHandler()) {
		// Ignored, the pod would run with the raw device.
		return nil, fmt.Errorf("the pod asks for sealed volumes, but its runtime handler %q is not in the plugin's runtime_handlers: "+
			"set the pod's runtimeClassName: %w", pod.GetRuntimeHandler(), errdefs.ErrFailedPrecondition)
	}

	adjustment := &api.ContainerAdjustment{}
	var request hotplug.Request
	for _, v := range volumes {
		device, err := findDevice(container, v.device)
		if err != nil {
			return nil, fmt.Errorf("volume %q: %w: %w", v.name, err, errdefs.ErrInvalidArgument)
		}
		if err := checkMountPath(container, v.mountPath); err != nil {
			return nil, fmt.Errorf("volume %q: %w: %w", v.name, err, errdefs.ErrInvalidArgument)
		}
		source := hotplug.Source(pod.GetId(), v.name)
		request.Volumes = append(request.Volumes, hotplug.Volume{
			Name: v.name, MountPath: v.mountPath, Source: source, Backing: device,
		})
		// NRI 0.12.5 drops this on its way to the runtime, and has no call to
		// take the device's cgroup rule away: the reader of the request does both.
		adjustment.RemoveDevice(v.device)
		// NRI sorts all mounts by depth, so one below or above another is fine.
		adjustment.AddMount(&api.Mount{
			Destination: v.mountPath, Type: "bind", Source: source, Options: []string{"rbind", "rw"},
		})
	}
	encoded, err := request.Encode() // also finds two volumes on one path or device
	if err != nil {
		return nil, err
	}
	adjustment.AddAnnotation(hotplug.Annotation, string(encoded))
	return adjustment, nil
}

// checkContainerAnnotations refuses a container that says anything itself: a
// hotplug request is the plugin's to write, and it names devices of the host. A
// runtime's pod_annotations may copy what the pod says.
func checkContainerAnnotations(pod *api.PodSandbox, container *api.Container) error {
	for key, value := range container.GetAnnotations() {
		if podValue, onPod := pod.GetAnnotations()[key]; isOurs(key) && !(onPod && podValue == value) {
			return fmt.Errorf("container annotation %q: annotations of %s belong on the pod: %w", key, domain, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// findDevice gives the number of the block device that the container has at a path.
func findDevice(container *api.Container, devicePath string) (hotplug.Device, error) {
	var found *api.LinuxDevice
	for _, d := range container.GetLinux().GetDevices() {
		if d.GetPath() != devicePath {
			continue
		}
		if found != nil {
			return hotplug.Device{}, fmt.Errorf("the container has two devices at %q", devicePath)
		}
		found = d
	}
	if found == nil {
		return hotplug.Device{}, fmt.Errorf("the container has no device %q: a pod's volumes are for all its containers, "+
			"so name the device in the volumeDevices of each", devicePath)
	}
	if found.GetType() != "b" {
		return hotplug.Device{}, fmt.Errorf("device %q is not a block device", devicePath)
	}
	major, minor := found.GetMajor(), found.GetMinor()
	if min(major, minor) < 0 || max(major, minor) > math.MaxUint32 {
		return hotplug.Device{}, fmt.Errorf("device %q has the impossible number %d:%d", devicePath, major, minor)
	}
	// Under another name the container would keep the raw device.
	for _, d := range container.GetLinux().GetDevices() {
		if d != found && d.GetType() == "b" && d.GetMajor() == major && d.GetMinor() == minor {
			return hotplug.Device{}, fmt.Errorf("the container also has device %q (%d:%d) as %q: give it once, "+
				"and set privileged_without_host_devices for the runtime", devicePath, major, minor, d.GetPath())
		}
	}
	return hotplug.Device{Major: uint32(major), Minor: uint32(minor)}, nil
}

// checkMountPath refuses a path at which the container has something already:
// NRI would quietly replace a mount there.
func checkMountPath(container *api.Container, mountPath string) error {
	for _, m := range container.GetMounts() {
		if path.Clean(m.GetDestination()) == mountPath {
			return fmt.Errorf("the container has another mount at %q", mountPath)
		}
	}
	for _, d := range container.GetLinux().GetDevices() {
		if path.Clean(d.GetPath()) == mountPath {
			return fmt.Errorf("the container has a device at the volume's mountPath %q", mountPath)
		}
	}
	return nil
}
