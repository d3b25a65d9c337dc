package agent_policy

import rego.v1

# Rules of the author's own can only deny.
sealed_pod_deny contains "nothing is preloaded here" if {
	some variable in input.request.OCI.Process.Env
	startswith(variable, "LD_PRELOAD=")
}

sealed_pod_deny contains sprintf("user %d is not root", [uid]) if {
	uid := input.request.OCI.Process.User.UID
	uid != 0
}

sealed_pod_deny contains "the clock stays as it is" if input.rpc == "SetGuestDateTime"

sealed_pod_allow contains "anything"

AddSwapRequest := true

sealed_pod := {
	"version": 1,
	"containers": {"my-container": {
		"args": ["sleep", "infinity"],
		"image": "docker.io/library/busybox:latest",
		"rootfs": "host",
	}},
	"volumes": {"encrypted": {
		"mode": "ephemeral",
		"size": {"min": 10737418240, "max": 10737418240},
		"mounts": [{"container": "my-container", "path": "/mnt/encrypted"}],
	}},
}
