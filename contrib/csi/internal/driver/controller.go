package driver

import (
	"context"
	"fmt"
	"strconv"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sealvol/sealvol/contrib/csi/internal/store"
	"github.com/sealvol/sealvol/shim/hotplug"
)

// ControllerGetCapabilities says what the Controller can do.
func (d *Driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	response := &csi.ControllerGetCapabilitiesResponse{}
	for _, kind := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	} {
		response.Capabilities = append(response.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: kind}},
		})
	}
	return response, nil
}

// CreateVolume makes a volume on this node.
func (d *Driver) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	id, err := idOf(r.GetName())
	if err != nil {
		return nil, err
	}
	if err := checkCapabilities(r.GetVolumeCapabilities()); err != nil {
		return nil, err
	}
	if err := checkKeys("parameter", r.GetParameters()); err != nil {
		return nil, err
	}
	if err := checkKeys("mutable parameter", r.GetMutableParameters()); err != nil {
		return nil, err
	}
	if r.GetVolumeContentSource() != nil {
		return nil, fmt.Errorf("a sealed volume begins empty, remove its data source: %w", errdefs.ErrInvalidArgument)
	}
	if wanted := r.GetAccessibilityRequirements().GetRequisite(); len(wanted) > 0 && !d.isIn(wanted) {
		return nil, fmt.Errorf("the volume is to be on another node than %q: %w", d.Node, errdefs.ErrResourceExhausted)
	}
	release, err := d.busy.take(id)
	if err != nil {
		return nil, err
	}
	defer release()
	v, err := d.Volumes.Create(id, sizeOf(r.GetCapacityRange()))
	if err != nil {
		return nil, err
	}
	d.Log.Info("volume is there", "volume", id, "bytes", v.Bytes)
	return &csi.CreateVolumeResponse{Volume: d.describe(v)}, nil
}

// DeleteVolume removes a volume with its data. One that a pod has is refused.
func (d *Driver) DeleteVolume(_ context.Context, r *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	release, err := d.busy.take(r.VolumeId)
	if err != nil {
		return nil, err
	}
	defer release()
	if hotplug.CheckName(r.VolumeId) != nil {
		return &csi.DeleteVolumeResponse{}, nil // never ours
	}
	// Also of a volume that the store does not know: it may be one that is broken.
	if err := d.checkUnused(store.Volume{ID: r.VolumeId, File: d.Volumes.Disk(r.VolumeId)}); err != nil {
		return nil, err
	}
	if err := d.Volumes.Delete(r.VolumeId); err != nil {
		return nil, err
	}
	d.Log.Info("volume is deleted", "volume", r.VolumeId)
	return &csi.DeleteVolumeResponse{}, nil
}

