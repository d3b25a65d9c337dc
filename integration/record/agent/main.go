// Command agent is the only program of a Kata guest in which nothing runs. It answers the agent's protocol (Kata 3.20) as if each request
// had been carried out, and keeps the requests: GetMetrics gives them back as protobuf JSON, one a line, with the name of the method.
//
// It is process 1 of the guest.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// port is the vsock port on which Kata expects its agent.
const port = 1024

// errEOF ends the copy loops of Kata's shim, which stop at any error; an empty answer would make them spin.
var errEOF = errors.New("read meet eof")

func main() {
	err := run(context.Background())
	slog.Error("the guest ends", "cause", err)
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		slog.Error("power off", "error", err)
	}
}

func run(ctx context.Context) error {
	if err := loadModules("/etc/sealvol/modules"); err != nil {
		return err
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	r := recorder{ended: map[string]chan struct{}{}}
	for _, name := range []protoreflect.FullName{"grpc.AgentService", "grpc.Health"} {
		service, err := r.service(name)
		if err != nil {
			return err
		}
		server.RegisterService(string(name), service)
	}
	return server.Serve(ctx, l)
}

// loadModules loads the kernel modules that file names, one path a line, but those for other processors.
func loadModules(file string) error {
	list, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(list)) {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("kernel module %s: %w", name, err)
		}
	}
	return nil
}

// A recorder keeps what it is asked.
type recorder struct {
	mu       sync.Mutex
	requests bytes.Buffer
	ended    map[string]chan struct{} // by container: closed when it was told to end
}

// service answers every method that the protocol has.
func (r *recorder) service(name protoreflect.FullName) (*ttrpc.ServiceDesc, error) {
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return nil, err
	}
	desc := &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{}}
	methods := found.(protoreflect.ServiceDescriptor).Methods()
	for i := range methods.Len() {
		method := methods.Get(i)
		in, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
		if err != nil {
			return nil, err
		}
		out, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
		if err != nil {
			return nil, err
		}
		desc.Methods[string(method.Name())] = func(ctx context.Context, unmarshal func(any) error) (any, error) {
			request := in.New().Interface()
			if err := unmarshal(request); err != nil {
				return nil, err
			}
			if err := r.keep(string(method.Name()), request); err != nil {
				return nil, err
			}
			return r.answer(ctx, request, out.New().Interface())
		}
	}
	return desc, nil
}

func (r *recorder) keep(method string, request proto.Message) error {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(request)
	if err != nil {
		return err
	}
	line, err := json.Marshal(map[string]any{"rpc": method, "request": json.RawMessage(text)})
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests.Write(append(line, '\n'))
	return nil
}

// answer gives what Kata's shim needs to go on, which mostly is an empty answer.
func (r *recorder) answer(ctx context.Context, request, empty proto.Message) (any, error) {
	switch request := request.(type) {
	case *pb.CheckRequest:
		if health, ok := empty.(*pb.HealthCheckResponse); ok {
			health.Status = pb.HealthCheckResponse_SERVING
		}
	case *pb.GuestDetailsRequest:
		return &pb.GuestDetailsResponse{MemBlockSizeBytes: 128 << 20, AgentDetails: &pb.AgentDetails{Version: "3.20.0"}}, nil
	case *pb.GetMetricsRequest:
		r.mu.Lock()
		defer r.mu.Unlock()
		return &pb.Metrics{Metrics: r.requests.String()}, nil
	case *pb.ReadStreamRequest:
		return nil, errEOF
	case *pb.GetOOMEventRequest:
		<-ctx.Done()
		return nil, ctx.Err()
	case *pb.SignalProcessRequest:
		r.end(request.ContainerId)
	case *pb.WaitProcessRequest:
		if request.ExecId != request.ContainerId {
			return empty, nil // an executed command, which has succeeded
		}
		select {
		case <-r.container(request.ContainerId):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return empty, nil
}

// container gives what is closed when the container ends.
func (r *recorder) container(id string) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended[id] == nil {
		r.ended[id] = make(chan struct{})
	}
	return r.ended[id]
}

func (r *recorder) end(id string) {
	ended := r.container(id)
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-ended:
	default:
		close(ended)
	}
}
