// Package relay carries ttrpc between containerd and the stock shim, and hands
// the calls that the shim has a part in to a [Handler].
//
// Everything else goes through as it came, frame by frame, in order. A call
// that is handled travels on a connection to the stock shim of its own: it may
// take long and must not hold up the others, and a ttrpc server refuses a
// stream that comes after one with a higher number.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/frame"
)

// A Handler has a part in some calls.
type Handler interface {
	// Handle says how a call is handled, nil if it is not.
	Handle(service, method string) Call
}

// A Call handles one call. It gives the payload of the response, or an error
// that the caller gets as its status. forward gives the call, as it came, to
// the stock shim and returns its answer; a status other than OK is an error
// for which status.FromError gives it.
type Call func(ctx context.Context, payload []byte, forward func() ([]byte, error)) ([]byte, error)

// Relay is one sandbox's relay.
type Relay struct {
	Dial    func(context.Context) (net.Conn, error) // to the stock shim
	Handler Handler
	// Ending is called when the stock shim has closed a connection. It returns
	// when containerd may see that; until then its calls stay unanswered.
	Ending func()
	Log    *slog.Logger
}

// Serve relays each connection that the listener gives. It returns when the
// listener is closed and each connection has ended; they end when the context does.
func (r *Relay) Serve(ctx context.Context, listener net.Listener) error {
	var connections sync.WaitGroup
	defer connections.Wait()
	for {
		down, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Too many open files, say: it may pass.
			r.Log.Error("accept a connection of containerd", "error", err)
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		connections.Go(func() {
			if err := r.connection(ctx, down); err != nil && ctx.Err() == nil {
				r.Log.Warn("a connection of containerd ended", "error", err)
			}
		})
	}
}

// connection relays one connection until a side closes it.
func (r *Relay) connection(ctx context.Context, down net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer down.Close()
	up, err := r.Dial(ctx)
	if err != nil {
		r.Ending()
		return fmt.Errorf("connect to the stock shim: %w", err)
	}
	defer up.Close()
	// Closing both ends every read and write below.
	stop := context.AfterFunc(ctx, func() {
		up.Close()
		down.Close()
	})
	defer stop()

	responses := &writer{w: down}
	var back sync.WaitGroup
	var backErr error
	back.Go(func() {
		defer cancel()
		backErr = copyFrames(up, responses)
		if ctx.Err() == nil {
			r.Ending()
		}
	})
	// Calls that are handled go on when containerd is gone: it may have been
	// restarted, and what the stock shim makes of them must be known.
	var calls sync.WaitGroup
	handled := context.WithoutCancel(ctx)
	err = r.requests(down, up, func(f frame.Frame, request *ttrpc.Request, call Call) {
		calls.Go(func() {
			response := r.respond(handled, f, request, call)
			err := context.Cause(ctx)
			if err == nil {
				err = responses.write(frame.Frame{Stream: f.Stream, Type: frame.Response, Payload: response})
			}
			if err != nil {
				r.Log.Warn("a response found no reader", "service", request.Service, "method", request.Method, "error", err)
			}
		})
	})
	cancel()
	back.Wait()
	calls.Wait()
	if err == nil || errors.Is(err, net.ErrClosed) {
		err = backErr
	}
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// requests copies what containerd sends to the stock shim, but for the calls
// that are handled.
func (r *Relay) requests(down io.Reader, up io.Writer, handle func(frame.Frame, *ttrpc.Request, Call)) error {
	for {
		f, err := frame.Read(down)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if f.Type == frame.Request {
			// A request that does not parse is the stock shim's to refuse.
			request := new(ttrpc.Request)
			if proto.Unmarshal(f.Payload, request) == nil {
				if call := r.Handler.Handle(request.Service, request.Method); call != nil {
					handle(f, request, call)
					continue
				}
			}
		}
		if err := frame.Write(up, f); err != nil {
			r.Ending()
			return err
		}
	}
}

// respond handles a call and gives the payload of its response frame.
func (r *Relay) respond(ctx context.Context, f frame.Frame, request *ttrpc.Request, call Call) []byte {
	payload, err := call(ctx, request.Payload, func() ([]byte, error) { return r.forward(ctx, f) })
	response := &ttrpc.Response{Payload: payload}
	if err != nil {
		// A status of the stock shim's goes back as it came.
		if _, ok := status.FromError(err); !ok {
			err = errgrpc.ToGRPC(err)
		}
		response = &ttrpc.Response{Status: status.Convert(err).Proto()}
	}
	data, err := proto.Marshal(response)
	if err != nil || len(data) > frame.MaxPayload {
		data, err = proto.Marshal(&ttrpc.Response{Status: status.Newf(codes.Internal, "the response cannot be sent: %v", err).Proto()})
		if err != nil {
			panic(err) // A status of two plain fields.
		}
	}
	return data
}

// forward makes one unary call on a connection of its own.
func (r *Relay) forward(ctx context.Context, f frame.Frame) ([]byte, error) {
	up, err := r.Dial(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "connect to the stock shim: %v", err)
	}
	defer up.Close()
	stop := context.AfterFunc(ctx, func() { up.Close() })
	defer stop()
	f.Stream = 1
	if err := frame.Write(up, f); err != nil {
		return nil, status.Errorf(codes.Unavailable, "call the stock shim: %v", err)
	}
	answer, err := frame.Read(up)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "the stock shim did not answer: %v", err)
	}
	response := new(ttrpc.Response)
	if answer.Type != frame.Response || answer.Stream != f.Stream || proto.Unmarshal(answer.Payload, response) != nil {
		return nil, status.Errorf(codes.Internal, "the stock shim answered with a %v on stream %d", answer.Type, answer.Stream)
	}
	if err := status.FromProto(response.Status).Err(); err != nil {
		return nil, err
	}
	return response.Payload, nil
}

func copyFrames(r io.Reader, w *writer) error {
	for {
		f, err := frame.Read(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := w.write(f); err != nil {
			return err
		}
	}
}

// writer keeps the frames of several writers apart.
type writer struct {
	mu sync.Mutex
	w  io.Writer
}

func (w *writer) write(f frame.Frame) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return frame.Write(w.w, f)
}
