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

	"github.com/sealvol/sealvol/plugin/quantity"
	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	// domain is the project's: annotations under it that nobody knows are errors.
	domain = "sealvol.io"

	// volumePrefix and a volume's name make the key of a pod annotation that
	// asks for that volume.
	volumePrefix = "volume." + domain + "/"

	mebibyte = 1 << 20
)

// An ask is what one pod annotation asks for: a volume that lives as long as
// the pod, on what device or emptyDir names. Where both are empty it is on a
// claim, which a container's mount leads to, and the annotation says only that
// its data goes with the pod.
type ask struct {
	name string
	// device is the path of the block device inside the containers, as CRI's
	// devices and kubelet's volumeDevices give it.
	device string
	// mountPath is where the containers that have the device are to see the volume.
	mountPath string
	// emptyDir is the pod's name for the emptyDir that is to hold the volume.
	emptyDir string
	// size of the volume in bytes, whole mebibytes, if it is on an emptyDir.
	size uint64
}

// isOurs tells whether an annotation key is under the project's domain.
// Kubernetes has keys in lower case only, CRI clients do not.
func isOurs(key string) bool {
	prefix, _, _ := strings.Cut(strings.ToLower(key), "/")
	return prefix == domain || strings.HasSuffix(prefix, "."+domain)
}

// parseAnnotations gives what a pod's annotations ask for, by name. No two ask
// for the same.
func parseAnnotations(annotations map[string]string) ([]ask, error) {
	var asked []ask
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if !isOurs(key) {
			continue
		}
		name, found := strings.CutPrefix(key, volumePrefix)
		if !found {
			return nil, fmt.Errorf("pod annotation %q is not known: a volume is asked for with %s<name>: %w", key, volumePrefix, errdefs.ErrInvalidArgument)
		}
		a, err := parseAsk(name, annotations[key])
		if err != nil {
			return nil, fmt.Errorf("pod annotation %q: %w", key, err)
		}
		for _, other := range asked {
			if a.device != "" && a.device == other.device || a.emptyDir != "" && a.emptyDir == other.emptyDir {
				return nil, fmt.Errorf("pod annotation %q asks for the same %s as that of volume %q: %w", key, a.device+a.emptyDir, other.name, errdefs.ErrInvalidArgument)
			}
		}
		asked = append(asked, a)
	}
	return asked, nil
}

// parseAsk reads the annotation of one volume. Whatever is not exactly as
// documented is an [errdefs.ErrInvalidArgument], a mode that there is not (yet)
// an [errdefs.ErrFailedPrecondition].
func parseAsk(name, value string) (ask, error) {
	if err := hotplug.CheckName(name); err != nil {
		return ask{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(value) > hotplug.MaxSize {
		return ask{}, fmt.Errorf("%d bytes, more than %d: %w", len(value), hotplug.MaxSize, errdefs.ErrInvalidArgument)
	}
	if !utf8.ValidString(value) {
		return ask{}, fmt.Errorf("not UTF-8: %w", errdefs.ErrInvalidArgument)
	}
	var wire struct {
		Device    string `json:"device"`
		MountPath string `json:"mountPath"`
		Mode      string `json:"mode"`
		EmptyDir  string `json:"emptyDir"`
		Size      string `json:"size"`
	}
	strict, err := strictjson.UnmarshalStrict([]byte(value), &wire)
	if err := errors.Join(append(strict, err)...); err != nil {
		// A joined error has a line for each; a refusal is one line.
		return ask{}, fmt.Errorf("%s: %w", strings.ReplaceAll(err.Error(), "\n", ", "), errdefs.ErrInvalidArgument)
	}
	a := ask{name: name, device: wire.Device, mountPath: wire.MountPath, emptyDir: wire.EmptyDir}
	switch {
	case wire.Mode == "ephemeral":
	case wire.Mode == "" && a.emptyDir != "": // Kubernetes' own word says that it goes with the pod.
	case wire.Mode == "" || wire.Mode == "persistent":
		return ask{}, fmt.Errorf("mode %q is not supported: persistent volumes come later; write \"ephemeral\" if the data may go with the pod: %w",
			wire.Mode, errdefs.ErrFailedPrecondition)
	default:
		return ask{}, fmt.Errorf("mode %q is not supported, write \"ephemeral\": %w", wire.Mode, errdefs.ErrFailedPrecondition)
	}
	if a.emptyDir != "" {
		a.size, err = a.parseSize(wire.Size)
	} else {
		err = a.checkDevice(wire.Size)
	}
	if err != nil {
		return ask{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return a, nil
}

// checkDevice checks what asks for a device or a claim.
func (a ask) checkDevice(size string) error {
	switch {
	case size != "":
		return errors.New("size is that of an emptyDir; a device and a claim have their own")
	case a.device == "" && a.mountPath == "":
		return nil
	}
	if err := hotplug.CheckPath(a.device); err != nil {
		return fmt.Errorf("device %w", err)
	}
	if err := hotplug.CheckPath(a.mountPath); err != nil {
		return fmt.Errorf("mountPath %w", err)
	}
	return nil
}

// parseSize checks what asks for an emptyDir and gives its size in bytes,
// rounded up to mebibytes as in the policy that `sealvol policy` writes.
func (a ask) parseSize(size string) (uint64, error) {
	switch {
	case a.device != "" || a.mountPath != "":
		return 0, errors.New("emptyDir has its mounts in the pod; remove device and mountPath")
	case hotplug.CheckName(a.emptyDir) != nil:
		return 0, fmt.Errorf("emptyDir %q is no name of a volume", a.emptyDir)
	case size == "":
		return 0, errors.New(`emptyDir needs a size, such as "10Gi": a node does not see its sizeLimit`)
	}
	bytes, err := quantity.Bytes(size)
	if err != nil {
		return 0, fmt.Errorf("size %w", err)
	}
	return (uint64(bytes) + mebibyte - 1) / mebibyte * mebibyte, nil
}
