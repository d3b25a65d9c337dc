package agent_policy

import rego.v1

sealed_pod := {
	"version": 1,
	"containers": {"my-container": {
		"args": ["sleep", "infinity"],
		"image": "docker.io/library/busybox:latest",
		"exec": [["sh"], ["df", "..."]],
		"rootfs": "host",
	}},
	"volumes": {"encrypted": {
		"mode": "ephemeral",
		"layering": "memory-tags",
		"suites": ["aegis128-random", "aes-xts-random+hmac-sha256"],
		"fs_type": "ext4",
		"options": ["nosuid", "nodev"],
		"size": {"min": 0, "max": 10737418240},
		"mounts": [{"container": "my-container", "path": "/mnt/encrypted", "read_only": false}],
	}},
}
