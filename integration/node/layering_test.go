//go:build node

package node

import (
	"strings"
	"testing"
)

// The layerings and file systems that sealedPolicy does not use.
const layeringPolicy = `package agent_policy

sealed_pod := {
	"version": 1,
	"containers": {"my-container": {
		"args": ["sleep", "infinity"],
		"exec": [["df", "..."], ["sh", "..."], ["cat", "..."], ["stat", "..."]],
	}},
	"volumes": {
		"luks": {
			"mode": "ephemeral", "layering": "luks2", "size": {"max": 1073741824},
			"mounts": [{"container": "my-container", "path": "/mnt/luks"}],
		},
		"xfs": {
			"mode": "ephemeral", "suites": ["aes-xts-random+hmac-sha256"], "fs_type": "xfs", "size": {"max": 1073741824},
			"fs_group": {"gid": 2000}, "max_tag_memory": 8388608, "preallocate_tags": true,
			"mounts": [{"container": "my-container", "path": "/mnt/xfs"}],
		},
	},
}
`

// A container that stops and starts again within its pod finds its volumes, although Kata unplugs the disks in between.
func TestEveryLayeringKeepsItsDataWhileThePodLives(t *testing.T) {
	s := newScene(t)
	pod := Pod{Name: "layerings", Annotations: map[string]string{}, Policy: layeringPolicy}
	c := Container{Name: "my-container", Args: []string{"sleep", "infinity"}}
	for _, name := range []string{"luks", "xfs"} {
		_, device := s.disk(512 * mib)
		key, value := VolumeAnnotation(name, "/dev/"+name, "/mnt/"+name)
		pod.Annotations[key] = value
		c.Devices = append(c.Devices, Device{HostPath: device, ContainerPath: "/dev/" + name, Permissions: "rwm"})
	}
	id := s.pod(pod)
	container := s.start(id, pod, c)
	df := s.exec(container, "df", "-TP")
	for name, fs := range map[string]string{"luks": "ext4", "xfs": "xfs"} {
		line := strings.Fields(lineWith(df, "/mnt/"+name))
		if len(line) < 2 || !strings.HasPrefix(line[0], "/dev/mapper/encrypted_disk_") || line[1] != fs {
			t.Errorf("volume %s must be an %s on its mapping, df says %q", name, fs, line)
		}
		s.exec(container, "sh", "-c", "echo kept > /mnt/"+name+"/f")
	}
	if got := s.exec(container, "stat", "-c", "%g %A", "/mnt/xfs"); got != "2000 drwxrwsr-x" {
		t.Errorf("the policy's group must own the volume, with setgid: %s", got)
	}
	inspect, err := s.node.Inspect(s.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"luks2", "aes-xts-plain64", "hmac(sha256)", "aes-xts-random+hmac-sha256"} {
		if !strings.Contains(inspect, want) {
			t.Errorf("inspect must show %q:\n%s", want, inspect)
		}
	}
	if strings.Contains(inspect, "journal:") {
		t.Errorf("no layering may journal, every byte would be written twice:\n%s", inspect)
	}

	for _, command := range [][]string{{"stop", "-t", "0", container}, {"rm", container}} {
		if _, err := s.node.Crictl(s.ctx, command...); err != nil {
			t.Fatal(err)
		}
	}
	container = s.start(id, pod, c)
	for _, name := range []string{"luks", "xfs"} {
		if got := s.exec(container, "cat", "/mnt/"+name+"/f"); got != "kept" {
			t.Errorf("volume %s: the container must find what it wrote before it was restarted, got %q", name, got)
		}
	}
}
