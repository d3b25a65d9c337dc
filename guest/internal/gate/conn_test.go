package gate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/sealvol/sealvol/guest/frame"
)

// unknownField is one that no message of the protocol has.
func unknownField() []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, 9999, protowire.VarintType), 1)
}

// wire speaks frames to the gate.
type wire struct {
	t testing.TB
	net.Conn
}

func (h *harness) wire() wire { return wire{t: h.t, Conn: h.dial()} }

func (w wire) send(f frame.Frame) {
	w.t.Helper()
	must(w.t, frame.Write(w, f))
}

func (w wire) request(stream uint32, service, method string, payload []byte) {
	w.t.Helper()
	p, err := proto.Marshal(&ttrpc.Request{Service: service, Method: method, Payload: payload, TimeoutNano: int64(10 * time.Second)})
	must(w.t, err)
	w.send(frame.Frame{Stream: stream, Type: frame.Request, Payload: p})
}

// response reads one and returns its status as an error.
func (w wire) response(stream uint32) error {
	w.t.Helper()
	w.SetReadDeadline(time.Now().Add(10 * time.Second))
	f, err := frame.Read(w)
	must(w.t, err)
	if f.Stream != stream || f.Type != frame.Response || f.Flags != 0 {
		w.t.Fatalf("got %+v for stream %d", f, stream)
	}
	var resp ttrpc.Response
	must(w.t, proto.Unmarshal(f.Payload, &resp))
	return status.ErrorProto(resp.Status)
}

func (w wire) wantClosed() {
	w.t.Helper()
	w.SetReadDeadline(time.Now().Add(10 * time.Second))
	if f, err := frame.Read(w); !errors.Is(err, io.EOF) {
		w.t.Errorf("the connection is open: %+v, %v", f, err)
	}
}

func TestEveryMethodOfTheAgentHasARule(t *testing.T) {
	t.Parallel()
	known := methods()
	for _, service := range []protoreflect.FullName{agentService, healthService} {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(service)
		must(t, err)
		list := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range list.Len() {
			m := list.Get(i)
			rule, ok := known[string(service)+"/"+string(m.Name())]
			switch {
			case !ok:
				t.Errorf("%s has no rule", m.FullName())
			case rule.reason == "":
				t.Errorf("%s has no reason", m.FullName())
			case m.IsStreamingClient() || m.IsStreamingServer():
				t.Errorf("%s is streaming, the gate knows unary calls only", m.FullName())
			}
		}
	}
}

func TestMethodsThatNeverPassReachNoAgent(t *testing.T) {
	t.Parallel()
	h := start(t)
	w := h.wire()
	stream := uint32(1)
	for _, m := range methods() {
		if m.verdict == never {
			w.request(stream, m.service, m.name, nil)
			wants(t, w.response(stream), codes.PermissionDenied, m.name, m.reason)
			stream += 2
		}
	}
	if stream < 2*8 {
		t.Errorf("only %d such methods", stream/2)
	}
	h.wantJournal()
}

func TestUnknownMethodsAreRefusedByName(t *testing.T) {
	t.Parallel()
	h := start(t)
	w := h.wire()
	for i, c := range []struct{ service, method string }{
		{agentService, "PullImage"}, {"grpc.ImageService", "Check"}, {healthService, "CreateSandbox"}, {"", ""},
		{agentService, "createSandbox"}, {agentService, strings.Repeat("x", 100000)},
	} {
		stream := uint32(2*i + 1)
		w.request(stream, c.service, c.method, nil)
		name := c.method
		if len(name) > 64 {
			name = name[:64]
		}
		wants(t, w.response(stream), codes.Unimplemented, fmt.Sprintf("%q", name))
	}
	h.wantJournal()
}

func TestUnknownFieldsAreRefusedInEveryMethod(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.forget()
	w := h.wire()
	stream := uint32(1)
	for _, m := range methods() {
		if m.verdict == never {
			continue
		}
		w.request(stream, m.service, m.name, unknownField())
		wants(t, w.response(stream), codes.InvalidArgument, m.name, "unknown field")
		stream += 2
	}
	h.wantJournal()
}

