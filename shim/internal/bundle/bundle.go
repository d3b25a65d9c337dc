// Package bundle reads what the shim needs of a container's OCI bundle, and
// takes the hotplug request out of its config.json before the runtime reads it.
package bundle

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/shim/atomicfile"
	"github.com/sealvol/sealvol/shim/hotplug"
)

// maxConfig bounds config.json, in bytes.
const maxConfig = 16 << 20

// Sandbox gives the id of the sandbox that the container with that bundle
// belongs to, and whether the container starts a sandbox of its own. The
// annotations and their order are those of the stock shim, ContainerType and
// SandboxID in src/runtime/pkg/oci/utils.go of Kata.
func Sandbox(dir, container string) (id string, own bool, err error) {
	config, err := read(dir)
	if err != nil {
		return "", false, err
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(config, &spec); err != nil {
		return "", false, fmt.Errorf("%s: %v: %w", configPath(dir), err, errdefs.ErrInvalidArgument)
	}
	first := func(keys ...string) string {
		for _, key := range keys {
			if value, ok := spec.Annotations[key]; ok {
				return value
			}
		}
		return ""
	}
	kind := first("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType", "io.kubernetes.docker.type")
	switch kind {
	case "", "sandbox", "podsandbox":
		id, own = container, true
	case "container":
		id = first("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.kubernetes.sandbox.id")
	default:
		return "", false, fmt.Errorf("%s: container type %q: %w", configPath(dir), kind, errdefs.ErrInvalidArgument)
	}
	if err := identifiers.Validate(id); err != nil {
		return "", false, fmt.Errorf("%s: sandbox id: %w", configPath(dir), err)
	}
	return id, own, nil
}

// Request is a container's hotplug request, and the config.json without it.
type Request struct {
	// Volumes are what the container asks for, often none.
	Volumes []hotplug.Volume

	path   string
	config []byte
}

// Read reads the hotplug request of a container of that sandbox and holds it
// against the container's mounts. What does not fit is an
// errdefs.ErrInvalidArgument.
func Read(dir, sandbox string) (*Request, error) {
	config, err := read(dir)
	if err != nil {
		return nil, err
	}
	volumes, edited, err := take(config, sandbox)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", configPath(dir), err, errdefs.ErrInvalidArgument)
	}
	return &Request{Volumes: volumes, path: configPath(dir), config: edited}, nil
}

// Take puts the config.json without the request in the place of the one with
// it. Without volumes there is nothing to take, and the file stays untouched.
func (r *Request) Take() error {
	if len(r.Volumes) == 0 {
		return nil
	}
	return atomicfile.Write(r.path, r.config, 0o600)
}

func configPath(dir string) string { return filepath.Join(dir, "config.json") }

func read(dir string) ([]byte, error) {
	file, err := os.Open(configPath(dir))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxConfig+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfig {
		return nil, fmt.Errorf("%s: more than %d bytes: %w", file.Name(), maxConfig, errdefs.ErrInvalidArgument)
	}
	return data, nil
}

// take gives the volumes that a config.json asks for, and the same config.json
// without the request and without the raw block devices behind the volumes.
func take(config []byte, sandbox string) ([]hotplug.Volume, []byte, error) {
	var spec struct {
		Annotations map[string]string `json:"annotations"`
		Mounts      []mount           `json:"mounts"`
	}
	if err := json.Unmarshal(config, &spec); err != nil {
		return nil, nil, err
	}
	text, asked := spec.Annotations[hotplug.Annotation]
	if !asked {
		return nil, config, checkMounts(spec.Mounts, nil, sandbox)
	}
	request, err := hotplug.Parse([]byte(text))
	if err != nil {
		return nil, nil, err
	}
	if err := checkMounts(spec.Mounts, request.Volumes, sandbox); err != nil {
		return nil, nil, err
	}
	numbers := map[hotplug.Device]bool{}
	for _, volume := range request.Volumes {
		if device, ok := volume.Backing.(hotplug.Device); ok {
			numbers[device] = true
		}
	}
	edited, err := edit(config, "annotations", func(annotations json.RawMessage) (json.RawMessage, error) {
		return edit(annotations, hotplug.Annotation, remove)
	})
	if err != nil {
		return nil, nil, err
	}
	dropBacking := filter(func(element json.RawMessage) (bool, error) {
		// An element of linux.devices or a rule of linux.resources.devices.
		var device struct {
			Type         string `json:"type"`
			Major, Minor *int64
		}
		if err := json.Unmarshal(element, &device); err != nil {
			return false, err
		}
		if device.Type != "b" || device.Major == nil || device.Minor == nil {
			return false, nil
		}
		return numbers[hotplug.Device{Major: uint32(*device.Major), Minor: uint32(*device.Minor)}], nil
	})
	edited, err = edit(edited, "linux", func(linux json.RawMessage) (json.RawMessage, error) {
		linux, err := edit(linux, "devices", dropBacking)
		if err != nil {
			return nil, err
		}
		return edit(linux, "resources", func(resources json.RawMessage) (json.RawMessage, error) {
			return edit(resources, "devices", dropBacking)
		})
	})
	if err != nil {
		return nil, nil, err
	}
	return request.Volumes, edited, nil
}

type mount struct {
	Destination string `json:"destination"`
	Source      string `json:"source"`
}

// checkMounts demands of each volume that its source is the one of this
// sandbox and that exactly one mount has it, at the volume's path. A mount of
// another volume's source is refused: for Kata the source alone decides which
// disk is plugged in, and a pod's author can write one into a hostPath.
func checkMounts(mounts []mount, volumes []hotplug.Volume, sandbox string) error {
	bySource := map[string]hotplug.Volume{}
	for _, volume := range volumes {
		if want := hotplug.Source(sandbox, volume.Name); volume.Source != want {
			return fmt.Errorf("volume %q: source %q is not %q", volume.Name, volume.Source, want)
		}
		bySource[volume.Source] = volume
	}
	sources := path.Dir(path.Dir(hotplug.Source("sandbox", "volume"))) + "/"
	mounted := map[string]bool{}
	for _, m := range mounts {
		if !strings.HasPrefix(path.Clean(m.Source)+"/", sources) {
			continue
		}
		volume, ok := bySource[m.Source]
		switch {
		case !ok:
			return fmt.Errorf("mount of %q at %q: no volume of the hotplug request", m.Source, m.Destination)
		case m.Destination != volume.MountPath:
			return fmt.Errorf("volume %q is mounted at %q, not at %q", volume.Name, m.Destination, volume.MountPath)
		case mounted[m.Source]:
			return fmt.Errorf("volume %q is mounted twice", volume.Name)
		}
		mounted[m.Source] = true
	}
	for _, volume := range volumes {
		if !mounted[volume.Source] {
			return fmt.Errorf("volume %q: no mount of %q at %q", volume.Name, volume.Source, volume.MountPath)
		}
	}
	return nil
}
