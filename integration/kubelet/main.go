// Command kubelet does to the CSI driver what Kubernetes does for a pod, up to the pod's CRI calls, which are crictl's on the node of
// the tests. It has a process of its own since the CSI's protocol and Kata's agent's cannot be in one program: both register csi.proto.
//
// The calls, their order, the requests' forms, the paths and the files beside them are from kubelet's sources of Kubernetes 1.34.0:
//
//	pkg/volume/csi/csi_plugin.go      RegisterPlugin, NewMounter, NewBlockVolumeMapper
//	pkg/volume/csi/csi_client.go      the requests, access modes
//	pkg/volume/csi/csi_attacher.go    MountDevice, UnmountDevice, makeDeviceMountPath
//	pkg/volume/csi/csi_mounter.go     SetUpAt, TearDownAt, removeMountDir, makeVolumeHandle
//	pkg/volume/csi/csi_block.go       SetUpDevice, MapPodDevice, UnmapPodDevice, TearDownDevice
//	pkg/volume/csi/csi_metrics.go     GetMetrics
//	pkg/volume/csi/csi_util.go        vol_data.json, getPodInfoAttrs
//	pkg/volume/util/util.go           MapBlockVolume, UnmapBlockVolume, and volumepathhandler
//	pkg/volume/util/operationexecutor/operation_generator.go  what follows what
//	pkg/kubelet/kubelet_pods.go       makeMounts, makeBlockVolumes
//	pkg/kubelet/kuberuntime/kuberuntime_container.go          makeMounts, makeDevices
//
// and from external-provisioner 6.4.0: pkg/controller/controller.go (prepareProvision, Provision, Delete) and topology.go.
//
// It follows the CSIDriver and the StorageClass of contrib/kubernetes/csi.yaml: nothing is attached, the driver hears of the pod, no group
// is set. The socket in plugins_registry is the sidecar's, node-driver-registrar's, which asks the driver its name (GetPluginInfo) and
// says it to kubelet. There is no sidecar here: what comes of a registration is played (NodeGetInfo), the socket itself is not.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
)

const usage = `usage: kubelet COMMAND MANIFEST UID

MANIFEST has one pod, whose uid is UID, and its claims.

  up     makes the pod's volumes, publishes them, and prints what its containers are to get, in the words of crictl
  stats  prints how full each volume is
  down   takes the volumes back and deletes them; the pod's containers have ended`

const (
	driverName = "coco-local-csi"
	root       = "/var/lib/kubelet"
	socket     = root + "/plugins/" + driverName + "/csi.sock"

	callLimit = 2 * time.Minute // csiTimeout
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "kubelet:", err)
		cancel()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	if len(args) != 3 {
		return errors.New(usage)
	}
	pod, volumes, err := readManifest(args[1], args[2])
	if err != nil {
		return fmt.Errorf("%s: %w", args[1], err)
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithAuthority("localhost"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	k, err := register(ctx, conn, pod)
	if err != nil {
		return err
	}
	var said any
	switch args[0] {
	case "up":
		said, err = k.up(ctx, volumes)
	case "stats":
		said, err = k.stats(ctx, volumes)
	case "down":
		return k.down(ctx, volumes)
	default:
		return errors.New(usage)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(said)
}

// kubelet is the node's, with a driver that is registered, and one pod.
type kubelet struct {
	csi.ControllerClient
	csi.NodeClient
	pod *corev1.Pod
	// node and topology are what the driver calls this node, and where it says that it is.
	node     string
	topology map[string]string
}

// register is what the sidecar and then kubelet ask a driver that is new, and what it must be able to do for what is done here.
func register(ctx context.Context, conn *grpc.ClientConn, pod *corev1.Pod) (*kubelet, error) {
	k := &kubelet{ControllerClient: csi.NewControllerClient(conn), NodeClient: csi.NewNodeClient(conn), pod: pod}
	plugin, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return nil, err
	}
	if plugin.Name != driverName {
		return nil, fmt.Errorf("the driver at %s is %q", socket, plugin.Name)
	}
	info, err := k.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil {
		return nil, err
	}
	k.node, k.topology = info.NodeId, info.GetAccessibleTopology().GetSegments()
	capabilities, err := k.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil {
		return nil, err
	}
	can := map[csi.NodeServiceCapability_RPC_Type]bool{}
	for _, c := range capabilities.Capabilities {
		can[c.GetRpc().GetType()] = true
	}
	for _, needed := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME, csi.NodeServiceCapability_RPC_GET_VOLUME_STATS, csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		if !can[needed] {
			return nil, fmt.Errorf("without %v kubelet makes other calls than these", needed)
		}
	}
	return k, nil
}

