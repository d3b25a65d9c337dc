package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

const (
	// podPlugin is kubelet's CSI plugin in the names of a pod's folders.
	podPlugin = "kubernetes.io~csi"

	pluginDir = root + "/plugins/kubernetes.io/csi"
	deviceDir = pluginDir + "/volumeDevices"

	dataName = "vol_data.json"
)

// volume is a volume of the pod that the driver has.
type volume struct {
	// name is the pod's for it, spec kubelet's: that of the PersistentVolume, or, of a volume of the pod's manifest, the pod's again.
	name, spec string
	// handle is the driver's: a PersistentVolume has it, afterwards kubelet's file.
	handle     string
	mode       corev1.PersistentVolumeAccessMode
	attributes map[string]string
	// bytes are what the claim asks for.
	bytes         int64
	block, inline bool
}

// readManifest reads a pod with its claims, and does what the API server and the controllers of claims do with them.
func readManifest(file, uid string) (*corev1.Pod, []*volume, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, err
	}
	pod := &corev1.Pod{}
	claims := map[string]corev1.PersistentVolumeClaimSpec{}
	documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil, err
		}
		var claim corev1.PersistentVolumeClaim
		if err := sigsyaml.Unmarshal(document, &claim.TypeMeta); err != nil {
			return nil, nil, err
		}
		switch claim.Kind {
		case "Pod":
			err = sigsyaml.UnmarshalStrict(document, pod)
		case "PersistentVolumeClaim":
			err = sigsyaml.UnmarshalStrict(document, &claim)
			claims[claim.Name] = claim.Spec
		default:
			err = errors.New("neither a pod nor a claim")
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", claim.Kind, err)
		}
	}
	pod.UID, pod.Namespace = types.UID(uid), "default"
	if pod.Spec.ServiceAccountName == "" {
		pod.Spec.ServiceAccountName = "default"
	}
	var volumes []*volume
	for _, given := range pod.Spec.Volumes {
		v := &volume{name: given.Name, spec: given.Name}
		switch {
		case given.CSI != nil:
			v.inline, v.mode, v.attributes = true, corev1.ReadWriteOnce, given.CSI.VolumeAttributes
			v.handle = fmt.Sprintf("csi-%x", sha256.Sum256([]byte(uid+given.Name)))
		case given.Ephemeral != nil:
			// Its controller makes a claim of this name.
			v.bind(pod.Name+"-"+given.Name, uid, given.Ephemeral.VolumeClaimTemplate.Spec)
		case given.PersistentVolumeClaim != nil:
			claim, ok := claims[given.PersistentVolumeClaim.ClaimName]
			if !ok {
				return nil, nil, fmt.Errorf("volume %s: no claim %s", given.Name, given.PersistentVolumeClaim.ClaimName)
			}
			v.bind(given.PersistentVolumeClaim.ClaimName, uid, claim)
		default:
			return nil, nil, fmt.Errorf("volume %s: is none of the driver's", given.Name)
		}
		volumes = append(volumes, v)
	}
	return pod, volumes, nil
}

// bind gives a volume what its claim says. The claim's uid, by which its PersistentVolume is named, is the API server's.
func (v *volume) bind(claim, uid string, spec corev1.PersistentVolumeClaimSpec) {
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(uid+"/"+claim)))
	v.spec = fmt.Sprintf("pvc-%s-%s-4%s-8%s-%s", sum[:8], sum[8:12], sum[13:16], sum[17:20], sum[20:32])
	v.mode = spec.AccessModes[0]
	v.bytes = spec.Resources.Requests.Storage().Value()
	v.block = spec.VolumeMode != nil && *spec.VolumeMode == corev1.PersistentVolumeBlock
}

// capability is the volume's, as kubelet and the provisioner say it to a driver that knows SINGLE_NODE_MULTI_WRITER.
func (v *volume) capability() *csi.VolumeCapability {
	modes := map[corev1.PersistentVolumeAccessMode]csi.VolumeCapability_AccessMode_Mode{
		corev1.ReadWriteOnce:    csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
		corev1.ReadWriteOncePod: csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
		corev1.ReadOnlyMany:     csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY,
		corev1.ReadWriteMany:    csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER,
	}
	c := &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: modes[v.mode]},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
	}
	if v.block {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	}
	return c
}

// podInfo are the volume's attributes with what kubelet says of the pod where the CSIDriver has podInfoOnMount.
func (v *volume) podInfo(pod *corev1.Pod) map[string]string {
	attributes := map[string]string{
		"csi.storage.k8s.io/pod.name":            pod.Name,
		"csi.storage.k8s.io/pod.namespace":       pod.Namespace,
		"csi.storage.k8s.io/pod.uid":             string(pod.UID),
		"csi.storage.k8s.io/serviceAccount.name": pod.Spec.ServiceAccountName,
		"csi.storage.k8s.io/ephemeral":           fmt.Sprint(v.inline),
	}
	for key, value := range v.attributes {
		attributes[key] = value
	}
	return attributes
}

func podDir(pod *corev1.Pod, parts ...string) string {
	return filepath.Join(append([]string{root, "pods", string(pod.UID)}, parts...)...)
}

// target is where the volume is published.
func (v *volume) target(pod *corev1.Pod) string {
	if v.block {
		return filepath.Join(deviceDir, "publish", v.spec, string(pod.UID))
	}
	return podDir(pod, "volumes", podPlugin, v.spec, "mount")
}

// staging is where it is staged.
func (v *volume) staging() string {
	if v.block {
		return filepath.Join(deviceDir, "staging", v.spec)
	}
	return filepath.Join(pluginDir, driverName, fmt.Sprintf("%x", sha256.Sum256([]byte(v.handle))), "globalmount")
}

// globalMap is where kubelet itself binds a device.
func (v *volume) globalMap(pod *corev1.Pod) string {
	return filepath.Join(deviceDir, v.spec, "dev", string(pod.UID))
}

// device is the link by which containers get it.
func (v *volume) device(pod *corev1.Pod) string {
	return podDir(pod, "volumeDevices", podPlugin, v.spec)
}

// dataDir is the folder of the file by which kubelet finds the volume again, and a kubelet that comes after it.
func (v *volume) dataDir(pod *corev1.Pod) string {
	if v.block {
		return filepath.Join(deviceDir, v.spec, "data")
	}
	return filepath.Dir(v.target(pod))
}

func saveData(dir string, data map[string]string) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	file, err := os.Create(filepath.Join(dir, dataName))
	if err != nil {
		return err
	}
	return errors.Join(json.NewEncoder(file).Encode(data), file.Close())
}

// save writes the volume's file.
func (v *volume) save(pod *corev1.Pod, node string) error {
	data := map[string]string{
		"specVolID": v.spec, "volumeHandle": v.handle, "driverName": driverName, "nodeName": node,
		"attachmentID": fmt.Sprintf("csi-%x", sha256.Sum256([]byte(v.handle+driverName+node))),
	}
	if !v.block {
		data["volumeLifecycleMode"] = "Persistent"
		if v.inline {
			data["volumeLifecycleMode"] = "Ephemeral"
		}
	}
	return saveData(v.dataDir(pod), data)
}

// load reads the volume's handle from it.
func (v *volume) load(pod *corev1.Pod) error {
	text, err := os.ReadFile(filepath.Join(v.dataDir(pod), dataName))
	if err != nil {
		return fmt.Errorf("volume %s: %w", v.name, err)
	}
	var data map[string]string
	if err := json.Unmarshal(text, &data); err != nil {
		return fmt.Errorf("volume %s: %w", v.name, err)
	}
	v.handle = data["volumeHandle"]
	return nil
}