func TestUnknownFieldDeepInACreateContainerIsRefused(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.forget()
	req := request("c1", "app", "02/01")
	req.OCI.Process = &agent.Process{User: &agent.User{}}
	req.OCI.Process.User.ProtoReflect().SetUnknown(unknownField())
	_, err := h.host.CreateContainer(soon(t), req)
	wants(t, err, codes.InvalidArgument, "grpc.User")
	h.wantJournal()
}

func TestPassingMethodsAreForwardedAndAnswered(t *testing.T) {
	t.Parallel()
	h := start(t)
	var replied protoreflect.ProtoMessage
	h.agent.on("WaitProcess", func(ctx context.Context, _ proto.Message) (proto.Message, error) {
		if d, ok := ctx.Deadline(); !ok || time.Until(d) > 10*time.Second {
			t.Error("the host's deadline was not carried over")
		}
		r := &agent.WaitProcessResponse{Status: 137}
		r.ProtoReflect().SetUnknown(unknownField())
		replied = r
		return r, nil
	})
	resp, err := h.host.WaitProcess(soon(t), &agent.WaitProcessRequest{ContainerId: "c", ExecId: "e"})
	must(t, err)
	if !proto.Equal(resp, replied) {
		t.Errorf("got %v, the agent said %v", resp, replied)
	}
	if got := h.agent.last("WaitProcess").(*agent.WaitProcessRequest); got.ContainerId != "c" || got.ExecId != "e" {
		t.Errorf("the agent got %v", got)
	}
	for _, m := range methods() {
		if m.verdict != pass {
			continue
		}
		w := h.wire()
		req := m.in.New()
		if fd := req.Descriptor().Fields().ByName("container_id"); fd != nil {
			req.Set(fd, protoreflect.ValueOfString("c"))
		}
		p, err := proto.Marshal(req.Interface())
		must(t, err)
		w.request(1, m.service, m.name, p)
		if err := w.response(1); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
		if h.agent.last(m.name) == nil {
			t.Errorf("%s did not reach the agent", m.name)
		}
	}
}

func TestTheAgentsOwnErrorsReachTheHostAsTheyAre(t *testing.T) {
	t.Parallel()
	h := start(t)
	h.agent.refuse("StatsContainer", status.Error(codes.NotFound, "no such\ncontainer"))
	_, err := h.host.StatsContainer(soon(t), &agent.StatsContainerRequest{ContainerId: "c"})
	if s := status.Convert(err); s.Code() != codes.NotFound || s.Message() != "no such\ncontainer" {
		t.Errorf("got %v", err)
	}
}

func TestIdsWithSlashesDotsAndWorseAreRefused(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.forget()
	for _, id := range []string{"", "a/b", "..", ".", "/", "a b", "a\n", "a\x00", "-a", "_a", "ü", strings.Repeat("a", 129)} {
		_, err := h.host.StatsContainer(soon(t), &agent.StatsContainerRequest{ContainerId: id})
		wants(t, err, codes.InvalidArgument, "container_id")
		wants(t, h.create(id, "app"), codes.InvalidArgument, "container_id")
		if id != "" {
			_, err = h.host.SignalProcess(soon(t), &agent.SignalProcessRequest{ContainerId: "c", ExecId: id})
			wants(t, err, codes.InvalidArgument, "exec_id")
		}
	}
	h.wantJournal()
	must(t, h.create(strings.Repeat("a", 128), "app"))
	_, err := h.host.SignalProcess(soon(t), &agent.SignalProcessRequest{ContainerId: "c"})
	must(t, err)
}

