package main

import (
	"fmt"
	"math"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"

	"github.com/sealvol/sealvol/plugin/published"
	"github.com/sealvol/sealvol/shim/hotplug"
)

// A found volume is one that a container has, and what the container has in
// its place until it is adjusted.
type found struct {
	hotplug.Volume
	// device is the path of the volume's device in the container, or empty.
	device string
	// mount is the volume's mount in the container, or nil.
	mount *api.Mount
	// readOnly is what the host offers. What the container gets, the policy says.
	readOnly bool
}

// adjust turns what a pod asks for into the changes of one of its containers:
// for each volume that the container has, its device or its mount goes, another
// mount comes, and a hotplug request says how the two belong together. It gives
// nil for a container that has none, and an error that refuses the container
// for whatever it does not understand. Whether a container must have a volume
// is for the guest's policy to say.
func adjust(c config, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, error) {
	if err := checkContainerAnnotations(pod, container); err != nil {
		return nil, err
	}
	asked, err := parseAnnotations(pod.GetAnnotations())
	if err != nil {
		return nil, err
	}
	onDevices, err := findDevices(asked, container)
	if err != nil {
		return nil, err
	}
	onMounts, err := findMounts(asked, c.published, pod, container)
	if err != nil {
		return nil, err
	}
	volumes := append(onDevices, onMounts...)
	if len(asked)+len(volumes) > 0 && !c.handlers.match(pod.GetRuntimeHandler()) {
		// Ignored, the pod would run with the raw device or folder.
		return nil, fmt.Errorf("the pod asks for sealed volumes, but its runtime handler %q is not in the plugin's runtime_handlers: "+
			"set the pod's runtimeClassName: %w", pod.GetRuntimeHandler(), errdefs.ErrFailedPrecondition)
	}
	if len(volumes) == 0 {
		return nil, nil
	}

	slices.SortFunc(volumes, func(a, b found) int { return strings.Compare(a.Name, b.Name) })
	adjustment := &api.ContainerAdjustment{}
	var request hotplug.Request
	for _, v := range volumes {
		if err := v.checkPlace(container); err != nil {
			return nil, fmt.Errorf("volume %q: %w: %w", v.Name, err, errdefs.ErrInvalidArgument)
		}
		v.Source = hotplug.Source(pod.GetId(), v.Name)
		request.Volumes = append(request.Volumes, v.Volume)
		v.replace(adjustment)
	}
	encoded, err := request.Encode() // also finds two volumes on one path or backing
	if err != nil {
		return nil, err
	}
	adjustment.AddAnnotation(hotplug.Annotation, string(encoded))
	return adjustment, nil
}

// replace takes out what the container has of the volume, and mounts its source instead.
func (v found) replace(adjustment *api.ContainerAdjustment) {
	if v.mount == nil {
		// NRI 0.12.5 drops this on its way to the runtime, and has no call to
		// take the device's cgroup rule away: the reader of the request does both.
		adjustment.RemoveDevice(v.device)
	} else if v.mount.GetDestination() != v.MountPath {
		// Kubelet writes a path as the pod does, with a slash at its end. A mount
		// at the very path is replaced by the one that is added.
		adjustment.RemoveMount(v.mount.GetDestination())
	}
	access := "rw"
	if v.readOnly {
		access = "ro"
	}
	// NRI sorts all mounts by depth, so one below or above another is fine.
	adjustment.AddMount(&api.Mount{Destination: v.MountPath, Type: "bind", Source: v.Source, Options: []string{"rbind", access}})
}

