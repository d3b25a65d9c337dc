package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sealvol/sealvol/shim/atomicfile"
)

// The stand-in for the stock Kata shim: this test binary, copied to another
// file. It is steered by the environment, and by the annotations of containers.
const (
	stockForm    = "TEST_STOCK_FORM"    // of the bootstrap answer: plain, json, proto
	stockVersion = "TEST_STOCK_VERSION" // of the task service
	stockStart   = "TEST_STOCK_START"   // how start goes: "fail", "hang", or well
	stockDelete  = "TEST_STOCK_DELETE"  // how delete goes: "fail", or well
)

// seen is what the stand-in saw of a container's Create.
type seen struct {
	Config  string
	Records map[string]string // mountInfo.json by folder
}

func stock() int {
	flags := flag.NewFlagSet("stock", flag.ContinueOnError)
	version := flags.Bool("v", false, "")
	namespace := flags.String("namespace", "", "")
	id := flags.String("id", "", "")
	for _, name := range []string{"address", "publish-binary", "bundle"} {
		flags.String(name, "", "")
	}
	if err := flags.Parse(os.Args[1:]); err != nil {
		return 2
	}
	if *version {
		fmt.Println("the stock shim")
		return 0
	}
	var err error
	switch flags.Arg(0) {
	case "start":
		err = stockStarts(*namespace, *id)
	case "delete":
		err = stockDeletes(*id)
	case "":
		err = stockServes(*id)
	default:
		err = fmt.Errorf("action %q", flags.Arg(0))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stock:", err)
		return 1
	}
	return 0
}

func stockStarts(namespace, id string) error {
	switch os.Getenv(stockStart) {
	case "fail":
		return errors.New("no hypervisor today")
	case "hang":
		time.Sleep(time.Hour)
	}
	params, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	if err := os.WriteFile("stdin", params, 0o600); err != nil {
		return err
	}
	socket := filepath.Join(os.Getenv(testRoot), "stock-"+id)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		return err
	}
	daemon := exec.Command(os.Args[0], "-namespace", namespace, "-id", id)
	daemon.ExtraFiles = []*os.File{f}
	daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := daemon.Start(); err != nil {
		return err
	}
	if err := os.WriteFile("shim.pid", []byte(strconv.Itoa(daemon.Process.Pid)), 0o600); err != nil {
		return err
	}
	address := "unix://" + socket
	version, err := strconv.Atoi(os.Getenv(stockVersion))
	if err != nil {
		return err
	}
	answer := []byte(address)
	switch os.Getenv(stockForm) {
	case "json":
		answer, err = json.Marshal(map[string]any{"version": version, "address": address, "protocol": "ttrpc"})
	case "proto":
		answer, err = proto.Marshal(&bootapi.BootstrapResult{
			Version: int32(version), Address: address, Protocol: "ttrpc", Metadata: map[string]string{"made": "by stock"},
		})
	}
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(answer)
	return err
}

func stockDeletes(id string) error {
	if os.Getenv(stockDelete) == "fail" {
		return errors.New("cannot delete")
	}
	if err := os.WriteFile("deleted", []byte(id), 0o600); err != nil {
		return err
	}
	answer, err := proto.Marshal(&taskv2.DeleteResponse{Pid: 4711, ExitStatus: 137})
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(answer)
	return err
}

// stockServes is the stock shim's own daemon. A method that is not overridden panics.
type stockService struct {
	taskv3.TTRPCTaskService
	mu         sync.Mutex
	containers map[string]bool
}

