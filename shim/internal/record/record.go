// Package record writes Kata's direct-volume records, which make Kata plug a
// host's block device into the guest in the place of a bind mount.
//
// The format is that of src/runtime/pkg/direct-volume/utils.go of Kata: below
// the root a folder named by the base64url of the mount's source, in it
// mountInfo.json. Kata's own writer is not used, since it leaves half a file
// behind when it is killed.
package record

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	volume "github.com/kata-containers/kata-containers/src/runtime/pkg/direct-volume"

	"github.com/sealvol/sealvol/shim/atomicfile"
	"github.com/sealvol/sealvol/shim/hotplug"
)

// Root is where Kata looks for records, kataDirectVolumeRootPath.
const Root = "/run/kata-containers/shared/direct-volumes"

// Dir is a folder of records, [Root] but in tests.
type Dir string

// Write makes the record that puts the block device at path device behind the
// source, in the place of one that is there.
func (d Dir) Write(source, device string) error {
	data, err := json.Marshal(volume.MountInfo{
		VolumeType: "block",
		Device:     device,
		// Kata wants one. The guest takes the file system from its policy.
		FsType: "ext4",
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(d.path(source), 0o700); err != nil {
		return err
	}
	if err := atomicfile.Write(filepath.Join(d.path(source), "mountInfo.json"), data, 0o600); err != nil {
		return errors.Join(err, d.Remove(source))
	}
	return nil
}

// Remove removes the record of that source, if there is one, and what Kata put beside it.
func (d Dir) Remove(source string) error { return os.RemoveAll(d.path(source)) }

// RemoveSandbox removes the records of all volumes of that sandbox. It needs
// no state but the records themselves: their names say whose they are.
func (d Dir) RemoveSandbox(sandbox string) error {
	entries, err := os.ReadDir(string(d))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, entry := range entries {
		source, decodeErr := base64.URLEncoding.DecodeString(entry.Name())
		if decodeErr == nil && strings.HasPrefix(string(source), hotplug.Source(sandbox, "")) {
			err = errors.Join(err, d.Remove(string(source)))
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (d Dir) path(source string) string {
	return filepath.Join(string(d), base64.URLEncoding.EncodeToString([]byte(source)))
}
