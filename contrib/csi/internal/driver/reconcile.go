package driver

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Reconcile brings records and volumes together when the driver starts, before it
// answers: a record is removed whose volume is gone, or whose folder, so that no
// container can have it for a source. So is a volume of a pod's manifest that is
// published nowhere: nobody can ask for it again, since its key was in its guest.
func (d *Driver) Reconcile() error {
	if err := d.Published.Sweep(); err != nil {
		d.Log.Error("what killed writers of records left cannot be removed", "error", err)
	}
	records, torn := d.Published.List()
	if torn != nil {
		d.Log.Error("records are damaged: see which and remove them; until then no volume is deleted", "error", torn)
	}
	for _, record := range records {
		if !d.Volumes.Owns(record.File) {
			continue // another driver's
		}
		gone := ""
		if _, err := os.Lstat(filepath.Dir(record.File)); errors.Is(err, fs.ErrNotExist) || record.File != d.Volumes.Disk(record.Name) {
			gone = "volume" // of one that is broken it stays: its container must fail, not run without
		} else if _, err := os.Lstat(record.Target); errors.Is(err, fs.ErrNotExist) {
			gone = "folder"
		}
		if gone == "" {
			continue
		}
		if err := d.Published.Remove(record.Target); err != nil {
			return err
		}
		d.Log.Warn("removed a record whose "+gone+" is gone", "volume", record.Name, "target", record.Target)
	}
	if torn != nil {
		return nil
	}
	for _, v := range d.Volumes.List() {
		if !isInline(v.ID) {
			continue
		}
		use, err := d.use(v)
		if err != nil {
			return err
		}
		if len(use.targets) > 0 {
			continue
		}
		switch err := d.Volumes.Delete(v.ID); {
		case errdefs.IsFailedPrecondition(err):
			d.Log.Warn("a volume whose pod is gone is still in use and stays until the next start", "volume", v.ID, "error", err)
		case err != nil:
			return err
		default:
			d.Log.Warn("deleted the volume of a pod that is gone", "volume", v.ID)
		}
	}
	return nil
}
