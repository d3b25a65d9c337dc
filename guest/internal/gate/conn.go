package gate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sealvol/sealvol/guest/frame"
)

// conn is one connection of the host.
type conn struct {
	g     *Gate
	nc    net.Conn
	write sync.Mutex
}

// serve reads requests until the host closes the connection, breaks the protocol or ctx
// ends. Each request has its own goroutine, so none waits for another's answer. Those that
// change the sandbox go on after serve has returned.
func (g *Gate) serve(ctx context.Context, nc net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	ac, err := g.Dial(ctx)
	if err != nil {
		return fmt.Errorf("connect to the agent: %w", err)
	}
	// What passes without changing the sandbox goes over a connection of its own, so that
	// calls that block end on both sides when the host goes away.
	client := ttrpc.NewClient(ac, ttrpc.WithOnClose(cancel))
	defer client.Close()
	c := &conn{g: g, nc: nc}

	var passing sync.WaitGroup
	defer passing.Wait()
	defer cancel()
	places := make(chan struct{}, maxRequests)
	r := bufio.NewReader(nc)
	for last := uint32(0); ; {
		f, err := frame.Read(r)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
				return nil
			}
			return err
		}
		deadline := time.Now()
		if f.Type != frame.Request {
			return fmt.Errorf("frame of type %v, a client of unary calls sends requests only: %w", f.Type, errdefs.ErrInvalidArgument)
		}
		if f.Stream%2 == 0 || f.Stream <= last {
			return fmt.Errorf("stream %d after stream %d, they must be odd and rise: %w", f.Stream, last, errdefs.ErrInvalidArgument)
		}
		last = f.Stream
		if f.Flags != 0 {
			c.answer(f.Stream, "request", nil, fmt.Errorf("flags %#x: only unary calls are known: %w", f.Flags, errdefs.ErrInvalidArgument))
			continue
		}
		select {
		case places <- struct{}{}:
		default:
			c.answer(f.Stream, "request", nil, fmt.Errorf("more than %d requests at once: %w", maxRequests, errdefs.ErrResourceExhausted))
			continue
		}
		m, req, timeout, err := g.parse(f.Payload)
		if err != nil {
			c.answer(f.Stream, m.name, nil, err)
			<-places
			continue
		}
		if timeout == 0 {
			deadline = time.Time{}
		} else {
			deadline = deadline.Add(timeout)
		}
		done, err := g.admit(m)
		if err != nil {
			c.answer(f.Stream, m.name, nil, err)
			<-places
			continue
		}
		if m.verdict == judged {
			go func() {
				defer func() { <-places }()
				resp, err := g.judge(deadline, m, req)
				// A host that does not read its answer holds up nothing but its connection;
				// the process lives until the last one is told.
				if !m.last {
					done()
				}
				c.answer(f.Stream, m.name, resp, err)
				if m.last {
					done()
				}
			}()
			continue
		}
		passing.Go(func() {
			defer done()
			defer func() { <-places }()
			ctx, cancel := within(ctx, deadline)
			defer cancel()
			resp, err := g.pass(ctx, client, m, req)
			c.answer(f.Stream, m.name, resp, err)
		})
	}
}

// within bounds ctx by the host's deadline, if it gave one.
func within(ctx context.Context, deadline time.Time) (context.Context, context.CancelFunc) {
	if deadline.IsZero() {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline)
}

// parse decodes a request down to the message of its method. The metadata is dropped: the
// agent uses it for nothing but trace ids.
func (g *Gate) parse(payload []byte) (method, proto.Message, time.Duration, error) {
	r, err := frame.ParseRequest(payload)
	if err != nil {
		return method{}, nil, 0, err
	}
	m, ok := g.methods[r.Service+"/"+r.Method]
	if !ok {
		return method{}, nil, 0, fmt.Errorf("method %.64q of service %.64q is not known to the guest's gate: %w", r.Method, r.Service, errdefs.ErrNotImplemented)
	}
	if m.verdict == never {
		return m, nil, 0, fmt.Errorf("%s never passes the guest's gate: %s: %w", m.name, m.reason, errdefs.ErrPermissionDenied)
	}
	if r.TimeoutNano < 0 {
		return m, nil, 0, fmt.Errorf("%s: its time is over: %w", m.name, context.DeadlineExceeded)
	}
	req := m.in.New().Interface()
	if err := frame.Unmarshal(r.Payload, req, dropShared); err != nil {
		return m, nil, 0, fmt.Errorf("%s: %w", m.name, err)
	}
	if err := checkIDs(req); err != nil {
		return m, nil, 0, fmt.Errorf("%s: %w", m.name, err)
	}
	return m, req, time.Duration(r.TimeoutNano), nil
}

