package node

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
)

// Images that the node has loaded, by the names that pods use.
const (
	BusyboxImage = "local.test/busybox:1"
	PauseImage   = "local.test/pause:1"
)

// Pod is what a person would write: a pod with its containers.
type Pod struct {
	Name        string
	Annotations map[string]string
	// Policy is Rego text, put into Kata's annotation. Empty: none.
	Policy string
	// Runtime is the runtime handler, "kata" if empty.
	Runtime string
	// SharedProcesses is Kubernetes' shareProcessNamespace.
	SharedProcesses bool
	// UID is Kubernetes' for the pod, by which kubelet names its folders. Empty: the name.
	UID string
}

// Container is one container of a Pod.
type Container struct {
	Name string
	// Image is what the pod's author calls the image, as kubelet passes it on. Empty: the name that the node knows it by.
	Image   string
	Args    []string
	Devices []Device
	Mounts  []Mount
	// Capabilities are asked for on top of CRI's default ones.
	Capabilities []string
}

// Device passes a block device of the node to a container, as kubelet does
// for volumeDevices.
type Device struct {
	HostPath      string `json:"host_path"`
	ContainerPath string `json:"container_path"`
	Permissions   string `json:"permissions"`
}

// Mount is a CRI mount of a host path.
type Mount struct {
	HostPath      string `json:"host_path"`
	ContainerPath string `json:"container_path"`
	Readonly      bool   `json:"readonly,omitempty"`
}

// CRI's namespace modes. Kubernetes gives each container a process namespace
// of its own unless the pod asks to share it.
const (
	pidOfPod       = 0
	pidOfContainer = 1
	networkOfNode  = 2
)

const policyAnnotation = "io.katacontainers.config.agent.policy"

// sandboxJSON is the pod in the form that crictl reads. It uses the node's
// network, since the node has no CNI.
func (p Pod) sandboxJSON() ([]byte, error) {
	uid := p.UID
	if uid == "" {
		uid = p.Name
	}
	annotations := map[string]string{}
	for k, v := range p.Annotations {
		annotations[k] = v
	}
	if p.Policy != "" {
		annotations[policyAnnotation] = base64.StdEncoding.EncodeToString([]byte(p.Policy))
	}
	return json.MarshalIndent(map[string]any{
		"metadata":      map[string]any{"name": p.Name, "namespace": "default", "uid": uid, "attempt": 1},
		"annotations":   annotations,
		"log_directory": "/run/sealvol-node/logs/" + uid,
		"linux": map[string]any{
			"cgroup_parent": "/sealvol",
			"security_context": map[string]any{
				"namespace_options": map[string]any{"network": networkOfNode, "pid": p.pid()},
			},
		},
	}, "", "  ")
}

func (p Pod) pid() int {
	if p.SharedProcesses {
		return pidOfPod
	}
	return pidOfContainer
}

// containerJSON is the pod's container in the form that crictl reads. Each
// attempt at the same container of a pod needs a number of its own.
func (p Pod) containerJSON(c Container, attempt int64) ([]byte, error) {
	security := map[string]any{"namespace_options": map[string]any{"network": networkOfNode, "pid": p.pid()}}
	if len(c.Capabilities) > 0 {
		security["capabilities"] = map[string]any{"add_capabilities": c.Capabilities}
	}
	return json.MarshalIndent(map[string]any{
		"metadata": map[string]any{"name": c.Name, "attempt": attempt},
		"image":    map[string]any{"image": BusyboxImage, "user_specified_image": c.Image},
		"command":  c.Args,
		"log_path": c.Name + ".log",
		"devices":  c.Devices,
		"mounts":   c.Mounts,
		"linux":    map[string]any{"security_context": security},
	}, "", "  ")
}

// VolumeAnnotation asks the plugin for an ephemeral sealed volume: its key
// and its value.
func VolumeAnnotation(name, device, mountPath string) (string, string) {
	return "volume.sealvol.io/" + name,
		fmt.Sprintf(`{"device": %q, "mountPath": %q, "mode": "ephemeral"}`, device, mountPath)
}

// Describe gives a pod and a container as crictl reads them.
func Describe(p Pod, c Container) (pod, container string, err error) {
	podJSON, err := p.sandboxJSON()
	if err != nil {
		return "", "", err
	}
	containerJSON, err := p.containerJSON(c, 1)
	if err != nil {
		return "", "", err
	}
	return string(podJSON), string(containerJSON), nil
}
