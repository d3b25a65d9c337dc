package testbed

import (
	"encoding/json"
	"fmt"
)

// Volume is a volume of the policy. What is empty is left to the policy's defaults.
type Volume struct {
	Layering string   `json:"layering,omitempty"`
	Suites   []string `json:"suites,omitempty"`
	FSType   string   `json:"fs_type,omitempty"`
	Options  []string `json:"options,omitempty"`
	Min      uint64   `json:"-"` // bytes
	Max      uint64   `json:"-"` // bytes
}

// Policy is the text of a policy with these volumes, each of them for one container. The testbed asks no policy who may have a volume:
// that is the gate's.
func Policy(volumes map[string]Volume) (string, error) {
	type object map[string]any
	pod := object{"version": 1, "containers": object{"c": object{}}}
	declared := object{}
	for name, v := range volumes {
		declared[name] = struct {
			Mode string `json:"mode"`
			Volume
			Size   object   `json:"size"`
			Mounts []object `json:"mounts"`
		}{"ephemeral", v, object{"min": v.Min, "max": v.Max}, []object{{"container": "c", "path": "/mnt/" + name}}}
	}
	pod["volumes"] = declared
	text, err := json.MarshalIndent(pod, "", "  ")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("package agent_policy\n\nsealed_pod := %s\n", text), nil
}
