package agent_policy

import rego.v1

sealed_pod := {
	"version": 1,
	"containers": {
		"my-container": {"args": ["sleep", "infinity"], "rootfs": "host"},
		"reader": {"args": ["sleep", "infinity"], "rootfs": "host"},
		"other": {"args": ["sleep", "infinity"], "rootfs": "host"},
	},
	"volumes": {"scratch": {
		"mode": "ephemeral",
		"layering": "memory-tags",
		"suites": ["aegis128-random", "aes-xts-random+hmac-sha256"],
		"fs_type": "ext4",
		"options": ["nosuid", "nodev"],
		"size": {"min": 1073741824, "max": 1073741824},
		"fs_group": {"gid": 2000, "change_policy": "Always"},
		"mounts": [
			{"container": "my-container", "path": "/mnt/encrypted", "read_only": false},
			{"container": "reader", "path": "/mnt/encrypted", "read_only": true},
		],
	}},
}
