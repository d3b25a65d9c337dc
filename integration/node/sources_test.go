//go:build node

package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/plugin/published"
	"github.com/sealvol/sealvol/policy/author"
)

// kubeletPods is where kubelet has a folder for each pod.
const kubeletPods = "/var/lib/kubelet/pods"

// talk is the manifest of the talk. Nothing in it says that anything is sealed.
const talk = "../../policy/author/testdata/pods/talk.yaml"

// written gives a pod with the policy that `sealvol policy` writes for a
// manifest of one, with what the test executes allowed.
func (s *scene) written(manifest []byte, name, uid string) Pod {
	s.Helper()
	result, err := author.Annotate(s.ctx, manifest, author.Options{Exec: [][]string{{"sh", "..."}}})
	if err != nil {
		s.Fatal(err)
	}
	return Pod{Name: name, UID: uid, Policy: string(result.Pods[0].Policy)}
}

// publish does what a CSI driver does on NodePublishVolume: kubelet has made the
// folder above the target, the driver makes the target, mounts nothing there,
// and leaves a record. It gives the backing file and the target.
func (s *scene) publish(uid, claim string, size int64) (file, target string) {
	s.Helper()
	dir := filepath.Join(kubeletPods, uid)
	file = filepath.Join(s.node.dir, "disks", claim+".img")
	target = filepath.Join(dir, "volumes/kubernetes.io~csi", claim, "mount")
	err := errors.Join(os.MkdirAll(target, 0o750), os.WriteFile(file, nil, 0o600), os.Truncate(file, size),
		published.Dir(published.Root).Write(published.Volume{Name: claim, Target: target, File: file}))
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		// Before the driver takes it back nobody may have it any more.
		if users := openBy(file); len(users) > 0 {
			s.Errorf("the pod is gone and %s is still open: %s", file, strings.Join(users, ", "))
		}
		if err := errors.Join(published.Dir(published.Root).Remove(target), os.Remove(file), os.RemoveAll(dir)); err != nil {
			s.Error(err)
		}
	})
	return file, target
}

// openBy lists the file descriptors of all processes that are a file.
func openBy(file string) []string {
	var users []string
	all, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range all {
		if path, err := os.Readlink(fd); err == nil && strings.TrimSuffix(path, " (deleted)") == file {
			users = append(users, fd)
		}
	}
	return users
}

// TestTheTalksPodGetsASealedVolume runs the pod of the talk, of whose YAML not a byte is ours.
func TestTheTalksPodGetsASealedVolume(t *testing.T) {
	s := newScene(t)
	manifest, err := os.ReadFile(talk)
	if err != nil {
		t.Fatal(err)
	}
	const uid = "4f0c8d4e-0000-4000-8000-00000000000a"
	pod := s.written(manifest, "my-app", uid)
	file, target := s.publish(uid, "pvc-4f0c8d4e", 10<<30)
	id := s.pod(pod)
	container := s.start(id, pod, Container{
		Name: "my-container", Image: "busybox", Args: []string{"sleep", "infinity"},
		// Kubelet passes on a slash at the end of a path.
		Mounts: []Mount{{HostPath: target, ContainerPath: "/mnt/encrypted/"}},
	})
	const secret = "the weights are mine alone"
	got := s.exec(container, "sh", "-c", fmt.Sprintf("echo '%s' > /mnt/encrypted/f && sync && cat /mnt/encrypted/f && df -P /mnt/encrypted | tail -1", secret))
	if !strings.HasPrefix(got, secret+"\n/dev/mapper/encrypted_disk_") {
		t.Errorf("the container must read what it wrote to the sealed mapping, got %q", got)
	}
	s.wantSparseCiphertext(file, 10<<30, secret)
	if entries, err := os.ReadDir(target); err != nil || len(entries) > 0 {
		t.Errorf("kubelet's folder must stay empty, it has %v (%v)", entries, err)
	}
}

// scratch is a pod whose emptyDir is sealed, with two containers that share it at
// paths of their own and one that does not mount it.
const scratch = `apiVersion: v1
kind: Pod
metadata:
  name: ocr
  annotations:
    volume.sealvol.io/pages: '{"emptyDir": "scratch", "size": "64Mi"}'
spec:
  runtimeClassName: kata
  containers:
  - name: split
    image: busybox
    command: [sleep, infinity]
    volumeMounts:
    - {name: scratch, mountPath: /pages/}
  - name: read
    image: busybox
    command: [sleep, infinity]
    volumeMounts:
    - {name: scratch, mountPath: /in, readOnly: true}
  - name: other
    image: busybox
    command: [sleep, infinity]
  volumes:
  - name: scratch
    emptyDir: {}
`

