package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/sealvol/sealvol/contrib/csi/internal/store"
	"github.com/sealvol/sealvol/plugin/published"
)

// NodeGetCapabilities says what the Node can do.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	response := &csi.NodeGetCapabilitiesResponse{}
	for _, kind := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
	} {
		response.Capabilities = append(response.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: kind}},
		})
	}
	return response, nil
}

// NodeGetInfo names the node.
func (d *Driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.Node, AccessibleTopology: d.topology()}, nil
}

// NodeStageVolume attaches a raw block volume to a loop device. A volume that is
// to be mounted stays a file: the shim attaches it when its sandbox runs.
func (d *Driver) NodeStageVolume(_ context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := checkPath("staging target path", r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	if err := checkCapability(r.GetVolumeCapability()); err != nil {
		return nil, err
	}
	if err := checkKeys("attribute", r.GetVolumeContext(), provisionerKey); err != nil {
		return nil, err
	}
	release, err := d.busy.take(r.VolumeId)
	if err != nil {
		return nil, err
	}
	defer release()
	v, err := d.Volumes.Get(r.VolumeId)
	if err != nil {
		return nil, err
	}
	if r.VolumeCapability.GetBlock() == nil {
		return &csi.NodeStageVolumeResponse{}, nil
	}
	if err := d.Devices.Attach(v.File); err != nil {
		return nil, fmt.Errorf("stage volume %q: %w", v.ID, err)
	}
	d.Log.Info("volume is staged", "volume", v.ID)
	return &csi.NodeStageVolumeResponse{}, nil
}

// NodeUnstageVolume takes a raw block volume's loop device away. Its data stay.
func (d *Driver) NodeUnstageVolume(_ context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := checkPath("staging target path", r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	release, err := d.busy.take(r.VolumeId)
	if err != nil {
		return nil, err
	}
	defer release()
	v, err := d.Volumes.Get(r.VolumeId)
	if errdefs.IsNotFound(err) {
		return &csi.NodeUnstageVolumeResponse{}, nil // what is not there is not staged
	}
	if err != nil {
		return nil, err
	}
	_, bound, err := d.Devices.State(v.File)
	if err != nil {
		return nil, err
	}
	if len(bound) > 0 {
		return nil, fmt.Errorf("volume %q is published at %s: unpublish it first: %w", v.ID, bound[0], errdefs.ErrFailedPrecondition)
	}
	if err := d.Devices.Detach(v.File); err != nil {
		return nil, fmt.Errorf("unstage volume %q: %w", v.ID, err)
	}
	d.Log.Info("volume is unstaged", "volume", v.ID)
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume puts a volume where kubelet wants it: the loop device for a raw
// block volume, else a folder and the record by which the plugin knows it. A volume
// that is written in the pod's manifest is made first.
func (d *Driver) NodePublishVolume(_ context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := checkPath("target path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	if err := checkCapability(r.GetVolumeCapability()); err != nil {
		return nil, err
	}
	target, err := resolve(r.TargetPath)
	if err != nil {
		return nil, err
	}
	inline, err := isEphemeral(r.GetVolumeContext())
	if err != nil {
		return nil, err
	}
	if inline {
		return d.publishInline(r, target)
	}
	if err := checkKeys("attribute", r.VolumeContext, provisionerKey); err != nil {
		return nil, err
	}
	if r.GetStagingTargetPath() == "" {
		return nil, fmt.Errorf("no staging target path: stage the volume first: %w", errdefs.ErrFailedPrecondition)
	}
	release, err := d.busy.take(r.VolumeId)
	if err != nil {
		return nil, err
	}
	defer release()
	v, err := d.Volumes.Get(r.VolumeId)
	if err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, d.publish(v, r, target)
}

// publishInline makes a volume and publishes it, both or neither.
func (d *Driver) publishInline(r *csi.NodePublishVolumeRequest, target string) (*csi.NodePublishVolumeResponse, error) {
	if err := checkKeys("attribute", r.VolumeContext, sizeKey); err != nil {
		return nil, err
	}
	size, err := inlineSize(r.VolumeContext)
	if err != nil {
		return nil, err
	}
	id := inlineID(r.VolumeId)
	release, err := d.busy.take(id)
	if err != nil {
		return nil, err
	}
	defer release()
	_, err = d.Volumes.Get(id)
	fresh := errdefs.IsNotFound(err)
	v, err := d.Volumes.Create(id, store.Range{Required: size})
	if err != nil {
		return nil, err
	}
	if err := d.publish(v, r, target); err != nil {
		if fresh {
			err = errors.Join(err, d.Volumes.Delete(id))
		}
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// publish publishes a volume that is there, whole or not at all.
func (d *Driver) publish(v store.Volume, r *csi.NodePublishVolumeRequest, target string) error {
	use, err := d.use(v)
	if err != nil {
		return err
	}
	block := r.VolumeCapability.GetBlock() != nil
	if block && r.Readonly {
		return fmt.Errorf("volume %q: a raw block volume begins empty, read-only it is of no use: %w", v.ID, errdefs.ErrInvalidArgument)
	}
	wanted := place{path: target, block: block, readOnly: r.Readonly}
	if slices.Contains(use.targets, wanted) {
		if block {
			return nil
		}
		// kubelet removes the folder itself after some errors.
		_, err := makeTarget(target, block)
		return err
	}
	for _, t := range use.targets { // of a device, kubelet's own binds too
		switch {
		case t.path == target:
			return fmt.Errorf("volume %q is published at %s already, otherwise than is asked for now: %w", v.ID, target, errdefs.ErrAlreadyExists)
		case r.VolumeCapability.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER:
			return fmt.Errorf("volume %q is for one pod, and published at %s: end that pod first: %w", v.ID, t.path, errdefs.ErrFailedPrecondition)
		}
	}
	if other, err := d.Published.Find(target); !errdefs.IsNotFound(err) {
		if err == nil {
			err = fmt.Errorf("%s is that of volume %q: %w", target, other.Name, errdefs.ErrAlreadyExists)
		}
		return err
	}
	made, err := makeTarget(target, block)
	if err != nil {
		return err
	}
	if block {
		err = d.Devices.Bind(v.File, target)
	} else {
		err = d.Published.Write(published.Volume{Name: v.ID, Target: target, File: v.File, ReadOnly: r.Readonly})
	}
	if err != nil {
		if made {
			err = errors.Join(err, os.Remove(target))
		}
		return fmt.Errorf("publish volume %q: %w", v.ID, err)
	}
	d.Log.Info("volume is published", "volume", v.ID, "target", target, "block", block)
	return nil
}

// makeTarget makes what a volume is published on, and says whether it was not there.
// Nobody without privileges can enter the folder: a container that gets the folder itself, where
// no plugin put the volume in its place, is not to write there.
func makeTarget(target string, block bool) (made bool, err error) {
	if block {
		var file *os.File
		if file, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
			return true, file.Close()
		}
	} else if err = os.Mkdir(target, 0); err == nil {
		return true, nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	info, err := os.Lstat(target)
	if err != nil {
		return false, err
	}
	if block && !info.Mode().IsRegular() || !block && !info.IsDir() {
		return false, fmt.Errorf("target %s is %v: %w", target, info.Mode(), errdefs.ErrFailedPrecondition)
	}
	return false, nil
}

// NodeUnpublishVolume removes a target. A volume that was written in the pod's
// manifest goes with it.
func (d *Driver) NodeUnpublishVolume(_ context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := checkPath("target path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	target, err := resolve(r.TargetPath)
	if err != nil {
		return nil, err
	}
	// kubelet does not say any more which kind it is.
	id := r.VolumeId
	inline := inlineID(id)
	if _, err := d.Volumes.Get(inline); err == nil {
		id = inline
	}
	release, err := d.busy.take(id)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := d.unpublish(id, target); err != nil {
		return nil, fmt.Errorf("unpublish volume %q: %w", id, err)
	}
	if id == inline {
		v, err := d.Volumes.Get(id)
		if errdefs.IsNotFound(err) {
			return &csi.NodeUnpublishVolumeResponse{}, nil
		}
		if err != nil {
			return nil, err
		}
		if err := d.checkUnused(v); err != nil {
			return nil, err
		}
		if err := d.Volumes.Delete(id); err != nil {
			return nil, err
		}
	}
	d.Log.Info("volume is unpublished", "volume", id, "target", target)
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (d *Driver) unpublish(id, target string) error {
	record, err := d.Published.Find(target)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err == nil && record.Name != id {
		return fmt.Errorf("%s is that of volume %q: %w", target, record.Name, errdefs.ErrFailedPrecondition)
	}
	if err := d.Devices.Unbind(target); err != nil {
		return err
	}
	// The folder goes before its record: without one, what a container wrote there would not be sealed.
	err = os.Remove(target)
	if errors.Is(err, unix.ENOTEMPTY) {
		err = removeFolders(target)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the volume never was mounted there, so these files are not of it: see what they are and remove them", err)
	}
	return d.Published.Remove(target)
}

// removeFolders removes a target in which there are folders alone: kubelet makes
// those of a subPath, also for a container that the plugin refuses then.
func removeFolders(target string) error {
	root, err := os.OpenRoot(target)
	if err != nil {
		return err
	}
	defer root.Close()
	var folders []string
	err = fs.WalkDir(root.FS(), ".", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			err = fmt.Errorf("there is a file at %s", filepath.Join(target, path))
		}
		if path != "." {
			folders = append(folders, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, folder := range slices.Backward(folders) {
		if err := root.Remove(folder); err != nil {
			return err
		}
	}
	return os.Remove(target)
}

// NodeExpandVolume says that a volume has the size that the Controller gave it.
func (d *Driver) NodeExpandVolume(_ context.Context, r *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetVolumePath() == "" {
		return nil, fmt.Errorf("no volume path: %w", errdefs.ErrInvalidArgument)
	}
	if r.GetVolumeCapability() != nil {
		if err := checkCapability(r.VolumeCapability); err != nil {
			return nil, err
		}
	}
	v, err := d.Volumes.Get(r.VolumeId)
	if err != nil {
		return nil, err
	}
	if required := r.GetCapacityRange().GetRequiredBytes(); required > v.Bytes {
		return nil, fmt.Errorf("volume %q has %d bytes, not %d: it can grow when no pod has it: %w", v.ID, v.Bytes, required, errdefs.ErrFailedPrecondition)
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: v.Bytes}, nil
}

// place is where a volume is published.
type place struct {
	path            string
	block, readOnly bool
}

// use is what a volume is used for, as the kernel and the records have it.
type use struct {
	attached bool
	targets  []place
}

func (u use) paths() (paths []string) {
	for _, t := range u.targets {
		paths = append(paths, t.path)
	}
	return paths
}

func (d *Driver) use(v store.Volume) (use, error) {
	attached, bound, err := d.Devices.State(v.File)
	if err != nil {
		return use{}, err
	}
	u := use{attached: attached}
	for _, target := range bound {
		u.targets = append(u.targets, place{path: target, block: true})
	}
	records, err := d.Published.List()
	if err != nil {
		return use{}, err
	}
	for _, record := range records {
		if record.File == v.File {
			u.targets = append(u.targets, place{path: record.Target, readOnly: record.ReadOnly})
		}
	}
	return u, nil
}

// isEphemeral says whether kubelet calls for a volume of the pod's manifest.
func isEphemeral(attributes map[string]string) (bool, error) {
	switch word := attributes[ephemeralKey]; strings.ToLower(word) {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, fmt.Errorf("%s is %.20q, neither true nor false: %w", ephemeralKey, word, errdefs.ErrInvalidArgument)
	}
}

// inlineSize reads the size of a volume of the pod's manifest, in bytes.
func inlineSize(attributes map[string]string) (int64, error) {
	word, ok := attributes[sizeKey]
	if !ok {
		return 0, fmt.Errorf(`which size? write volumeAttributes: {%s: "1Gi"}: %w`, sizeKey, errdefs.ErrInvalidArgument)
	}
	quantity, err := resource.ParseQuantity(word)
	if err != nil {
		return 0, fmt.Errorf("%s %.40q: %w: %w", sizeKey, word, err, errdefs.ErrInvalidArgument)
	}
	bytes, ok := quantity.AsInt64()
	if !ok || bytes <= 0 {
		return 0, fmt.Errorf("%s %.40q is no number of bytes: %w", sizeKey, word, errdefs.ErrInvalidArgument)
	}
	return bytes, nil
}
