package main

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// client calls a driver.
type client struct {
	csi.ControllerClient
	csi.NodeClient
}

// connect connects to a driver, and to the one that comes after it. A call that is
// patient waits for that one.
func connect(t testing.TB, socket string, patient bool) client {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(patient)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1, MaxDelay: 10 * time.Millisecond}, MinConnectTimeout: 10 * time.Second,
		}))
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
