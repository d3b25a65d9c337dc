// Package control is the guest's read-only service, sealvol.v1, that says what is sealed
// and how.
package control

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/sealvol/sealvol/guest/api/receipt"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// Sandbox knows the policy and the containers.
type Sandbox interface {
	// Describe returns the policy in force, and what weakens this sandbox, a line each.
	Describe() (*sealvolv1.Policy, []string)
}

// Volumes knows the volumes.
type Volumes interface {
	Status() []*sealvolv1.Volume
}

// TEE makes quotes.
type TEE interface {
	// Provider is the kernel's name of what makes them.
	Provider() string
	// Quote is a quote over the report data.
	Quote(ctx context.Context, reportData [64]byte) ([]byte, error)
}

// Service answers sealvol.v1.Control.
type Service struct {
	Version string
	Sandbox Sandbox
	Volumes Volumes
	TEE     TEE // nil: there is none
	Now     func() time.Time
}

// Serve answers on l until ctx ends.
func (s Service) Serve(ctx context.Context, l net.Listener) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return fmt.Errorf("control service: %w", err)
	}
	sealvolv1.RegisterControlService(server, s)
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(ctx, l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("control service: %w", err)
	}
	return nil
}

// Status implements sealvol.v1.Control.
func (s Service) Status(_ context.Context, _ *sealvolv1.StatusRequest) (*sealvolv1.StatusResponse, error) {
	resident, err := residentBytes()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	policy, warnings := s.Sandbox.Describe()
	return &sealvolv1.StatusResponse{
		Version: s.Version, Policy: policy, Volumes: s.Volumes.Status(), ResidentBytes: resident, Warnings: warnings,
		Tee: s.tee(),
	}, nil
}

func (s Service) tee() string {
	if s.TEE == nil {
		return receipt.NoTEE
	}
	return s.TEE.Provider()
}

// residentBytes reads the second field of /proc/self/statm, in pages.
func residentBytes() (uint64, error) {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, fmt.Errorf("resident memory: %w", err)
	}
	fields := strings.Fields(string(statm))
	if len(fields) < 2 {
		return 0, fmt.Errorf("resident memory: unexpected %q", statm)
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("resident memory: %w", err)
	}
	return pages * uint64(os.Getpagesize()), nil
}
