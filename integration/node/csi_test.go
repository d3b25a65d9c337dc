//go:build node

package node

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// claims is a pod with each kind of volume that the CSI driver has: a claim of 10 GiB and a volume of the pod's manifest, of which nothing
// says that they are sealed, and a raw block device.
const (
	claims = `apiVersion: v1
kind: Pod
metadata:
  name: my-app
  annotations:
    volume.sealvol.io/raw: '` + rawAnnotation + `'
spec:
  runtimeClassName: kata
  containers:
  - name: my-container
    image: busybox
    command: [sleep, infinity]
    volumeMounts:
    - {name: encrypted, mountPath: /mnt/encrypted}
    - {name: inline, mountPath: /mnt/inline/}
    volumeDevices:
    - {name: raw, devicePath: /dev/raw}
  volumes:
  - name: encrypted
    ephemeral:
      volumeClaimTemplate:
        spec:
          accessModes: [ReadWriteOncePod]
          storageClassName: coco-local-csi
          resources: {requests: {storage: 10Gi}}
  - name: inline
    csi: {driver: coco-local-csi, volumeAttributes: {size: 64Mi}}
  - name: raw
    persistentVolumeClaim: {claimName: my-disk}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: my-disk
spec:
  volumeMode: Block
  accessModes: [ReadWriteOnce]
  storageClassName: coco-local-csi
  resources: {requests: {storage: 64Mi}}
`
	rawAnnotation = `{"device": "/dev/raw", "mountPath": "/mnt/raw", "mode": "ephemeral"}`

	claimed = 10 << 30 // bytes of the large one
	small   = 64 * mib // of the others
)

