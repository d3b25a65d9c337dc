package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// sandbox serves grpc.AgentService and grpc.Health.
type sandbox struct {
	refused

	log      *slog.Logger
	runc     runc
	storages storages

	mu         sync.Mutex
	containers map[string]*container // nil while it is being created
	created    bool
	id         string
	namespaces map[string]string // namespace type → path, shared by all containers
	mounts     []string          // mount points of the sandbox's storages

	destroyed   chan struct{} // closed by DestroySandbox
	destroyOnce sync.Once
}

func newSandbox(log *slog.Logger) (*sandbox, error) {
	// pivot_root(2) cannot leave the kernel's first root, an initramfs; like
	// the real agent the stand-in then moves the container's root over it.
	root, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != "/", false })
	if err != nil {
		return nil, err
	}
	if len(root) == 0 {
		return nil, errors.New("no root mount in /proc/self/mountinfo")
	}
	return &sandbox{
		log:        log,
		runc:       runc{root: filepath.Join(stateDir, "runc"), noPivot: root[len(root)-1].FSType == "rootfs"},
		storages:   storages{users: map[string]int{}},
		containers: map[string]*container{},
		namespaces: map[string]string{},
		destroyed:  make(chan struct{}),
	}, nil
}

func (s *sandbox) CreateSandbox(ctx context.Context, r *pb.CreateSandboxRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.created {
		return nil, fmt.Errorf("sandbox: %w", errdefs.ErrAlreadyExists)
	}
	if len(r.KernelModules) > 0 || r.GuestHookPath != "" {
		return nil, fmt.Errorf("kernel modules and guest hooks: %w", errdefs.ErrNotImplemented)
	}
	if err := s.shareNamespaces(r.Hostname); err != nil {
		return nil, err
	}
	mounts, err := s.storages.add(ctx, r.Storages)
	if err != nil {
		return nil, errors.Join(err, s.unshareNamespaces())
	}
	s.mounts, s.created, s.id = mounts, true, r.SandboxId
	s.log.Info("sandbox created", "sandbox", r.SandboxId)
	return &emptypb.Empty{}, nil
}

func (s *sandbox) DestroySandbox(ctx context.Context, _ *pb.DestroySandboxRequest) (*emptypb.Empty, error) {
	err := s.destroy(ctx)
	s.destroyOnce.Do(func() { close(s.destroyed) })
	return &emptypb.Empty{}, err
}

// destroy removes everything that the sandbox made. It may be called again.
func (s *sandbox) destroy(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for id, c := range s.containers {
		if c != nil {
			errs = append(errs, s.remove(ctx, c))
		}
		delete(s.containers, id)
	}
	errs = append(errs, s.storages.release(s.mounts), s.unshareNamespaces())
	s.mounts = nil
	return errors.Join(errs...)
}

// shareNamespaces makes the IPC and UTS namespaces that all containers of the
// sandbox join and pins them with bind mounts.
func (s *sandbox) shareNamespaces(hostname string) error {
	dir := filepath.Join(stateDir, "ns")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if hostname != "" {
				if err := unix.Sethostname([]byte(hostname)); err != nil {
					return fmt.Errorf("set host name: %w", err)
				}
			}
			for _, ns := range []string{"ipc", "uts"} {
				p := filepath.Join(dir, ns)
				if err := os.WriteFile(p, nil, 0o600); err != nil {
					return err
				}
				if err := unix.Mount("/proc/thread-self/ns/"+ns, p, "", unix.MS_BIND, ""); err != nil {
					return fmt.Errorf("pin %s namespace: %w", ns, err)
				}
				s.namespaces[ns] = p
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		return errors.Join(err, s.unshareNamespaces())
	}
	return nil
}

func (s *sandbox) unshareNamespaces() error {
	var errs []error
	for ns, p := range s.namespaces {
		errs = append(errs, mount.Unmount(p, unix.MNT_DETACH))
		delete(s.namespaces, ns)
	}
	return errors.Join(errs...)
}
