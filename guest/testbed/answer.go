package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/volume"
	"github.com/sealvol/sealvol/integration/testbed"
)

// answer does what a request says.
func (b *bed) answer(r testbed.Request) testbed.Answer {
	answer := testbed.Answer{ID: r.ID}
	if err := b.do(r, &answer); err != nil {
		answer.Error = err.Error()
		// As the gate classifies it for its answer.
		answer.Class = status.Code(errgrpc.ToGRPC(err)).String()
	}
	return answer
}

func (b *bed) do(r testbed.Request, answer *testbed.Answer) error {
	ctx := context.Background()
	if r.Timeout != "" {
		limit, err := time.ParseDuration(r.Timeout)
		if err != nil {
			return fmt.Errorf("timeout: %v: %w", err, errdefs.ErrInvalidArgument)
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	b.mu.Lock()
	m := b.manager
	b.mu.Unlock()
	switch r.Do {
	case testbed.DoAcquire:
		return ofVolume(r, b.acquire(ctx, m, r))
	case testbed.DoRelease:
		return m.Release(ctx, r.Container)
	case testbed.DoAttach:
		dir, err := m.Attach(ctx, r.Volume)
		answer.Dir = dir
		return ofVolume(r, err)
	case testbed.DoDetach:
		return ofVolume(r, m.Detach(ctx, r.Volume))
	case testbed.DoNumber:
		major, minor, err := m.Number(ctx, r.Volume)
		answer.Number = blockdev.Number{Major: major, Minor: minor}.String()
		return ofVolume(r, err)
	case testbed.DoStatus:
		for _, v := range m.Status() {
			text, err := protojson.Marshal(v)
			if err != nil {
				return err
			}
			answer.Status = append(answer.Status, json.RawMessage(text))
		}
		return nil
	case testbed.DoDestroy:
		return b.renew(ctx, m)
	case testbed.DoMemory:
		memory, err := ownMemory()
		answer.Memory = &memory
		return err
	default:
		return fmt.Errorf("do %q: %w", r.Do, errdefs.ErrInvalidArgument)
	}
}

// ofVolume names the volume in an error, as the gate does.
func ofVolume(r testbed.Request, err error) error {
	if err != nil {
		return fmt.Errorf("volume %s: %w", r.Volume, err)
	}
	return nil
}

func (b *bed) acquire(ctx context.Context, m *volume.Manager, r testbed.Request) error {
	spec, ok := b.policy.Volumes()[r.Volume]
	if !ok {
		return fmt.Errorf("the policy has none of this name: %w", errdefs.ErrPermissionDenied)
	}
	address, err := device.Parse("blk", r.Path)
	if err != nil {
		return err
	}
	return m.Acquire(ctx, r.Container, r.Volume, spec, address)
}

// renew ends all volumes. When that fails they stay, and it may be asked for again.
func (b *bed) renew(ctx context.Context, old *volume.Manager) error {
	if err := old.Destroy(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.manager != old {
		return nil // somebody else's destroy
	}
	m, err := b.open()
	if err != nil {
		return err
	}
	b.manager = m
	return nil
}

func ownMemory() (testbed.Memory, error) {
	debug.FreeOSMemory() // collects garbage first
	var heap runtime.MemStats
	runtime.ReadMemStats(&heap)
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return testbed.Memory{}, err
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(statm), &size, &resident); err != nil {
		return testbed.Memory{}, fmt.Errorf("statm: %w", err)
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return testbed.Memory{}, err
	}
	return testbed.Memory{
		Goroutines: runtime.NumGoroutine(),
		Heap:       int64(heap.HeapAlloc),
		Resident:   resident * int64(os.Getpagesize()),
		Files:      len(files),
	}, nil
}
