package agent_policy

import rego.v1

volume(path, read_only) := {
	"mode": "ephemeral",
	"size": {"min": 1073741824, "max": 1073741824},
	"mounts": [{"container": "my-container", "path": path, "read_only": read_only}],
}

sealed_pod := {
	"version": 1,
	"containers": {"my-container": {}, "other": {"args": ["true"]}},
	"volumes": {"a": volume("/mnt/a", false), "b": volume("/mnt/b", true)},
}
