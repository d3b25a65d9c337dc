package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

const agentVersion = "3.20.0-stand-in"

func (s *sandbox) Check(context.Context, *pb.CheckRequest) (*pb.HealthCheckResponse, error) {
	return &pb.HealthCheckResponse{Status: pb.HealthCheckResponse_SERVING}, nil
}

func (s *sandbox) Version(context.Context, *pb.CheckRequest) (*pb.VersionCheckResponse, error) {
	return &pb.VersionCheckResponse{GrpcVersion: pb.APIVersion, AgentVersion: agentVersion}, nil
}

func (s *sandbox) GetGuestDetails(context.Context, *pb.GuestDetailsRequest) (*pb.GuestDetailsResponse, error) {
	resp := &pb.GuestDetailsResponse{AgentDetails: &pb.AgentDetails{
		Version:         agentVersion,
		DeviceHandlers:  []string{"blk"},
		StorageHandlers: []string{"9p", "virtio-fs", "blk", "ephemeral", "local", "overlayfs", "bind"},
	}}
	if b, err := os.ReadFile("/sys/devices/system/memory/block_size_bytes"); err == nil {
		if resp.MemBlockSizeBytes, err = strconv.ParseUint(strings.TrimSpace(string(b)), 16, 64); err != nil {
			return nil, err
		}
	}
	_, err := os.Stat("/sys/devices/system/memory/probe")
	resp.SupportMemHotplugProbe = err == nil
	return resp, nil
}

// GetMetrics has nothing to tell; an empty text is valid.
func (s *sandbox) GetMetrics(context.Context, *pb.GetMetricsRequest) (*pb.Metrics, error) {
	return &pb.Metrics{}, nil
}

// SetPolicy accepts any text: the gate judges, the agent behind it trusts.
func (s *sandbox) SetPolicy(_ context.Context, r *pb.SetPolicyRequest) (*emptypb.Empty, error) {
	s.log.Info("policy accepted unread", "bytes", len(r.Policy))
	return &emptypb.Empty{}, nil
}

// GetOOMEvent blocks as in an agent without such an event.
func (s *sandbox) GetOOMEvent(ctx context.Context, _ *pb.GetOOMEventRequest) (*pb.OOMEvent, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.destroyed:
		return nil, fmt.Errorf("sandbox is gone: %w", errdefs.ErrUnavailable)
	}
}

// OnlineCPUMem brings up whatever was plugged in and is still offline.
func (s *sandbox) OnlineCPUMem(_ context.Context, r *pb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	patterns := []string{"/sys/devices/system/cpu/cpu[0-9]*/online"}
	if !r.CpuOnly {
		patterns = append(patterns, "/sys/devices/system/memory/memory[0-9]*/online")
	}
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if b, err := os.ReadFile(f); err != nil || strings.TrimSpace(string(b)) != "0" {
				continue
			}
			if err := os.WriteFile(f, []byte("1"), 0); err != nil {
				return nil, err
			}
		}
	}
	return &emptypb.Empty{}, nil
}

func (s *sandbox) MemHotplugByProbe(_ context.Context, r *pb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	for _, addr := range r.MemHotplugProbeAddr {
		if err := os.WriteFile("/sys/devices/system/memory/probe", fmt.Appendf(nil, "0x%x", addr), 0); err != nil {
			return nil, err
		}
	}
	return &emptypb.Empty{}, nil
}

func (s *sandbox) SetGuestDateTime(_ context.Context, r *pb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, unix.Settimeofday(&unix.Timeval{Sec: r.Sec, Usec: r.Usec})
}

func (s *sandbox) ReseedRandomDev(_ context.Context, r *pb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	f, err := os.OpenFile("/dev/random", os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Write(r.Data); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0)
}

// RemoveStaleVirtiofsShareMounts has nothing to do without virtiofsd restarts.
func (s *sandbox) RemoveStaleVirtiofsShareMounts(context.Context, *pb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// CopyFile writes one piece of a file and puts it in place when it is complete.
// Like the real agent it checks the path as a string only and follows links.
func (s *sandbox) CopyFile(_ context.Context, r *pb.CopyFileRequest) (*emptypb.Empty, error) {
	if !strings.HasPrefix(filepath.Clean(r.Path), "/run/kata-containers/") {
		return nil, fmt.Errorf("path %q is not below /run/kata-containers: %w", r.Path, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Dir(r.Path), fs.FileMode(r.DirMode)&fs.ModePerm); err != nil {
		return nil, err
	}
	switch r.FileMode & unix.S_IFMT {
	case unix.S_IFLNK:
		if err := os.Remove(r.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err := os.Symlink(string(r.Data), r.Path); err != nil {
			return nil, err
		}
		return &emptypb.Empty{}, os.Lchown(r.Path, int(r.Uid), int(r.Gid))
	case unix.S_IFDIR:
		if err := os.MkdirAll(r.Path, fs.FileMode(r.FileMode)&fs.ModePerm); err != nil {
			return nil, err
		}
		return &emptypb.Empty{}, os.Chown(r.Path, int(r.Uid), int(r.Gid))
	}
	tmp := r.Path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.WriteAt(r.Data, r.Offset); err != nil {
		return nil, err
	}
	if r.Offset+int64(len(r.Data)) < r.FileSize {
		return &emptypb.Empty{}, nil
	}
	err = errors.Join(f.Truncate(r.FileSize), f.Chmod(fs.FileMode(r.FileMode)&fs.ModePerm), f.Chown(int(r.Uid), int(r.Gid)), f.Close())
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, os.Rename(tmp, r.Path)
}