// startDriver runs the CSI driver until the end of the test.
func startDriver(t *testing.T) {
	t.Helper()
	undo, err := theNode.MountCSI(16 << 30)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := undo(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		if err := theNode.StopCSI(); err != nil {
			t.Error(err)
		}
	})
	if err := theNode.StartCSI(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestClaimsGoFromKubeletToTheContainerAndBack has the real driver do what kubelet asks of it for one pod. It is killed between what is
// published and the pod's start, and again while the pod runs.
func TestClaimsGoFromKubeletToTheContainerAndBack(t *testing.T) {
	startDriver(t) // before the scene: what the driver has at the end is compared with what it has now
	s := newScene(t)
	const uid = "4f0c8d4e-0000-4000-8000-00000000000c"
	pod := s.written([]byte(claims), "my-app", uid)
	pod.Annotations = map[string]string{"volume.sealvol.io/raw": rawAnnotation}
	lent, err := s.node.KubeletUp(s.ctx, claims, uid)
	if err != nil {
		t.Fatal(err)
	}
	down := sync.OnceValue(func() error { return s.node.KubeletDown(context.WithoutCancel(s.ctx), claims, uid) })
	s.Cleanup(func() {
		if err := down(); err != nil {
			t.Error(err)
		}
	})
	if lent.Volumes["encrypted"].Bytes != claimed || lent.Volumes["raw"].Bytes != small {
		t.Errorf("the claims must get what they ask for, they have %+v", lent.Volumes)
	}
	disks := s.disks()
	large := filepath.Join(CSIVolumes, lent.Volumes["encrypted"].Handle, "disk.img")
	if len(disks) != 3 || disks[large] != (disk{size: claimed}) {
		t.Errorf("the driver must have three volumes, the claim's of its size without a byte in it; it has %+v", disks)
	}
	s.restartDriver()
	s.wantStats(uid, map[string]Full{"encrypted": {claimed, 0, claimed}, "inline": {small, 0, small}})

	id := s.pod(pod)
	gets := lent.Containers["my-container"]
	container := s.start(id, pod, Container{
		Name: "my-container", Image: "busybox", Args: []string{"sleep", "infinity"}, Mounts: gets.Mounts, Devices: gets.Devices,
	})
	const secret = "the weights are mine alone"
	got := s.exec(container, "sh", "-c", `for v in encrypted inline raw; do
		echo "`+secret+`" > /mnt/$v/f && sync && cat /mnt/$v/f && awk -v at=/mnt/$v '$2 == at {print substr($1, 1, 12)}' /proc/mounts
	done`)
	if want := strings.TrimSpace(strings.Repeat(secret+"\n/dev/mapper/\n", 3)); got != want {
		t.Errorf("the container must read from three sealed mappings what it wrote there, got %q", got)
	}
	full := s.fillClaim(id, pod, container, uid, large)

	s.restartDriver()
	again, err := s.node.KubeletUp(s.ctx, claims, uid) // as a kubelet does that was started again too
	if diff := cmp.Diff(lent, again); err != nil || diff != "" {
		t.Errorf("what is published must stay what it is (%v):\n%s", err, diff)
	}
	s.wantStats(uid, full)
	for disk, as := range s.disks() {
		s.wantSparseCiphertext(disk, as.size, secret)
	}

	// kubelet takes the volumes back when the pod's sandbox has stopped, and removes it later.
	s.crictl("stopp", id)
	if err := down(); err != nil {
		t.Fatal(err)
	}
	for disk := range disks {
		if users := openBy(disk); len(users) > 0 {
			t.Errorf("%s is deleted and still open: %s", disk, strings.Join(users, ", "))
		}
	}
	if left := s.disks(); len(left) > 0 {
		t.Errorf("the driver still has %+v", left)
	}
}

// fillClaim demands that all say the same of the claim of 10 GiB, when it is empty and when it is full, and gives how full the volumes are
// then. The policy's size is the sealed device's, and the host's file's. The file system's is at most that; what it is, what of it is used and
// what can still be written is the same to the byte in the container's df and in what kubelet hears. All of what can still be written is given
// to the container before it gets ENOSPC, and no byte more.
func (s *scene) fillClaim(sandbox string, pod Pod, container, uid, file string) map[string]Full {
	s.Helper()
	if want := fmt.Sprintf(`"size": {"min": %[1]d, "max": %[1]d}`, int64(claimed)); !strings.Contains(pod.Policy, want) {
		s.Errorf("the policy must say %s:\n%s", want, pod.Policy)
	}
	if got := s.sealedBytes(sandbox, "encrypted"); got != claimed {
		s.Errorf("the sealed device must have the claim's %d bytes, it has %d", int64(claimed), got)
	}
	df := s.df(container, "encrypted", "inline")
	s.wantStats(uid, df)
	empty, before := df["encrypted"], s.disks()[file]
	if empty.Capacity > claimed || empty.Capacity < claimed/1000*995 || empty.Available < claimed/1000*994 {
		s.Errorf("the file system must have nearly all of the device's %d bytes, it has %+v", int64(claimed), empty)
	}

	// Space that is taken and not written costs the host nothing. The last MiB is written, and then a block in each GiB.
	got := s.exec(container, "sh", "-c", fmt.Sprintf(`cd /mnt/encrypted
		fallocate -l %d space || exit 1
		dd if=/dev/zero of=rest bs=4096 2>&1 | grep -o 'No space left on device'
		sync
		echo more > more || echo and no byte more
		for i in 0 1 2 3 4 5 6 7 8 9; do
			printf 'GiB %%d. ' $i | dd of=space bs=4096 seek=$((i * 262144 + 100000)) conv=notrunc 2>/dev/null
		done
		sync
		for i in 0 1 2 3 4 5 6 7 8 9; do
			dd if=space bs=4096 skip=$((i * 262144 + 100000)) count=1 2>/dev/null | head -c 7
		done`, empty.Available-mib))
	const want = "No space left on device\nand no byte more\nGiB 0. GiB 1. GiB 2. GiB 3. GiB 4. GiB 5. GiB 6. GiB 7. GiB 8. GiB 9."
	if got != want {
		s.Errorf("a volume that is filled says %q, want %q", got, want)
	}
	df = s.df(container, "encrypted", "inline")
	if want := (Full{empty.Capacity, empty.Used + empty.Available, 0}); df["encrypted"] != want {
		s.Errorf("of an empty volume that is %+v all must be given, it is %+v", empty, df["encrypted"])
	}
	s.wantStats(uid, df)
	after := s.disks()[file]
	s.Logf("of %d bytes the file system has %d, of which %d can be written; of the host's file %d are written when it is empty, and %d when it is full",
		int64(claimed), empty.Capacity, empty.Available, before.written, after.written)
	if before.size != claimed || after.size != claimed || before.written > 48*mib || after.written-before.written > 4*mib {
		s.Errorf("the host's file must stay sparse and of %d bytes, it is %+v and then %+v", int64(claimed), before, after)
	}
	return df
}

// restartDriver kills the CSI driver and starts another one.
func (s *scene) restartDriver() {
	s.Helper()
	if err := s.node.KillCSI(); err != nil {
		s.Fatal(err)
	}
	if err := s.node.StartCSI(s.ctx); err != nil {
		s.Fatal(err)
	}
}

// wantStats demands that kubelet hears this of the pod's volumes with file systems, and of the device its size: how full it is, only
// its guest knows.
func (s *scene) wantStats(uid string, want map[string]Full) {
	s.Helper()
	want = maps.Clone(want)
	want["raw"] = Full{Capacity: small}
	got, err := s.node.KubeletStats(s.ctx, claims, uid)
	if err != nil {
		s.Error(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		s.Errorf("what the driver says of its volumes is not what it must be:\n%s", diff)
	}
}

// df is what a container sees of its volumes at /mnt.
func (s *scene) df(container string, volumes ...string) map[string]Full {
	s.Helper()
	all := map[string]Full{}
	lines := strings.Split(s.exec(container, "sh", "-c", "sync; df -Pk /mnt/"+strings.Join(volumes, " /mnt/")), "\n")
	for i, name := range volumes {
		var device string
		var v Full
		if len(lines) != len(volumes)+1 {
			s.Fatalf("df of %v says %q", volumes, lines)
		}
		if _, err := fmt.Sscan(lines[i+1], &device, &v.Capacity, &v.Used, &v.Available); err != nil {
			s.Fatalf("df of %s says %q: %v", name, lines[i+1], err)
		}
		all[name] = Full{v.Capacity << 10, v.Used << 10, v.Available << 10}
	}
	return all
}

// sealedBytes is the size of the device that a container has for a volume.
func (s *scene) sealedBytes(sandbox, volume string) int64 {
	s.Helper()
	out, err := s.node.Inspect(s.ctx, sandbox, "-o", "json")
	if err != nil {
		s.Fatal(err)
	}
	var report struct {
		Status struct {
			Volumes []struct {
				Name  string
				Bytes int64 `json:"size_bytes,string"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		s.Fatal(err)
	}
	for _, v := range report.Status.Volumes {
		if v.Name == volume {
			return v.Bytes
		}
	}
	s.Fatalf("inspect shows no volume %s:\n%s", volume, out)
	return 0
}

// disk is how large a file is, and how much of that its file system has given it, in bytes.
type disk struct{ size, written int64 }

// disks are the backing files of the CSI driver's volumes.
func (s *scene) disks() map[string]disk {
	s.Helper()
	paths, err := filepath.Glob(CSIVolumes + "/*/disk.img")
	if err != nil {
		s.Fatal(err)
	}
	all := map[string]disk{}
	for _, path := range paths {
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil {
			s.Fatal(err)
		}
		all[path] = disk{size: stat.Size, written: stat.Blocks * 512}
	}
	return all
}
