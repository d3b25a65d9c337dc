package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// CSIVolumes is where the CSI driver has its volumes, as it is shipped.
	CSIVolumes = "/var/lib/sealvol/csi"

	csiSocket = "/var/lib/kubelet/plugins/coco-local-csi/csi.sock"
)

// MountCSI gives the CSI driver a file system for its volumes, which may
// promise more than the machine has memory: they are sparse. undo takes it away.
func (n *Node) MountCSI(bytes int64) (undo func() error, err error) {
	if err := os.MkdirAll(CSIVolumes, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", CSIVolumes, "tmpfs", 0, fmt.Sprintf("mode=0700,size=%d", bytes)); err != nil {
		return nil, fmt.Errorf("mount %s: %w", CSIVolumes, err)
	}
	return func() error { return unix.Unmount(CSIVolumes, 0) }, nil
}

// StartCSI starts the CSI driver and waits until it answers.
func (n *Node) StartCSI(ctx context.Context) (err error) {
	n.csi, err = start(n.dir, "csi", n.art.CSI, "-config", filepath.Join(n.dir, "etc/csi.toml"), "-node", "node-1")
	if err != nil {
		return err
	}
	return poll(ctx, "the CSI driver to answer", func() bool {
		conn, err := net.Dial("unix", csiSocket)
		return err == nil && conn.Close() == nil && n.csi.alive()
	}, startLimit)
}

// StopCSI ends the CSI driver as systemd does, KillCSI as a crash would.
func (n *Node) StopCSI() error { return n.csi.stop(syscall.SIGTERM) }

// KillCSI ends the CSI driver at once.
func (n *Node) KillCSI() error { return n.csi.stop(syscall.SIGKILL) }

// Lent is what kubelet has of the CSI driver for a pod.
type Lent struct {
	// Volumes are the volumes by the pod's names for them.
	Volumes map[string]struct {
		// Handle is the driver's id.
		Handle string
		// Bytes is the capacity of a claim's volume.
		Bytes int64
	}
	// Containers are what each container is to get.
	Containers map[string]struct {
		Mounts  []Mount
		Devices []Device
	}
}

// Full is how full a volume is, as kubelet hears it, in bytes.
type Full struct{ Capacity, Used, Available int64 }

// KubeletUp makes the volumes of the pod of a manifest, and publishes them, as
// Kubernetes does (integration/kubelet).
func (n *Node) KubeletUp(ctx context.Context, manifest, uid string) (l Lent, err error) {
	err = n.kubelet(ctx, &l, "up", manifest, uid)
	return l, err
}

// KubeletStats asks how full they are.
func (n *Node) KubeletStats(ctx context.Context, manifest, uid string) (all map[string]Full, err error) {
	err = n.kubelet(ctx, &all, "stats", manifest, uid)
	return all, err
}

// KubeletDown takes them back and deletes them.
func (n *Node) KubeletDown(ctx context.Context, manifest, uid string) error {
	return n.kubelet(ctx, nil, "down", manifest, uid)
}

func (n *Node) kubelet(ctx context.Context, answer any, command, manifest, uid string) (err error) {
	file := filepath.Join(n.dir, fmt.Sprintf("manifest-%d.yaml", n.files.Add(1)))
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(file)) }()
	out, err := n.run(ctx, n.art.Kubelet, command, file, uid)
	if err != nil || answer == nil {
		return err
	}
	return json.Unmarshal([]byte(out), answer)
}
