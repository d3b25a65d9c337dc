package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// identity is what the provisioner gives each volume that it makes: the time of its start, a number, its driver, and its node.
const identity = "1764547200000-4711-" + driverName

// provision makes a claim's volume, as external-provisioner does that runs on each node for this node's claims (--node-deployment,
// --strict-topology), and gives the PersistentVolume's capacity.
func (k *kubelet) provision(ctx context.Context, v *volume) (int64, error) {
	here := []*csi.Topology{{Segments: k.topology}}
	answer, err := k.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: v.spec, Parameters: map[string]string{},
		CapacityRange:             &csi.CapacityRange{RequiredBytes: v.bytes},
		VolumeCapabilities:        []*csi.VolumeCapability{v.capability()},
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: here, Preferred: here},
	})
	if err != nil {
		return 0, err
	}
	made := answer.Volume
	if made.CapacityBytes < v.bytes {
		return 0, fmt.Errorf("created volume capacity %d less than requested capacity %d", made.CapacityBytes, v.bytes)
	}
	v.handle = made.VolumeId
	v.attributes = map[string]string{"storage.kubernetes.io/csiProvisionerIdentity": identity + "-" + k.node}
	for key, value := range made.VolumeContext {
		v.attributes[key] = value
	}
	return made.CapacityBytes, nil
}

// stage makes the staging folder and has the driver stage a volume there.
func (k *kubelet) stage(ctx context.Context, v *volume) error {
	if err := os.MkdirAll(v.staging(), 0o750); err != nil {
		return err
	}
	_, err := k.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.handle, StagingTargetPath: v.staging(), VolumeCapability: v.capability(), VolumeContext: v.attributes,
	})
	return err
}

// publish makes the folder above the target and has the driver publish a volume. The target is the driver's to make.
func (k *kubelet) publish(ctx context.Context, v *volume) error {
	target, staging := v.target(k.pod), v.staging()
	if v.inline {
		staging = "" // it never was staged
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return err
	}
	_, err := k.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: v.handle, StagingTargetPath: staging, TargetPath: target, VolumeCapability: v.capability(), VolumeContext: v.podInfo(k.pod),
	})
	return err
}

func (k *kubelet) unpublish(ctx context.Context, v *volume) error {
	_, err := k.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.handle, TargetPath: v.target(k.pod)})
	return err
}

func (k *kubelet) unstage(ctx context.Context, v *volume) error {
	_, err := k.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.handle, StagingTargetPath: v.staging()})
	return err
}