func TestAnEmptyDirWithAnAnnotationIsSealed(t *testing.T) {
	s := newScene(t)
	const uid = "4f0c8d4e-0000-4000-8000-00000000000b"
	dir := filepath.Join(kubeletPods, uid)
	folder := filepath.Join(dir, "volumes/kubernetes.io~empty-dir/scratch")
	// Kubelet makes it for all users, and removes it when the pod is gone.
	if err := errors.Join(os.MkdirAll(folder, 0o750), os.Chmod(folder, 0o777)); err != nil {
		t.Fatal(err)
	}
	s.Cleanup(func() {
		if entries, err := os.ReadDir(folder); err != nil || len(entries) > 0 {
			t.Errorf("the sandbox is gone and the emptyDir still has %v (%v)", entries, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	pod := s.written([]byte(scratch), "ocr", uid)
	pod.Annotations = map[string]string{"volume.sealvol.io/pages": `{"emptyDir": "scratch", "size": "64Mi"}`}
	id := s.pod(pod)
	sleeping := func(name string, mounts ...Mount) string {
		return s.start(id, pod, Container{Name: name, Image: "busybox", Args: []string{"sleep", "infinity"}, Mounts: mounts})
	}
	split := sleeping("split", Mount{HostPath: folder, ContainerPath: "/pages/"})
	const secret = "page one is nobody's business"
	s.exec(split, "sh", "-c", "echo \""+secret+"\" > /pages/1 && sync")
	disk := filepath.Join(folder, "sealvol.img")
	s.wantSparseCiphertext(disk, 64*mib, secret)

	read := sleeping("read", Mount{HostPath: folder, ContainerPath: "/in", Readonly: true})
	if got := s.exec(read, "sh", "-c", "cat /in/1; touch /in/2 2>/dev/null || echo read-only"); got != secret+"\nread-only" {
		t.Errorf("the second container must read what the first one wrote, and write nothing; got %q", got)
	}
	other := sleeping("other")
	if got := s.exec(other, "sh", "-c", "grep -c encrypted_disk_ /proc/self/mountinfo; ls / | grep -xE 'in|pages'; true"); got != "0" {
		t.Errorf("a container that does not mount the emptyDir must not have it, it shows %q", got)
	}

	// The size is the volume's: the container is told, and nobody is evicted.
	got := s.exec(split, "sh", "-c", "dd if=/dev/zero of=/pages/full bs=1M 2>&1 | grep -c 'No space left'; sync; df -Pk /pages | awk 'END {print $2}'")
	var full, size int64
	if _, err := fmt.Sscan(got, &full, &size); err != nil || full != 1 || size > 64*1024 || size < 48*1024 {
		t.Errorf("the container must be told that the volume of 64 MiB is full, got %q (%v)", got, err)
	}
	if info, err := os.Stat(disk); err != nil || info.Size() != 64*mib {
		t.Errorf("the file of a full volume must keep its size, it is %v (%v)", info, err)
	}
}

// TestNoTwoPodsShareABacking lends the device of one pod to a second one.
func TestNoTwoPodsShareABacking(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	first := sealedPod("first")
	first.Policy = strings.Replace(sealedPolicy, `"containers": {`, `"containers": {"helper": {"args": ["sleep", "infinity"], "rootfs": "host"}, `, 1)
	firstID, err := s.node.RunPod(s.ctx, first)
	if err != nil {
		t.Fatal(err)
	}
	removed := false
	s.Cleanup(func() {
		if !removed {
			if err := s.node.RemovePod(context.WithoutCancel(s.ctx), firstID); err != nil {
				t.Error(err)
			}
		}
	})
	s.start(firstID, first, sealedContainer(device))
	// Which container must have the volume is for the policy to say.
	s.start(firstID, first, Container{Name: "helper", Args: []string{"sleep", "infinity"}})

	second := sealedPod("second")
	secondID := s.pod(second)
	without := sealedContainer(device)
	without.Devices = nil
	_, err = s.node.RunContainer(s.ctx, secondID, second, without)
	s.wantRefusal(err, "volume_missing", "encrypted")
	_, err = s.node.RunContainer(s.ctx, secondID, second, sealedContainer(device))
	s.wantRefusal(err, "encrypted", "is that of another pod, which must be removed first")

	// With its holder killed, and what that left removed, it is free.
	shims := s.shimsOf(firstID)
	if len(shims) == 0 {
		t.Fatal("no shim of the first pod")
	}
	for _, pid := range shims {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	s.awaitAllEnded(firstID)
	if err := s.node.RemovePod(s.ctx, firstID); err != nil {
		t.Fatal(err)
	}
	removed = true
	s.start(secondID, second, sealedContainer(device))
}

// shimsOf lists the processes of our shim that hold a sandbox.
func (s *scene) shimsOf(sandbox string) []int {
	s.Helper()
	all, err := Processes()
	if err != nil {
		s.Fatal(err)
	}
	var pids []int
	for _, p := range all {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		if err == nil && p.Program == "containerd-shim-kata-sealvol-v2" && bytes.Contains(text, []byte(sandbox)) {
			pids = append(pids, p.PID)
		}
	}
	return pids
}

// wantSparseCiphertext looks at a backing file as its host does.
func (s *scene) wantSparseCiphertext(path string, size int64, secret string) {
	s.Helper()
	file, err := os.Open(path)
	if err != nil {
		s.Fatal(err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		s.Fatal(err)
	}
	written := int64(0)
	for end := int64(0); ; {
		begin, err := file.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			s.Fatal(err)
		}
		if end, err = file.Seek(begin, unix.SEEK_HOLE); err != nil {
			s.Fatal(err)
		}
		data := make([]byte, end-begin)
		if _, err := file.ReadAt(data, begin); err != nil {
			s.Fatal(err)
		}
		if bytes.Contains(data, []byte(secret)) {
			s.Errorf("the host's disk shows %q in the clear", secret)
		}
		written += end - begin
	}
	if info.Size() != size || written == 0 || written > size/2 {
		s.Errorf("the backing file must be sparse and of %d bytes, it has %d bytes and holds %d", size, info.Size(), written)
	}
}