// The agent makes path and cgroup names of ids.
var id = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// checkIDs validates the fields of a request that name a sandbox, a container or a
// process. An exec id may be empty: in SignalProcess that means all processes.
func checkIDs(req proto.Message) error {
	m := req.ProtoReflect()
	for _, name := range []protoreflect.Name{"sandbox_id", "container_id", "exec_id"} {
		fd := m.Descriptor().Fields().ByName(name)
		if fd == nil {
			continue
		}
		v := m.Get(fd).String()
		if v == "" && name == "exec_id" {
			continue
		}
		if !id.MatchString(v) {
			return fmt.Errorf("%s %.64q is not an id of letters, digits, \"_\", \".\" and \"-\": %w", name, v, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// judge runs a method's handler. It belongs to the sandbox: only the host's deadline and
// the sandbox's end cut it short, and what ends something has bounds of its own.
func (g *Gate) judge(deadline time.Time, m method, req proto.Message) (proto.Message, error) {
	if m.end {
		deadline = time.Time{}
	}
	ctx, cancel := within(g.work, deadline)
	defer cancel()
	return m.judge(g, ctx, req)
}

// pass sends a request on that the policy has nothing against.
func (g *Gate) pass(ctx context.Context, client *ttrpc.Client, m method, req proto.Message) (proto.Message, error) {
	if err := g.allow(ctx, m.name, req); err != nil {
		return nil, err
	}
	return call(ctx, client, m, req)
}

// forward sends a judged request on.
func (g *Gate) forward(ctx context.Context, name string, req proto.Message) (proto.Message, error) {
	return call(ctx, g.agent, g.methods[agentService+"/"+name], req)
}

// call makes one request of the agent. An answer that says no is a *status.Status error.
func call(ctx context.Context, client *ttrpc.Client, m method, req proto.Message) (proto.Message, error) {
	if err := ctx.Err(); err != nil { // the client would send it all the same
		return nil, fmt.Errorf("%s: %w", m.name, err)
	}
	resp := m.out.New().Interface()
	if err := client.Call(ctx, m.service, m.name, req, resp); err != nil {
		return nil, fmt.Errorf("%s: %w", m.name, err)
	}
	return resp, nil
}

// answered reports whether err is the agent's own last word on a request. After any other
// error the agent may still be at work on it.
func answered(err error) bool {
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch s.Code() {
	case codes.DeadlineExceeded, codes.Canceled, codes.Unavailable:
		return false
	}
	return true
}

// answer writes the response. A host that is gone gets none, which is its own affair.
func (c *conn) answer(stream uint32, name string, msg proto.Message, err error) {
	resp := new(ttrpc.Response)
	if err == nil {
		resp.Payload, err = proto.Marshal(msg)
	}
	if err == nil && proto.Size(resp) > frame.MaxPayload {
		err = fmt.Errorf("%s: the agent's answer is too large: %w", name, errdefs.ErrResourceExhausted)
	}
	if err != nil {
		level := slog.LevelWarn
		if answered(err) {
			level = slog.LevelDebug // the agent's own no, as at the end of each stream
		}
		c.g.Log.Log(context.Background(), level, "request refused or failed", "method", name, "error", err)
		resp = &ttrpc.Response{Status: hostStatus(err).Proto()}
	}
	p, err := proto.Marshal(resp)
	if err != nil {
		c.g.Log.Error("encode a response", "method", name, "error", err)
		c.nc.Close()
		return
	}
	c.write.Lock()
	defer c.write.Unlock()
	if err := frame.Write(c.nc, frame.Frame{Stream: stream, Type: frame.Response, Payload: p}); err != nil {
		c.nc.Close()
	}
}

// hostStatus is what the host gets to see of an error: the agent's own answer as it is, one
// line of what has a class, and of everything else only that it happened.
func hostStatus(err error) *status.Status {
	if ttrpcErr := (interface{ GRPCStatus() *status.Status })(nil); errors.As(err, &ttrpcErr) {
		return ttrpcErr.GRPCStatus()
	}
	s := status.Convert(errgrpc.ToGRPC(err))
	if s.Code() == codes.Unknown || s.Code() == codes.Internal {
		return status.New(codes.Internal, "the guest failed; its own log says why")
	}
	line := strings.Join(strings.Fields(s.Message()), " ")
	if len(line) > maxLine {
		line = strings.ToValidUTF8(line[:maxLine], "") + "…"
	}
	return status.New(s.Code(), line)
}

const maxLine = 600
