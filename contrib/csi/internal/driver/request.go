package driver

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/contrib/csi/internal/store"
	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	// Before the hash in the ids of volumes whose names are no labels, and of
	// those that live in a pod's manifest.
	hashedPrefix = "vol-"
	inlinePrefix = "inline-"

	// kubernetesPrefix is that of parameters and attributes which Kubernetes adds.
	kubernetesPrefix = "csi.storage.k8s.io/"
	// provisionerKey is an attribute that external-provisioner gives each volume that
	// it makes (pkg/controller/controller.go of v6.4.0).
	provisionerKey = "storage.kubernetes.io/csiProvisionerIdentity"
	// ephemeralKey is kubelet's word that a volume is written in the pod's manifest.
	ephemeralKey = kubernetesPrefix + "ephemeral"
	// sizeKey is the attribute of such a volume that says its size.
	sizeKey = "size"

	maxName = 128 // bytes of a name or id, the limit of the specification
)

var (
	// givenRE is what an id may be: ours, kubelet's for inline volumes, or one that is not known here.
	givenRE = regexp.MustCompile(`^[A-Za-z0-9]([-._A-Za-z0-9]{0,126}[A-Za-z0-9])?$`)
	// derivedRE is an id that was made with a hash.
	derivedRE = regexp.MustCompile(`^(` + hashedPrefix + `|` + inlinePrefix + `)[0-9a-f]{40}$`)
)

// idOf gives the id of a volume by the name that it is asked for: the name, where
// that is a label. No two names have the same.
func idOf(name string) (string, error) {
	if name == "" || len(name) > maxName {
		return "", fmt.Errorf("a name has between 1 and %d bytes, not %d: %w", maxName, len(name), errdefs.ErrInvalidArgument)
	}
	if hotplug.CheckName(name) == nil && !derivedRE.MatchString(name) {
		return name, nil
	}
	return hashed(hashedPrefix, name), nil
}

// inlineID gives the id here of a volume that kubelet made an id for.
func inlineID(given string) string { return hashed(inlinePrefix, given) }

func isInline(id string) bool {
	return strings.HasPrefix(id, inlinePrefix) && derivedRE.MatchString(id)
}

func hashed(prefix, s string) string {
	sum := sha256.Sum256([]byte(s))
	return prefix + hex.EncodeToString(sum[:20])
}

func checkID(id string) error {
	if !givenRE.MatchString(id) || strings.Contains(id, "..") {
		return fmt.Errorf("volume id %.200q does not match %s: %w", id, givenRE, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkKeys refuses parameters and attributes that nothing is done with: whoever
// wrote them expects something.
func checkKeys(what string, given map[string]string, known ...string) error {
	for _, key := range slices.Sorted(maps.Keys(given)) {
		if !slices.Contains(known, key) && !strings.HasPrefix(key, kubernetesPrefix) {
			return fmt.Errorf("%s %.200q is not known: %w", what, key, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// checkCapability refuses what a volume cannot be.
func checkCapability(c *csi.VolumeCapability) error {
	switch c.GetAccessMode().GetMode() {
	// Kubernetes' ReadWriteOnce is the first for old versions and the second for new ones, ReadWriteOncePod the third.
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER:
	case csi.VolumeCapability_AccessMode_UNKNOWN:
		return fmt.Errorf("no access mode: %w", errdefs.ErrInvalidArgument)
	default:
		// Each pod begins with an empty volume, so what reads only would see nothing, and a disk is on one node.
		return fmt.Errorf("access mode %v cannot be: a volume is one pod's, use ReadWriteOncePod or ReadWriteOnce: %w", c.AccessMode.Mode, errdefs.ErrInvalidArgument)
	}
	switch access := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		return nil
	case *csi.VolumeCapability_Mount:
		switch access.Mount.GetFsType() {
		case "", "ext4", "xfs":
		default:
			return fmt.Errorf("file system %.40q cannot be: the guest makes what its policy says, ext4 or xfs: %w", access.Mount.FsType, errdefs.ErrInvalidArgument)
		}
		if flags := access.Mount.GetMountFlags(); len(flags) > 0 {
			return fmt.Errorf("mount options cannot be given here: write them into the policy: %w", errdefs.ErrInvalidArgument)
		}
		if access.Mount.GetVolumeMountGroup() != "" {
			return fmt.Errorf("a group cannot be given here: the policy's fs_group says it: %w", errdefs.ErrInvalidArgument)
		}
		return nil
	default:
		return fmt.Errorf("neither a mount nor a block device is asked for: %w", errdefs.ErrInvalidArgument)
	}
}

func checkCapabilities(given []*csi.VolumeCapability) error {
	if len(given) == 0 {
		return fmt.Errorf("no volume capabilities: %w", errdefs.ErrInvalidArgument)
	}
	for _, c := range given {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	return nil
}

func sizeOf(r *csi.CapacityRange) store.Range {
	return store.Range{Required: r.GetRequiredBytes(), Limit: r.GetLimitBytes()}
}

func checkPath(what, p string) error {
	if err := hotplug.CheckPath(p); err != nil {
		return fmt.Errorf("%s %w: %w", what, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// resolve gives a path as a container's mount has it, with symbolic links in all
// but its last part followed as far as there is something.
func resolve(target string) (string, error) {
	dir, missing := filepath.Dir(target), filepath.Base(target)
	for {
		real, err := filepath.EvalSymlinks(dir)
		if err == nil {
			return filepath.Join(real, missing), nil
		}
		if !os.IsNotExist(err) || dir == "/" {
			return "", err
		}
		dir, missing = filepath.Dir(dir), filepath.Join(filepath.Base(dir), missing)
	}
}
