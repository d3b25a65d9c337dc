package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

const manifest = `apiVersion: v1
kind: Pod
metadata: {name: my-app}
spec:
  containers:
  - {name: my-container, image: busybox}
  volumes:
  - name: encrypted
    ephemeral:
      volumeClaimTemplate:
        spec:
          accessModes: [ReadWriteOncePod]
          resources: {requests: {storage: 10Gi}}
  - name: inline
    csi: {driver: coco-local-csi, volumeAttributes: {size: 64Mi}}
  - name: raw
    persistentVolumeClaim: {claimName: my-disk}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: my-disk}
spec:
  volumeMode: Block
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 64Mi}}
`

func TestVolumesHaveKubeletsPathsAndModes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "manifest.yaml")
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	const uid = "4f0c8d4e-0000-4000-8000-00000000000c"
	pod, volumes, err := readManifest(file, uid)
	if err != nil {
		t.Fatal(err)
	}
	type want struct {
		target, staging, data string
		mode                  csi.VolumeCapability_AccessMode_Mode
		block                 bool
		bytes                 int64
	}
	wants := map[string]want{
		"encrypted": {
			target: "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pvc-1/mount",
			// Of the handle "pvc-1".
			staging: "/var/lib/kubelet/plugins/kubernetes.io/csi/coco-local-csi/f2868e1aa7cab669517cd9f5ab1b7957c0b92df38fef583267e34e1acc8253fe/globalmount",
			data:    "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/pvc-1",
			mode:    csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER, bytes: 10 << 30,
		},
		"inline": {
			target: "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/inline/mount",
			data:   "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/inline",
			mode:   csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
		},
		"raw": {
			target:  "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1/" + uid,
			staging: "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/staging/pvc-1",
			data:    "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/pvc-1/data",
			mode:    csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER, block: true, bytes: 64 << 20,
		},
	}
	if len(volumes) != len(wants) {
		t.Fatalf("the pod has volumes %v", volumes)
	}
	names := map[string]bool{}
	for _, v := range volumes {
		names[v.spec] = true
		if !v.inline {
			v.spec, v.handle = "pvc-1", "pvc-1"
		}
		got := want{v.target(pod), v.staging(), v.dataDir(pod), v.capability().AccessMode.Mode, v.capability().GetBlock() != nil, v.bytes}
		if v.inline {
			got.staging = ""
		}
		if got != wants[v.name] {
			t.Errorf("%s is\n%+v, not\n%+v", v.name, got, wants[v.name])
		}
	}
	if len(names) != len(volumes) {
		t.Errorf("each volume has a name of its own: %v", names)
	}
}
