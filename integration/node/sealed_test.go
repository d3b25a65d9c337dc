//go:build node

package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/sealvol/sealvol/guest/api/receipt"
)

const mib = 1 << 20

// sealedPolicy names one container, with the commands that the tests run in
// it, and one volume.
const sealedPolicy = `package agent_policy

sealed_pod := {
	"version": 1,
	"containers": {"my-container": {
		"args": ["sleep", "infinity"],
		"exec": [["df", "..."], ["sh", "..."], ["dd", "..."], ["cat", "..."], ["mount"], ["vsockdial", "..."]],
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
`

// sealedPod is a pod as its author would write it: an annotation that asks
// for the volume and a policy that says what it is.
func sealedPod(name string) Pod {
	key, value := VolumeAnnotation("encrypted", "/dev/encrypted", "/mnt/encrypted")
	return Pod{Name: name, Annotations: map[string]string{key: value}, Policy: sealedPolicy}
}

func sealedContainer(device string) Container {
	return Container{
		Name:    "my-container",
		Args:    []string{"sleep", "infinity"},
		Devices: []Device{{HostPath: device, ContainerPath: "/dev/encrypted", Permissions: "rwm"}},
	}
}

func TestSealedVolumeHoldsDataThatTheHostCannotRead(t *testing.T) {
	s := newScene(t)
	file, device := s.disk(256 * mib)
	pod := sealedPod("sealed")
	id := s.pod(pod)
	container := s.start(id, pod, sealedContainer(device))

	df := s.exec(container, "df", "-hTP")
	line := lineWith(df, "/mnt/encrypted")
	if !strings.HasPrefix(line, "/dev/mapper/encrypted_disk_") || !strings.Contains(line, "ext4") {
		t.Errorf("the volume must be an ext4 on the sealed mapping, df says %q of\n%s", line, df)
	}

	const secret = "print('the weights are mine alone')"
	s.exec(container, "sh", "-c", fmt.Sprintf(`for i in 1 2 3 4 5 6 7 8; do echo "%s"; done > /mnt/encrypted/ai_model.py && sync`, secret))
	if got := s.exec(container, "cat", "/mnt/encrypted/ai_model.py"); strings.Count(got, secret) != 8 {
		t.Errorf("the container must read what it wrote, got %q", got)
	}
	onHost, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, trace := range []string{secret, "ai_model.py", "lost+found"} {
		if bytes.Contains(onHost, []byte(trace)) {
			t.Errorf("the host's disk shows %q in the clear", trace)
		}
	}
	if len(bytes.Trim(onHost, "\x00")) == 0 {
		t.Error("the host's disk is empty: the data went elsewhere")
	}

	inspect, err := s.node.Inspect(s.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"encrypted_disk_", "_dif", "aegis128-random", "/mnt/encrypted"} {
		if !strings.Contains(inspect, want) {
			t.Errorf("inspect must show %q:\n%s", want, inspect)
		}
	}

	const nonce = "000102030405060708090a0b0c0d0e0f"
	encoded, err := s.node.Receipt(s.ctx, id, "--nonce", nonce)
	if err != nil {
		t.Fatal(err)
	}
	r, err := receipt.Parse([]byte(encoded))
	if err != nil {
		t.Fatalf("%v:\n%s", err, encoded)
	}
	if r.TEE != receipt.NoTEE || r.Nonce != nonce || r.Policy.Source != "set-policy" || r.Policy.Digest != fmt.Sprintf("%x", sha256.Sum256([]byte(sealedPolicy))) {
		t.Errorf("the receipt must say whose word the policy is, and which policy:\n%s", encoded)
	}
	if len(r.Containers) != 1 || r.Containers[0].State != "started" || r.Containers[0].RootFS != "host" || r.Containers[0].ID != container {
		t.Errorf("the receipt must show the container:\n%s", encoded)
	}
	if len(r.Volumes) != 1 || r.Volumes[0].State != "open" || r.Volumes[0].Created.IsZero() || r.Volumes[0].PCIPath == "" || len(r.Volumes[0].Mounts) != 1 ||
		r.Volumes[0].Mounts[0].Container != "my-container" || r.Volumes[0].Mounts[0].Path != "/mnt/encrypted" {
		t.Errorf("the receipt must show the volume that is mounted:\n%s", encoded)
	}
}

func TestPodsWithTheSameVolumeNameDoNotMeet(t *testing.T) {
	s := newScene(t)
	type one struct{ file, container, secret string }
	pods := make([]one, 2)
	if every {
		pods = make([]one, 8)
	}
	var group sync.WaitGroup
	for i := range pods {
		name := fmt.Sprintf("pod-%d", i+1)
		file, device := s.disk(128 * mib)
		group.Go(func() {
			pod := sealedPod(name)
			id, err := s.node.RunPod(s.ctx, pod)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() {
				if err := s.node.RemovePod(context.WithoutCancel(s.ctx), id); err != nil {
					t.Error(err)
				}
			})
			container, err := s.node.RunContainer(s.ctx, id, pod, sealedContainer(device))
			if err != nil {
				t.Error(err)
				return
			}
			pods[i] = one{file, container, "secret-of-" + name}
		})
	}
	group.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, o := range pods {
		s.exec(o.container, "sh", "-c", "echo "+o.secret+" > /mnt/encrypted/f && sync")
	}
	for _, o := range pods {
		if got := s.exec(o.container, "cat", "/mnt/encrypted/f"); got != o.secret {
			t.Errorf("each pod must keep its own data, got %q, want %q", got, o.secret)
		}
		onHost, err := os.ReadFile(o.file)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(onHost, []byte("secret-of-")) {
			t.Error("the host's disk shows a secret in the clear")
		}
	}
}

func TestPodWithoutVolumesIsUnaffected(t *testing.T) {
	s := newScene(t)
	pod := Pod{Name: "plain"}
	id := s.pod(pod)
	container := s.start(id, pod, Container{Name: "anything", Args: []string{"sh", "-c", "echo hello; exec sleep infinity"}})
	if got := s.exec(container, "echo", "still here"); got != "still here" {
		t.Errorf("exec in a pod without volumes gave %q", got)
	}
	if _, err := s.node.Exec(s.ctx, container, "sh", "-c", "exit 7"); err == nil || !strings.Contains(err.Error(), "7") {
		t.Errorf("the exit status of a command must come through, got %v", err)
	}
	logs, err := s.node.Crictl(s.ctx, "logs", container)
	if err != nil || logs != "hello" {
		t.Errorf("the container's log must come through, got %q, %v", logs, err)
	}
}

func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}