// lent is what a pod has of the driver.
type lent struct {
	Volumes    map[string]lentVolume    `json:"volumes"`
	Containers map[string]lentContainer `json:"containers"`
}

type lentVolume struct {
	Handle string `json:"handle"`
	// Bytes is the PersistentVolume's capacity; a volume of the pod's manifest has none.
	Bytes int64 `json:"bytes,omitempty"`
}

func (k *kubelet) up(ctx context.Context, volumes []*volume) (lent, error) {
	l := lent{Volumes: map[string]lentVolume{}, Containers: map[string]lentContainer{}}
	for _, v := range volumes {
		var bytes int64
		if !v.inline {
			var err error
			if bytes, err = k.provision(ctx, v); err != nil {
				return lent{}, fmt.Errorf("provision %s: %w", v.name, err)
			}
		}
		mount := k.mount
		if v.block {
			mount = k.mapDevice
		}
		if err := mount(ctx, v); err != nil {
			return lent{}, fmt.Errorf("mount %s: %w", v.name, err)
		}
		l.Volumes[v.name] = lentVolume{v.handle, bytes}
	}
	for _, c := range k.pod.Spec.Containers {
		var err error
		if l.Containers[c.Name], err = k.container(c, volumes); err != nil {
			return lent{}, fmt.Errorf("container %s: %w", c.Name, err)
		}
	}
	return l, nil
}

// full is how full a volume is, in kubelet's words for it (pkg/volume/volume.go, Metrics).
type full struct {
	Capacity  int64 `json:"capacity"`
	Used      int64 `json:"used"`
	Available int64 `json:"available"`
}

func (k *kubelet) stats(ctx context.Context, volumes []*volume) (map[string]full, error) {
	all := map[string]full{}
	for _, v := range volumes {
		if err := v.load(k.pod); err != nil {
			return nil, err
		}
		// Of a device the path is kubelet's own.
		path := v.target(k.pod)
		if v.block {
			path = v.globalMap(k.pod)
		}
		answer, err := k.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: v.handle, VolumePath: path})
		if err != nil {
			return nil, fmt.Errorf("stats of %s: %w", v.name, err)
		}
		for _, u := range answer.Usage {
			if u.Unit == csi.VolumeUsage_BYTES {
				all[v.name] = full{u.Total, u.Used, u.Available}
			}
		}
	}
	return all, nil
}

// down takes each volume from the pod and from the node, as after the end of its containers, and deletes those of claims, as after the
// deletion of the pod and of its claims.
func (k *kubelet) down(ctx context.Context, volumes []*volume) error {
	for _, v := range volumes {
		if err := v.load(k.pod); err != nil {
			return err
		}
		unmount := k.unmount
		if v.block {
			unmount = k.unmapDevice
		}
		if err := unmount(ctx, v); err != nil {
			return fmt.Errorf("unmount %s: %w", v.name, err)
		}
	}
	if err := k.removePod(); err != nil {
		return err
	}
	for _, v := range volumes {
		if v.inline {
			continue
		}
		if _, err := k.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.handle}); err != nil {
			return fmt.Errorf("delete %s: %w", v.name, err)
		}
	}
	return nil
}

// removePod removes the pod's folder. No volume may be in it any more.
func (k *kubelet) removePod() error {
	for _, volumes := range []string{"volumes", "volumeDevices"} {
		for _, dir := range []string{filepath.Join(volumes, podPlugin), volumes} {
			if err := os.Remove(podDir(k.pod, dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return os.RemoveAll(podDir(k.pod))
}
