package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/sealvol/sealvol/contrib/csi/internal/store"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// guestsAtOnce is how many guests are asked at once: each may take its time.
const guestsAtOnce = 8

// NodeGetVolumeStats says how full a volume is. Only the guest that has it can
// know: as long as none does, and of a raw block volume, the answer is its size, and
// that all of it is free if nothing was ever written.
func (d *Driver) NodeGetVolumeStats(ctx context.Context, r *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := checkID(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetVolumePath() == "" {
		return nil, fmt.Errorf("no volume path: %w", errdefs.ErrInvalidArgument)
	}
	v, err := d.get(r.VolumeId)
	if err != nil {
		return nil, err
	}
	use, err := d.use(v)
	if err != nil {
		return nil, err
	}
	if !d.isAt(use, r.VolumePath, r.GetStagingTargetPath()) {
		return nil, fmt.Errorf("volume %q is not published at %q: %w", v.ID, r.VolumePath, errdefs.ErrNotFound)
	}
	size := &csi.VolumeUsage{Unit: csi.VolumeUsage_BYTES, Total: v.Bytes}
	if written, err := v.Allocated(); err == nil && written == 0 && !use.attached {
		size.Available = v.Bytes // kubelet would show 0 as a full volume
	}
	told, err := d.Guests.Volume(ctx, v.ID, use.paths())
	if errdefs.IsNotFound(err) {
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{size}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("volume %q: %w", v.ID, err)
	}
	if told.GetUsage() == nil { // it is closed just now
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{size}}, nil
	}
	usage, err := show(told.Usage, v.Bytes)
	if err != nil {
		return nil, fmt.Errorf("volume %q: %w", v.ID, err)
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: usage}, nil
}

// show is a guest's word in CSI's terms, if it can be true of a disk of that size.
func show(u *sealvolv1.Usage, bytes int64) ([]*csi.VolumeUsage, error) {
	if u.TotalBytes > uint64(bytes) || max(u.UsedBytes, u.AvailableBytes) > u.TotalBytes || u.FreeInodes > u.TotalInodes || u.TotalInodes > math.MaxInt64 {
		return nil, fmt.Errorf("its guest says what cannot be of %d bytes, %v: %w", bytes, u, errdefs.ErrUnavailable)
	}
	return []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: int64(u.TotalBytes), Available: int64(u.AvailableBytes), Used: int64(u.UsedBytes)},
		{Unit: csi.VolumeUsage_INODES, Total: int64(u.TotalInodes), Available: int64(u.FreeInodes), Used: int64(u.TotalInodes - u.FreeInodes)},
	}, nil
}

// get gives a volume by its id or, for one of a pod's manifest, by kubelet's.
func (d *Driver) get(given string) (store.Volume, error) {
	if v, err := d.Volumes.Get(inlineID(given)); err == nil {
		return v, nil
	}
	return d.Volumes.Get(given)
}

// isAt says whether a volume is published at a path, or, as a block device, staged.
func (d *Driver) isAt(use use, path, staged string) bool {
	resolved, err := resolve(path)
	if err != nil {
		return false
	}
	return use.attached && path == staged || slices.ContainsFunc(use.targets, func(p place) bool { return p.path == resolved })
}

// NodeGetVolumeHealth says what is wrong with a volume.
func (d *Driver) NodeGetVolumeHealth(ctx context.Context, r *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	health, err := d.healthOf(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: health}, nil
}

// ControllerGetVolumeHealth says the same: this Controller's volumes are on its node.
func (d *Driver) ControllerGetVolumeHealth(ctx context.Context, r *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	health, err := d.healthOf(ctx, r.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: health}, nil
}

func (d *Driver) healthOf(ctx context.Context, given string) (*csi.VolumeHealth, error) {
	if err := checkID(given); err != nil {
		return nil, err
	}
	v, err := d.get(given)
	if err != nil {
		return nil, err
	}
	return &csi.VolumeHealth{VolumeId: given, HealthStatuses: d.wrong(ctx, v)}, nil
}

// ControllerListVolumeHealth lists the volumes with which something is wrong.
func (d *Driver) ControllerListVolumeHealth(ctx context.Context, r *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	volumes := d.Volumes.List()
	wrong := make([][]*csi.VolumeHealth_VolumeHealthEntry, len(volumes))
	var asked errgroup.Group
	asked.SetLimit(guestsAtOnce)
	for i, v := range volumes {
		asked.Go(func() error {
			if ctx.Err() == nil {
				wrong[i] = d.wrong(ctx, v)
			}
			return ctx.Err() // a guest that had no time to answer is not silent
		})
	}
	if err := asked.Wait(); err != nil {
		return nil, err
	}
	var sick []store.Volume
	entries := map[string][]*csi.VolumeHealth_VolumeHealthEntry{}
	for i, v := range volumes {
		if len(wrong[i]) > 0 {
			sick, entries[v.ID] = append(sick, v), wrong[i]
		}
	}
	sick, next, err := page(sick, r.GetMaxEntries(), r.GetStartingToken())
	if err != nil {
		return nil, err
	}
	response := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, v := range sick {
		response.Entries = append(response.Entries, &csi.VolumeHealth{VolumeId: v.ID, HealthStatuses: entries[v.ID]})
	}
	return response, nil
}

// wrong is what is wrong with a volume: with its disk, and as the guest sees it
// that has it. That no guest has it is nothing wrong.
func (d *Driver) wrong(ctx context.Context, v store.Volume) []*csi.VolumeHealth_VolumeHealthEntry {
	entry := func(status csi.VolumeHealthErrorType, reason, message string) []*csi.VolumeHealth_VolumeHealthEntry {
		return []*csi.VolumeHealth_VolumeHealthEntry{{Status: status, Reason: reason, Message: message}}
	}
	switch info, err := os.Lstat(v.File); {
	case errors.Is(err, fs.ErrNotExist):
		return entry(csi.VolumeHealthErrorType_DATA_LOSS, "DiskLost", fmt.Sprintf("%s is not there any more", v.File))
	case err != nil:
		return entry(csi.VolumeHealthErrorType_INACCESSIBLE, "DiskUnreadable", err.Error())
	case info.Size() < v.Bytes:
		return entry(csi.VolumeHealthErrorType_DATA_LOSS, "DiskCutShort", fmt.Sprintf("%s has %d of %d bytes", v.File, info.Size(), v.Bytes))
	}
	use, err := d.use(v)
	if err != nil {
		return entry(csi.VolumeHealthErrorType_INACCESSIBLE, "NodeUnreadable", err.Error())
	}
	told, err := d.Guests.Volume(ctx, v.ID, use.paths())
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return entry(csi.VolumeHealthErrorType_INACCESSIBLE, "GuestSilent", err.Error())
	}
	switch told.State {
	case "degraded":
		return entry(csi.VolumeHealthErrorType_DEGRADED, "IOErrors",
			fmt.Sprintf("%d reads and writes failed in the guest, the first a %.20q at sector %d", told.Faults.GetCount(), told.Faults.GetFirstOperation(), told.Faults.GetFirstSector()))
	case "failed":
		return entry(csi.VolumeHealthErrorType_INACCESSIBLE, "SealingFailed", fmt.Sprintf("its guest says %.300q", told.Error))
	}
	return nil
}