func TestFlagsOfStreamingCallsAreRefused(t *testing.T) {
	t.Parallel()
	h := start(t)
	w := h.wire()
	p, err := proto.Marshal(&ttrpc.Request{Service: healthService, Method: "Check"})
	must(t, err)
	stream := uint32(1)
	for _, flags := range []uint8{1, 2, 4, 0x80, 0xff} {
		w.send(frame.Frame{Stream: stream, Type: frame.Request, Flags: flags, Payload: p})
		wants(t, w.response(stream), codes.InvalidArgument, "flags")
		stream += 2
	}
	h.wantJournal()
	w.send(frame.Frame{Stream: stream, Type: frame.Request, Payload: p})
	must(t, w.response(stream))
}

func TestProtocolBreachesEndTheConnection(t *testing.T) {
	t.Parallel()
	oversize := binary.BigEndian.AppendUint32(nil, frame.MaxPayload+1)
	oversize = append(oversize, 0, 0, 0, 3, 1, 0)
	check, err := proto.Marshal(&ttrpc.Request{Service: healthService, Method: "Check"})
	must(t, err)
	for name, breach := range map[string]func(w wire){
		"even stream":      func(w wire) { w.send(frame.Frame{Stream: 4, Type: frame.Request, Payload: check}) },
		"stream 0":         func(w wire) { w.send(frame.Frame{Stream: 0, Type: frame.Request, Payload: check}) },
		"stream again":     func(w wire) { w.send(frame.Frame{Stream: 1, Type: frame.Request, Payload: check}) },
		"a response":       func(w wire) { w.send(frame.Frame{Stream: 3, Type: frame.Response, Payload: check}) },
		"data":             func(w wire) { w.send(frame.Frame{Stream: 1, Type: frame.Data, Payload: check}) },
		"oversize":         func(w wire) { w.Write(oversize) },
		"unknown type":     func(w wire) { w.Write([]byte{0, 0, 0, 0, 0, 0, 0, 3, 9, 0}) },
		"half of a header": func(w wire) { w.Write([]byte{0, 0}); w.Conn.(*net.UnixConn).CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t)
			w := h.wire()
			w.send(frame.Frame{Stream: 1, Type: frame.Request, Payload: check})
			must(t, w.response(1))
			breach(w)
			w.wantClosed()
			if n := h.count("agent Check"); n != 1 {
				t.Errorf("%d requests reached the agent", n)
			}
			// Others are not disturbed.
			_, err := h.host.GetMetrics(soon(t), &agent.GetMetricsRequest{})
			must(t, err)
		})
	}
}

func TestRequestsThatAreNoneAreRefused(t *testing.T) {
	t.Parallel()
	h := start(t)
	w := h.wire()
	w.send(frame.Frame{Stream: 1, Type: frame.Request, Payload: []byte{0xff}})
	wants(t, w.response(1), codes.InvalidArgument)
	w.send(frame.Frame{Stream: 3, Type: frame.Request, Payload: unknownField()})
	wants(t, w.response(3), codes.InvalidArgument)
	w.request(5, healthService, "Check", []byte{0xff})
	wants(t, w.response(5), codes.InvalidArgument, "Check")
	late, err := proto.Marshal(&ttrpc.Request{Service: healthService, Method: "Check", TimeoutNano: -1})
	must(t, err)
	w.send(frame.Frame{Stream: 7, Type: frame.Request, Payload: late})
	wants(t, w.response(7), codes.DeadlineExceeded)
	h.wantJournal()
}

func TestBlockedCallsHoldNobodyUp(t *testing.T) {
	t.Parallel()
	h := start(t)
	release := make(chan struct{})
	var blocked sync.WaitGroup
	h.agent.on("WaitProcess", func(context.Context, proto.Message) (proto.Message, error) { <-release; return nil, nil })
	for range 100 {
		blocked.Go(func() {
			if _, err := h.host.WaitProcess(soon(t), &agent.WaitProcessRequest{ContainerId: "c"}); err != nil {
				t.Error(err)
			}
		})
	}
	h.sandbox()
	must(t, h.create("c1", "app", "02/01"))
	_, err := h.host.GetMetrics(soon(t), &agent.GetMetricsRequest{})
	must(t, err)
	close(release)
	blocked.Wait()
}

