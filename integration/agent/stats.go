package main

import (
	"context"

	"github.com/containerd/cgroups/v3/cgroup2"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// StatsContainer gives the values that CRI's container stats need.
func (s *sandbox) StatsContainer(_ context.Context, r *pb.StatsContainerRequest) (*pb.StatsContainerResponse, error) {
	c, err := s.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	m, err := cgroup2.Load(c.cgroup)
	if err != nil {
		return nil, err
	}
	st, err := m.Stat()
	if err != nil {
		return nil, err
	}
	const nanosPerMicro = 1000
	cpu, mem := st.GetCPU(), st.GetMemory()
	return &pb.StatsContainerResponse{CgroupStats: &pb.CgroupStats{
		CpuStats: &pb.CpuStats{
			CpuUsage: &pb.CpuUsage{
				TotalUsage:        cpu.GetUsageUsec() * nanosPerMicro,
				UsageInKernelmode: cpu.GetSystemUsec() * nanosPerMicro,
				UsageInUsermode:   cpu.GetUserUsec() * nanosPerMicro,
			},
			ThrottlingData: &pb.ThrottlingData{
				Periods:          cpu.GetNrPeriods(),
				ThrottledPeriods: cpu.GetNrThrottled(),
				ThrottledTime:    cpu.GetThrottledUsec() * nanosPerMicro,
			},
		},
		MemoryStats: &pb.MemoryStats{
			Cache:       mem.GetFile(),
			Usage:       &pb.MemoryData{Usage: mem.GetUsage(), MaxUsage: mem.GetMaxUsage(), Limit: mem.GetUsageLimit()},
			SwapUsage:   &pb.MemoryData{Usage: mem.GetSwapUsage(), MaxUsage: mem.GetSwapMaxUsage(), Limit: mem.GetSwapLimit()},
			KernelUsage: &pb.MemoryData{Usage: mem.GetKernelStack() + mem.GetSlab()},
			Stats: map[string]uint64{
				"anon": mem.GetAnon(), "file": mem.GetFile(), "inactive_file": mem.GetInactiveFile(),
				"active_file": mem.GetActiveFile(), "pgfault": mem.GetPgfault(), "pgmajfault": mem.GetPgmajfault(),
			},
		},
		PidsStats:  &pb.PidsStats{Current: st.GetPids().GetCurrent(), Limit: st.GetPids().GetLimit()},
		BlkioStats: &pb.BlkioStats{},
	}}, nil
}

func (s *sandbox) GetVolumeStats(_ context.Context, r *pb.VolumeStatsRequest) (*pb.VolumeStatsResponse, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(r.VolumeGuestPath, &fs); err != nil {
		return nil, err
	}
	block := uint64(fs.Bsize)
	return &pb.VolumeStatsResponse{
		Usage: []*pb.VolumeUsage{
			{Unit: pb.VolumeUsage_BYTES, Total: fs.Blocks * block, Used: (fs.Blocks - fs.Bfree) * block, Available: fs.Bavail * block},
			{Unit: pb.VolumeUsage_INODES, Total: fs.Files, Used: fs.Files - fs.Ffree, Available: fs.Ffree},
		},
		VolumeCondition: &pb.VolumeCondition{},
	}, nil
}
