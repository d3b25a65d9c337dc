package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	strictjson "sigs.k8s.io/json"

	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	// domain is the project's: annotations under it that nobody knows are errors.
	domain = "sealvol.io"

	// volumePrefix and a volume's name make the key of a pod annotation that
	// asks for that volume.
	volumePrefix = "volume." + domain + "/"
)

// A volume is what one pod annotation asks for: a volume that lives as long as
// the pod, on a block device of the container.
type volume struct {
	name string
	// device is the path of the block device inside the container, as CRI's
	// devices and kubelet's volumeDevices give it.
	device string
	// mountPath is where the container is to see the volume.
	mountPath string
}

// isOurs tells whether an annotation key is under the project's domain.
// Kubernetes has keys in lower case only, CRI clients do not.
func isOurs(key string) bool {
	prefix, _, _ := strings.Cut(strings.ToLower(key), "/")
	return prefix == domain || strings.HasSuffix(prefix, "."+domain)
}

// parseAnnotations gives the volumes that a pod's annotations ask for, by name.
func parseAnnotations(annotations map[string]string) ([]volume, error) {
	var volumes []volume
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if !isOurs(key) {
			continue
		}
		name, found := strings.CutPrefix(key, volumePrefix)
		if !found {
			return nil, fmt.Errorf("pod annotation %q is not known: a volume is asked for with %s<name>: %w", key, volumePrefix, errdefs.ErrInvalidArgument)
		}
		v, err := parseVolume(name, annotations[key])
		if err != nil {
			return nil, fmt.Errorf("pod annotation %q: %w", key, err)
		}
		volumes = append(volumes, v)
	}
	return volumes, nil
}

// parseVolume reads the annotation of one volume. Whatever is not exactly as
// documented is an [errdefs.ErrInvalidArgument], a mode that there is not (yet)
// an [errdefs.ErrFailedPrecondition].
func parseVolume(name, value string) (volume, error) {
	if err := hotplug.CheckName(name); err != nil {
		return volume{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(value) > hotplug.MaxSize {
		return volume{}, fmt.Errorf("%d bytes, more than %d: %w", len(value), hotplug.MaxSize, errdefs.ErrInvalidArgument)
	}
	if !utf8.ValidString(value) {
		return volume{}, fmt.Errorf("not UTF-8: %w", errdefs.ErrInvalidArgument)
	}
	var wire struct {
		Device    string `json:"device"`
		MountPath string `json:"mountPath"`
		Mode      string `json:"mode"`
	}
	strict, err := strictjson.UnmarshalStrict([]byte(value), &wire)
	if err := errors.Join(append(strict, err)...); err != nil {
		// A joined error has a line for each; a refusal is one line.
		return volume{}, fmt.Errorf("%s: %w", strings.ReplaceAll(err.Error(), "\n", ", "), errdefs.ErrInvalidArgument)
	}
	if err := hotplug.CheckPath(wire.Device); err != nil {
		return volume{}, fmt.Errorf("device %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := hotplug.CheckPath(wire.MountPath); err != nil {
		return volume{}, fmt.Errorf("mountPath %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if wire.Mode != "ephemeral" {
		return volume{}, fmt.Errorf("mode %q is not supported, write \"ephemeral\": %w", wire.Mode, errdefs.ErrFailedPrecondition)
	}
	return volume{name: name, device: wire.Device, mountPath: wire.MountPath}, nil
}