func stockServes(id string) error {
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	s := &stockService{containers: map[string]bool{}}
	if os.Getenv(stockVersion) == "3" {
		taskv3.RegisterTTRPCTaskService(server, s)
	} else {
		// The messages of the two versions are the same on the wire.
		methods := map[string]ttrpc.Method{
			"Create":   adapt(s.Create),
			"State":    adapt(s.State),
			"Delete":   adapt(s.Delete),
			"Kill":     adapt(s.Kill),
			"Shutdown": adapt(s.Shutdown),
		}
		server.RegisterService("containerd.task.v2.Task", &ttrpc.ServiceDesc{Methods: methods})
	}
	server.RegisterService("test.Service", &ttrpc.ServiceDesc{
		Methods: map[string]ttrpc.Method{
			"Echo": adapt(func(ctx context.Context, in *wrapperspb.BytesValue) (*wrapperspb.BytesValue, error) {
				if md, ok := ttrpc.GetMetadata(ctx); ok {
					in.Value = append(in.Value, strings.Join(md["extra"], "")...)
				}
				return in, nil
			}),
			"Fail": adapt(func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
				s, err := status.New(codes.ResourceExhausted, "no more").WithDetails(wrapperspb.String("detail"))
				if err != nil {
					return nil, err
				}
				return nil, s.Err()
			}),
		},
		Streams: map[string]ttrpc.Stream{
			"Stream": {StreamingClient: true, StreamingServer: true, Handler: func(_ context.Context, stream ttrpc.StreamServer) (any, error) {
				for {
					message := new(wrapperspb.StringValue)
					if err := stream.RecvMsg(message); errors.Is(err, io.EOF) {
						return nil, nil
					} else if err != nil {
						return nil, err
					}
					if err := stream.SendMsg(message); err != nil {
						return nil, err
					}
				}
			}},
		},
	})
	return server.Serve(context.Background(), l)
}

func adapt[In, Out any](method func(context.Context, *In) (Out, error)) ttrpc.Method {
	return func(ctx context.Context, decode func(any) error) (any, error) {
		in := new(In)
		if err := decode(in); err != nil {
			return nil, err
		}
		return method(ctx, in)
	}
}

func (s *stockService) Create(ctx context.Context, r *taskv3.CreateTaskRequest) (*taskv3.CreateTaskResponse, error) {
	config, err := os.ReadFile(filepath.Join(r.Bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	saw := seen{Config: string(config), Records: map[string]string{}}
	infos, err := filepath.Glob(filepath.Join(os.Getenv(testRoot), "records", "*", "mountInfo.json"))
	if err != nil {
		return nil, err
	}
	for _, path := range infos {
		info, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		saw.Records[filepath.Base(filepath.Dir(path))] = string(info)
	}
	data, err := json.Marshal(saw)
	if err != nil {
		return nil, err
	}
	if err := atomicfile.Write(filepath.Join(r.Bundle, "seen"), data, 0o600); err != nil {
		return nil, err
	}
	switch {
	case strings.Contains(string(config), `"test":"fail"`):
		return nil, status.Error(codes.Aborted, "the guest says no")
	case strings.Contains(string(config), `"test":"block"`):
		for {
			if _, err := os.Stat(filepath.Join(r.Bundle, "go-on")); err == nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	case strings.Contains(string(config), `"container-type":"sandbox"`):
		// The hypervisor, and what Kata keeps of the sandbox.
		for _, name := range []string{"sbs", "vm"} {
			if err := os.MkdirAll(filepath.Join(os.Getenv(testRoot), name, r.ID, "dir"), 0o700); err != nil {
				return nil, err
			}
		}
		if err := exec.Command("sleep", "3600").Start(); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[r.ID] = true
	return &taskv3.CreateTaskResponse{Pid: uint32(os.Getpid())}, nil
}

func (s *stockService) State(ctx context.Context, r *taskv3.StateRequest) (*taskv3.StateResponse, error) {
	return &taskv3.StateResponse{ID: r.ID, Pid: uint32(os.Getpid())}, nil
}

func (s *stockService) Delete(ctx context.Context, r *taskv3.DeleteRequest) (*taskv3.DeleteResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.containers[r.ID] {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	if r.ExecID == "" {
		delete(s.containers, r.ID)
	}
	return &taskv3.DeleteResponse{ExitStatus: 7}, nil
}

// Kill answers as Kata does for a sandbox that was never started: the stand-in starts none.
func (s *stockService) Kill(ctx context.Context, r *taskv3.KillRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.containers[r.ID] {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return nil, status.Error(codes.Unknown, "Sandbox not running")
}

func (s *stockService) Shutdown(ctx context.Context, r *taskv3.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.containers) == 0 {
		os.Exit(0) // As the stock shim does, without an answer.
	}
	return new(emptypb.Empty), nil
}
