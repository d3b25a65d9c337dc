//go:build vm

package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// client calls a driver.
type client struct {
	csi.ControllerClient
	csi.NodeClient
}

// connect connects to a driver, and to the one that comes after it. A call that is
// patient waits for that one.
func connect(t *testing.T, socket string, patient bool) client {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(patient)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client{csi.NewControllerClient(conn), csi.NewNodeClient(conn)}
}

func capability(block bool) *csi.VolumeCapability {
	c := &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
	}
	if block {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	}
	return c
}

// volume is what one pod asks for, with the calls that kubelet and the provisioner make for it.
type volume struct {
	id, staging, target string
	block, inline       bool
}

func volumes(dir string) []volume {
	return []volume{
		{id: "pvc-mount", staging: filepath.Join(dir, "staging"), target: filepath.Join(dir, "mount")},
		{id: "pvc-block", staging: filepath.Join(dir, "staging"), target: filepath.Join(dir, "block"), block: true},
		{id: "csi-inline", target: filepath.Join(dir, "inline"), inline: true},
	}
}

// up are the calls that begin a volume, in their order, and down those that end it.
func (v volume) up(c client) []func(context.Context) error {
	publish := func(ctx context.Context) error {
		r := &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: capability(v.block)}
		if v.inline {
			r.VolumeContext = map[string]string{"csi.storage.k8s.io/ephemeral": "true", "size": "4Mi"}
		}
		_, err := c.NodePublishVolume(ctx, r)
		return err
	}
	if v.inline {
		return []func(context.Context) error{publish}
	}
	return []func(context.Context) error{
		func(ctx context.Context) error {
			_, err := c.CreateVolume(ctx, &csi.CreateVolumeRequest{
				Name: v.id, VolumeCapabilities: []*csi.VolumeCapability{capability(v.block)}, CapacityRange: &csi.CapacityRange{RequiredBytes: 4 << 20},
			})
			return err
		},
		func(ctx context.Context) error {
			_, err := c.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: capability(v.block)})
			return err
		},
		publish,
	}
}

func (v volume) down(c client) []func(context.Context) error {
	unpublish := func(ctx context.Context) error {
		_, err := c.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target})
		return err
	}
	if v.inline {
		return []func(context.Context) error{unpublish}
	}
	return []func(context.Context) error{
		unpublish,
		func(ctx context.Context) error {
			_, err := c.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
			return err
		},
		func(ctx context.Context) error {
			_, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
			return err
		},
	}
}

// wantNothing demands that nothing of any volume is left on the node.
func wantNothing(t *testing.T, dir string) {
	t.Helper()
	for _, pattern := range []string{"volumes/*/*", "volumes/.*", "published/*", "published/.*", "mount", "block", "inline"} {
		if found, err := filepath.Glob(filepath.Join(dir, pattern)); err != nil || len(found) > 0 {
			t.Errorf("there is still %q (%v)", found, err)
		}
	}
	for _, backing := range loops(t) {
		text, err := os.ReadFile(backing)
		if err == nil && strings.HasPrefix(string(text), dir) {
			t.Errorf("there is still a loop device of %s", text)
		}
	}
}

// The driver is killed after each call. Another one goes on where it was: each
// call of kubelet's can be made again, and ends where it would have ended.
func TestVMADriverThatIsKilledBetweenCallsIsFollowedByAnother(t *testing.T) {
	dir := disk(t)
	socket, kill := startDriver(t, dir, unix.SIGKILL)
	c := connect(t, socket, true)
	for _, v := range volumes(dir) {
		for i, call := range append(v.up(c), v.down(c)...) {
			if err := call(t.Context()); err != nil {
				t.Fatalf("call %d of %s: %v", i, v.id, err)
			}
			kill()
			_, kill = startDriver(t, dir, unix.SIGKILL)
			if err := call(t.Context()); err != nil {
				t.Errorf("call %d of %s, made again: %v", i, v.id, err)
			}
		}
		wantNothing(t, dir)
	}
}

// The driver is killed while callers do all of it at once, at whatever step. When
// the callers have then made their calls again, nothing is left.
func TestVMADriverThatIsKilledAtWorkLeavesNothing(t *testing.T) {
	dir := disk(t)
	for round := range 4 {
		socket, kill := startDriver(t, dir, unix.SIGKILL)
		c := connect(t, socket, false)
		var work sync.WaitGroup
		started := make(chan struct{}, 3)
		for _, v := range volumes(dir) {
			work.Go(func() {
				for i := 0; ; i++ {
					for _, call := range append(v.up(c), v.down(c)...) {
						switch err := call(t.Context()); status.Code(err) {
						case codes.OK:
						case codes.Unavailable: // killed
							return
						default:
							t.Errorf("%s: %v", v.id, err)
							return
						}
					}
					if i == round { // each round a little later
						started <- struct{}{}
					}
				}
			})
		}
		<-started
		kill()
		work.Wait()

		socket, kill = startDriver(t, dir, unix.SIGTERM)
		c = connect(t, socket, false)
		for _, v := range volumes(dir) {
			for i, call := range v.down(c) {
				if err := call(t.Context()); err != nil {
					t.Errorf("%s: call %d after a kill: %v", v.id, i, err)
				}
			}
		}
		if response, err := c.ListVolumes(t.Context(), &csi.ListVolumesRequest{}); err != nil || len(response.Entries) > 0 {
			t.Errorf("there are volumes %v (%v)", response, err)
		}
		if _, err := kill(); err != nil {
			t.Errorf("the driver ended with %v", err)
		}
		wantNothing(t, dir)
	}
}