// checkUnused refuses a volume that is staged as a device or published. That of a
// sandbox which outlives its publication is for the store to refuse.
func (d *Driver) checkUnused(v store.Volume) error {
	use, err := d.use(v)
	if err != nil {
		return err
	}
	if len(use.targets) > 0 {
		return fmt.Errorf("volume %q is published at %s: end its pod first: %w", v.ID, use.targets[0].path, errdefs.ErrFailedPrecondition)
	}
	if use.attached {
		return fmt.Errorf("volume %q is staged as a block device: end its pod first: %w", v.ID, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// ValidateVolumeCapabilities says whether a volume can be used so.
func (d *Driver) ValidateVolumeCapabilities(_ context.Context, r *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(r.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("no volume capabilities: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := d.Volumes.Get(r.VolumeId); err != nil {
		return nil, err
	}
	for _, err := range []error{
		checkCapabilities(r.VolumeCapabilities), checkKeys("parameter", r.GetParameters()), checkKeys("attribute", r.GetVolumeContext(), provisionerKey),
		checkKeys("mutable parameter", r.GetMutableParameters()),
	} {
		if err != nil {
			return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
		}
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: r.VolumeContext, VolumeCapabilities: r.VolumeCapabilities, Parameters: r.Parameters, MutableParameters: r.MutableParameters,
	}}, nil
}

// ListVolumes lists this node's volumes by id. A token is the last id of the page before.
func (d *Driver) ListVolumes(_ context.Context, r *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	volumes, next, err := page(d.Volumes.List(), r.GetMaxEntries(), r.GetStartingToken())
	if err != nil {
		return nil, err
	}
	response := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range volumes {
		response.Entries = append(response.Entries, &csi.ListVolumesResponse_Entry{Volume: d.describe(v)})
	}
	return response, nil
}

// tokenPrefix tells our tokens from others.
const tokenPrefix = "after:"

// page gives the volumes after the one that a token names, and the token of the next page.
func page(all []store.Volume, most int32, token string) (volumes []store.Volume, next string, err error) {
	if most < 0 {
		return nil, "", fmt.Errorf("max_entries %d is negative: %w", most, errdefs.ErrInvalidArgument)
	}
	if token != "" {
		after, ok := cutToken(token)
		if !ok {
			return nil, "", fmt.Errorf("starting token %s is none of ours: begin again: %w", strconv.Quote(token), errdefs.ErrAborted)
		}
		for len(all) > 0 && all[0].ID <= after {
			all = all[1:]
		}
	}
	if most == 0 || len(all) <= int(most) {
		return all, "", nil
	}
	return all[:most], tokenPrefix + all[most-1].ID, nil
}

func cutToken(token string) (id string, ok bool) {
	if len(token) <= len(tokenPrefix) || token[:len(tokenPrefix)] != tokenPrefix {
		return "", false
	}
	id = token[len(tokenPrefix):]
	return id, hotplug.CheckName(id) == nil
}

// ControllerGetVolume gives a volume, and this node where it is published.
func (d *Driver) ControllerGetVolume(_ context.Context, r *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	v, err := d.Volumes.Get(r.VolumeId)
	if err != nil {
		return nil, err
	}
	use, err := d.use(v)
	if err != nil {
		return nil, err
	}
	response := &csi.ControllerGetVolumeResponse{Volume: d.describe(v), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}
	if len(use.targets) > 0 {
		response.Status.PublishedNodeIds = []string{d.Node}
	}
	return response, nil
}

// GetCapacity says what can still be promised on this node.
func (d *Driver) GetCapacity(_ context.Context, r *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if err := checkKeys("parameter", r.GetParameters()); err != nil {
		return nil, err
	}
	for _, c := range r.GetVolumeCapabilities() {
		if checkCapability(c) != nil {
			return &csi.GetCapacityResponse{}, nil // for such volumes there is no room
		}
	}
	if r.GetAccessibleTopology() != nil && !d.isIn([]*csi.Topology{r.AccessibleTopology}) {
		return &csi.GetCapacityResponse{}, nil
	}
	available, err := d.Volumes.Available()
	if err != nil {
		return nil, err
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: available, MaximumVolumeSize: wrapperspb.Int64(available), MinimumVolumeSize: wrapperspb.Int64(store.Granule),
	}, nil
}

// ControllerExpandVolume makes a volume larger that no pod has. Nothing is left to
// be done on the node: the next guest makes its file system as large as the disk.
func (d *Driver) ControllerExpandVolume(_ context.Context, r *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetCapacityRange().GetRequiredBytes() <= 0 {
		return nil, fmt.Errorf("which size? capacity_range has no required_bytes: %w", errdefs.ErrInvalidArgument)
	}
	if r.GetVolumeCapability() != nil {
		if err := checkCapability(r.VolumeCapability); err != nil {
			return nil, err
		}
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
	if v.Bytes < r.CapacityRange.RequiredBytes {
		if err := d.checkUnused(v); err != nil {
			return nil, err
		}
	}
	if v, err = d.Volumes.Expand(v.ID, sizeOf(r.CapacityRange)); err != nil {
		return nil, err
	}
	d.Log.Info("volume has its size", "volume", v.ID, "bytes", v.Bytes)
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Bytes}, nil
}

func (d *Driver) describe(v store.Volume) *csi.Volume {
	return &csi.Volume{VolumeId: v.ID, CapacityBytes: v.Bytes, AccessibleTopology: []*csi.Topology{d.topology()}}
}

// topology is where this node's volumes can be used: here.
func (d *Driver) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{d.topologyKey(): d.Node}}
}

func (d *Driver) topologyKey() string { return "topology." + d.Name + "/node" }

// isIn says whether one of the places is this node.
func (d *Driver) isIn(places []*csi.Topology) bool {
	for _, place := range places {
		if place.GetSegments()[d.topologyKey()] == d.Node {
			return true
		}
	}
	return false
}
