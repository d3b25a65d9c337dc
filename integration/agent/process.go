package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// errNoProcess carries the text by which Kata's shim knows that the process
// has ended already (virtcontainers/container.go, signalProcess).
var errNoProcess = errors.New("ESRCH: No such process")

// process is the first process of a container or of an exec.
type process struct {
	os     *os.Process
	io     *stdio
	done   chan struct{} // closed when the process was waited for
	status int32         // exit code, 128+signal when killed; valid once done is closed
}

// watch adopts a process that runc left to us and waits for it. The goroutine
// ends with the process.
func watch(pid int, io *stdio) (*process, error) {
	p, err := os.FindProcess(pid)
	if err != nil {
		return nil, err
	}
	proc := &process{os: p, io: io, done: make(chan struct{})}
	go func() {
		defer close(proc.done)
		defer io.exited()
		proc.status = 255
		state, err := p.Wait()
		if err != nil {
			return
		}
		ws := state.Sys().(syscall.WaitStatus)
		if proc.status = int32(ws.ExitStatus()); ws.Signaled() {
			proc.status = 128 + int32(ws.Signal())
		}
	}()
	return proc, nil
}

func (p *process) wait(ctx context.Context) (int32, error) {
	select {
	case <-p.done:
		return p.status, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// signal sends sig. PID 1 of a container ignores what it has no handler for;
// like the real agent the stand-in then makes a SIGKILL of a SIGTERM.
func (p *process) signal(sig unix.Signal, init bool) error {
	if init && sig == unix.SIGTERM && !handles(p.os.Pid, sig) {
		sig = unix.SIGKILL
	}
	err := p.os.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, unix.ESRCH) {
		return errNoProcess
	}
	return err
}

// handles reports whether the process catches sig (SigCgt in proc_pid_status(5)).
func handles(pid int, sig unix.Signal) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if mask, ok := strings.CutPrefix(line, "SigCgt:"); ok {
			bits, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
			return err == nil && bits&(1<<(sig-1)) != 0
		}
	}
	return false
}

func (s *sandbox) ExecProcess(ctx context.Context, r *pb.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.Process == nil || r.ExecId == "" || r.ExecId == c.id {
		return nil, fmt.Errorf("exec %q needs a process and an id of its own: %w", r.ExecId, errdefs.ErrInvalidArgument)
	}
	spec, err := pb.ProcessGRPCtoOCI(r.Process)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.processes[r.ExecId]; ok {
		return nil, fmt.Errorf("exec %q: %w", r.ExecId, errdefs.ErrAlreadyExists)
	}
	file := filepath.Join(c.bundle, "process.json")
	if err := writeJSON(file, spec); err != nil {
		return nil, err
	}
	p, err := s.runc.spawn(ctx, spec.Terminal, "exec", c.id, "--detach", "--process", file)
	if err != nil {
		return nil, err
	}
	if spec.ConsoleSize != nil {
		p.io.resize(uint16(spec.ConsoleSize.Height), uint16(spec.ConsoleSize.Width))
	}
	c.processes[r.ExecId] = p
	return &emptypb.Empty{}, nil
}

func (s *sandbox) SignalProcess(ctx context.Context, r *pb.SignalProcessRequest) (*emptypb.Empty, error) {
	if r.ExecId == "" { // every process of the container
		c, err := s.container(r.ContainerId)
		if err != nil {
			return nil, err
		}
		return &emptypb.Empty{}, s.runc.run(ctx, nil, "kill", "--all", c.id, strconv.Itoa(int(r.Signal)))
	}
	p, err := s.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, p.signal(unix.Signal(r.Signal), r.ExecId == r.ContainerId)
}

func (s *sandbox) WaitProcess(ctx context.Context, r *pb.WaitProcessRequest) (*pb.WaitProcessResponse, error) {
	p, err := s.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	status, err := p.wait(ctx)
	if err != nil {
		return nil, err
	}
	if r.ExecId != r.ContainerId { // a container's own status stays until RemoveContainer
		if c, err := s.container(r.ContainerId); err == nil {
			c.forget(r.ExecId)
		}
	}
	return &pb.WaitProcessResponse{Status: status}, nil
}

func (s *sandbox) WriteStdin(ctx context.Context, r *pb.WriteStreamRequest) (*pb.WriteStreamResponse, error) {
	p, err := s.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	n, err := p.io.write(ctx, r.Data)
	return &pb.WriteStreamResponse{Len: uint32(n)}, err
}

func (s *sandbox) CloseStdin(_ context.Context, r *pb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, p.io.closeStdin()
}

func (s *sandbox) ReadStdout(_ context.Context, r *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error) {
	return s.read(r, (*stdio).stdout)
}

func (s *sandbox) ReadStderr(_ context.Context, r *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error) {
	return s.read(r, (*stdio).stderr)
}

func (s *sandbox) read(r *pb.ReadStreamRequest, stream func(*stdio) *os.File) (*pb.ReadStreamResponse, error) {
	p, err := s.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	b, err := read(stream(p.io), int(r.Len))
	if err != nil {
		return nil, err
	}
	return &pb.ReadStreamResponse{Data: b}, nil
}

func (s *sandbox) TtyWinResize(_ context.Context, r *pb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, p.io.resize(uint16(r.Row), uint16(r.Column))
}

func writeJSON(file string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}