func TestTooManyRequestsAtOnceAreRefusedAndTheOthersGoOn(t *testing.T) {
	t.Parallel()
	h := start(t)
	release := make(chan struct{})
	h.agent.on("WaitProcess", func(context.Context, proto.Message) (proto.Message, error) { <-release; return nil, nil })
	p, err := proto.Marshal(&agent.WaitProcessRequest{ContainerId: "c"})
	must(t, err)
	w := h.wire()
	for i := range maxRequests {
		w.request(uint32(2*i+1), agentService, "WaitProcess", p)
	}
	over := uint32(2*maxRequests + 1)
	w.request(over, agentService, "WaitProcess", p)
	wants(t, w.response(over), codes.ResourceExhausted)
	close(release)
	w.SetReadDeadline(time.Now().Add(20 * time.Second))
	for range maxRequests {
		if _, err := frame.Read(w); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTooManyConnectionsAreClosed(t *testing.T) {
	t.Parallel()
	h := start(t)
	_, err := h.host.GetMetrics(soon(t), &agent.GetMetricsRequest{}) // its connection is in
	must(t, err)
	for range maxConnections - 1 {
		h.dial()
	}
	h.wire().wantClosed()
}

// A connection that goes away ends what blocks for it at the agent too.
func TestClosedConnectionEndsBlockedCallsAtTheAgent(t *testing.T) {
	t.Parallel()
	h := start(t)
	entered, ended := make(chan struct{}), make(chan struct{})
	h.agent.on("GetOOMEvent", func(ctx context.Context, _ proto.Message) (proto.Message, error) {
		close(entered)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	})
	w := h.wire()
	w.request(1, agentService, "GetOOMEvent", nil)
	<-entered
	w.Close()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the agent still waits")
	}
}

func TestInspectionRefusesEverything(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config) {
		c.Inspect = func() error {
			return fmt.Errorf("the kernel command line has agent.debug_console: %w", errdefs.ErrFailedPrecondition)
		}
	})
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "p"})
	wants(t, err, codes.FailedPrecondition, "agent.debug_console")
	_, err = h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.FailedPrecondition, "agent.debug_console")
	_, err = h.host.GetMetrics(soon(t), &agent.GetMetricsRequest{})
	wants(t, err, codes.FailedPrecondition, "agent.debug_console")
	h.wantJournal()
}

// What opened after the first request is found before the sandbox is created.
func TestInspectionIsRepeatedForTheSandbox(t *testing.T) {
	t.Parallel()
	var calls int
	h := start(t, func(c *Config) {
		c.Inspect = func() error {
			if calls++; calls == 1 {
				return nil
			}
			return fmt.Errorf("something listens: %w", errdefs.ErrFailedPrecondition)
		}
	})
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.FailedPrecondition, "something listens")
	h.wantJournal()
}

func TestErrorsForTheHostAreOneShortLineWithoutInternals(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		err  error
		code codes.Code
		want string
	}{
		"class":    {fmt.Errorf("volume data:\n  rule x: %w", errdefs.ErrPermissionDenied), codes.PermissionDenied, "volume data: rule x: permission denied"},
		"no class": {errors.New("ioctl 0xc138fd09 on /dev/mapper/control: EINVAL"), codes.Internal, "the guest failed; its own log says why"},
		"internal": {fmt.Errorf("secret detail: %w", errdefs.ErrInternal), codes.Internal, "the guest failed; its own log says why"},
		"late":     {fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded, "x: context deadline exceeded"},
		"long":     {fmt.Errorf("%s: %w", bytes.Repeat([]byte("ü"), 1000), errdefs.ErrDataLoss), codes.DataLoss, strings.Repeat("ü", 300) + "…"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := hostStatus(c.err)
			if s.Code() != c.code || s.Message() != c.want || len(s.Details()) > 0 {
				t.Errorf("got %v %q, want %v %q", s.Code(), s.Message(), c.code, c.want)
			}
		})
	}
}