// checkPlace refuses a path at which the container has something else already:
// NRI would quietly replace a mount there.
func (v found) checkPlace(container *api.Container) error {
	for _, m := range container.GetMounts() {
		if m != v.mount && path.Clean(m.GetDestination()) == v.MountPath {
			return fmt.Errorf("the container has another mount at %q", v.MountPath)
		}
	}
	for _, d := range container.GetLinux().GetDevices() {
		if path.Clean(d.GetPath()) == v.MountPath {
			return fmt.Errorf("the container has a device at the volume's path %q", v.MountPath)
		}
	}
	return nil
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

// findDevices finds the volumes that are on block devices of the container. A
// pod that asks for one of these has no other block devices: under a path that
// no annotation names, a container would keep the raw device.
func findDevices(asked []ask, container *api.Container) ([]found, error) {
	byPath := map[string]ask{}
	for _, a := range asked {
		if a.device != "" {
			byPath[a.device] = a
		}
	}
	if len(byPath) == 0 {
		return nil, nil
	}
	var volumes []found
	for _, d := range container.GetLinux().GetDevices() {
		a, ours := byPath[d.GetPath()]
		if !ours && d.GetType() == "b" {
			return nil, fmt.Errorf("the container has block device %q (%d:%d), which no annotation of the pod names: it would be raw; name it in one, or remove it "+
				"(a privileged container: set privileged_without_host_devices for the runtime): %w", d.GetPath(), d.GetMajor(), d.GetMinor(), errdefs.ErrInvalidArgument)
		}
		if !ours {
			continue
		}
		number, err := numberOf(d)
		if err != nil {
			return nil, fmt.Errorf("volume %q: %w: %w", a.name, err, errdefs.ErrInvalidArgument)
		}
		if slices.ContainsFunc(volumes, func(other found) bool { return other.device == a.device }) {
			return nil, fmt.Errorf("volume %q: the container has two devices at %q: %w", a.name, a.device, errdefs.ErrInvalidArgument)
		}
		volumes = append(volumes, found{Volume: hotplug.Volume{Name: a.name, MountPath: a.mountPath, Backing: number}, device: a.device})
	}
	return volumes, nil
}

func numberOf(d *api.LinuxDevice) (hotplug.Device, error) {
	if d.GetType() != "b" {
		return hotplug.Device{}, fmt.Errorf("device %q is not a block device", d.GetPath())
	}
	major, minor := d.GetMajor(), d.GetMinor()
	if min(major, minor) < 0 || max(major, minor) > math.MaxUint32 {
		return hotplug.Device{}, fmt.Errorf("device %q has the impossible number %d:%d", d.GetPath(), major, minor)
	}
	return hotplug.Device{Major: uint32(major), Minor: uint32(minor)}, nil
}

// findMounts finds the volumes that are mounts of the container: those that the
// CSI driver has published, and the emptyDirs that the pod asks to be sealed.
func findMounts(asked []ask, driver published.Dir, pod *api.PodSandbox, container *api.Container) ([]found, error) {
	byEmptyDir := map[string]ask{}
	for _, a := range asked {
		if a.emptyDir != "" {
			byEmptyDir[a.emptyDir] = a
		}
	}
	var volumes []found
	for _, m := range container.GetMounts() {
		v := found{mount: m, readOnly: slices.Contains(m.GetOptions(), "ro")}
		emptyDir, whole := parseEmptyDir(m.GetSource(), pod.GetUid())
		if a, ours := byEmptyDir[emptyDir]; ours {
			if !whole {
				return nil, fmt.Errorf("volume %q: the container mounts a part of emptyDir %q at %q: sealed volumes have no subPath; mount the whole: %w",
					a.name, emptyDir, m.GetDestination(), errdefs.ErrFailedPrecondition)
			}
			v.Name, v.Backing = a.name, hotplug.EmptyDir{Path: m.GetSource(), Size: a.size}
		} else {
			// Other mounts are not looked at: they may hang, and are no target of a CSI driver.
			target, whole := parseCSI(m.GetSource())
			if target == "" {
				continue
			}
			record, err := driver.Find(resolve(target))
			if errdefs.IsNotFound(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("mount at %q: %w", m.GetDestination(), err)
			}
			if !whole {
				// The folder is the node's: what is written there would not be sealed.
				return nil, fmt.Errorf("volume %q: the container mounts a part of it at %q: sealed volumes have no subPath; mount the whole: %w",
					record.Name, m.GetDestination(), errdefs.ErrFailedPrecondition)
			}
			// By a hostPath a pod can name the folder of another one's volume.
			if pod.GetUid() == "" || !strings.Contains(record.Target, "/pods/"+pod.GetUid()+"/volumes/") {
				return nil, fmt.Errorf("mount at %q: volume %q is published at %q, which is not this pod's: %w", m.GetDestination(), record.Name, record.Target, errdefs.ErrInvalidArgument)
			}
			v.Name, v.Backing = record.Name, hotplug.File(record.File)
			v.readOnly = v.readOnly || record.ReadOnly
		}
		v.MountPath = path.Clean(m.GetDestination())
		if slices.ContainsFunc(volumes, func(other found) bool { return other.Name == v.Name }) {
			return nil, fmt.Errorf("volume %q: the container mounts it twice; a container sees a sealed volume at one path: %w", v.Name, errdefs.ErrFailedPrecondition)
		}
		volumes = append(volumes, v)
	}
	return volumes, nil
}

// csiRE is a path in what kubelet has of a CSI volume. The first pods folder is
// that of the node's kubelet: what follows a volume's name is the volume's.
var csiRE = regexp.MustCompile(`^(.*?/pods/[^/]+)/(volumes/kubernetes\.io~csi|volume-subpaths)/([^/]+)/(.+)$`)

// parseCSI gives the target of the CSI volume that a path belongs to, and whether
// the path is that target, or a part of it or beside it. Kubelet has the one at
// <root>/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount (Kubernetes 1.34,
// pkg/volume/csi/csi_mounter.go, getTargetPath), and what a subPath gives where
// parseEmptyDir says. For other paths the target is empty.
func parseCSI(source string) (target string, whole bool) {
	parts := csiRE.FindStringSubmatch(path.Clean(source))
	if parts == nil {
		return "", false
	}
	return parts[1] + "/volumes/kubernetes.io~csi/" + parts[3] + "/mount", parts[2] != "volume-subpaths" && parts[4] == "mount"
}

// resolve gives a target as a record has it. containerd 2.4 follows links only
// where the last part of a path is one (pkg/os, ResolveSymbolicLink), and kubelet's
// root folder may be behind one. The last part is not looked at: with another
// driver it is a mount, which may hang. What cannot be followed is no target.
func resolve(target string) string {
	if folder, err := filepath.EvalSymlinks(path.Dir(target)); err == nil {
		return path.Join(folder, path.Base(target))
	}
	return target
}

// parseEmptyDir gives the name of the emptyDir of a pod that a path belongs to,
// and whether the path is the whole of it or what a subPath gives. Kubelet has
// the one at <root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>, the other at
// <root>/pods/<uid>/volume-subpaths/<name>/<container>/<index> (Kubernetes 1.34,
// pkg/kubelet/kubelet_getters.go and pkg/volume/util/subpath). For other paths
// the name is empty.
func parseEmptyDir(source, uid string) (name string, whole bool) {
	parts := strings.Split(source, "/")
	n := len(parts)
	switch {
	case uid == "" || path.Clean(source) != source:
		return "", false
	case n > 5 && slices.Equal(parts[n-5:n-1], []string{"pods", uid, "volumes", hotplug.EmptyDirPlugin}):
		return parts[n-1], true
	case n > 6 && slices.Equal(parts[n-6:n-3], []string{"pods", uid, "volume-subpaths"}):
		return parts[n-3], false
	}
	return "", false
}
