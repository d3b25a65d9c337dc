package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sealvol/sealvol/guest/frame"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// handler handles the methods of the service "handled".
type handler map[string]Call

func (h handler) Handle(service, method string) Call {
	if service != "handled" {
		return nil
	}
	return h[method]
}

// pass forwards a call as it is.
func pass(_ context.Context, _ []byte, forward func() ([]byte, error)) ([]byte, error) {
	return forward()
}

// scene is a relay between a client and an upstream that the test plays.
type scene struct {
	*testing.T
	upstream net.Listener
	down     net.Conn
	ended    chan struct{} // one for each time that the upstream has closed a connection
	release  chan struct{} // when that may be seen
}

func newScene(t *testing.T, calls handler) *scene {
	t.Helper()
	dir := t.TempDir()
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	s := &scene{T: t, upstream: listen("up"), ended: make(chan struct{}, 10), release: make(chan struct{})}
	r := Relay{
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.upstream.Addr().String())
		},
		Handler: calls,
		Ending: func() {
			s.ended <- struct{}{}
			<-s.release
		},
		Log: slog.New(slog.DiscardHandler),
	}
	listener := listen("down")
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := r.Serve(ctx, listener); err != nil {
			t.Error(err)
		}
	})
	var err error
	if s.down, err = net.Dial("unix", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		listener.Close()
		s.down.Close()
		s.upstream.Close()
		cancel()
		s.releaseOnce()
		serving.Wait()
	})
	return s
}

func (s *scene) releaseOnce() {
	select {
	case <-s.release:
	default:
		close(s.release)
	}
}

// accept gives the relay's next connection to the upstream.
func (s *scene) accept() net.Conn {
	s.Helper()
	conn, err := s.upstream.Accept()
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { conn.Close() })
	s.limit(conn)
	return conn
}

func (s *scene) limit(conn net.Conn) {
	s.Helper()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		s.Fatal(err)
	}
}

func (s *scene) send(conn net.Conn, f frame.Frame) {
	s.Helper()
	if err := frame.Write(conn, f); err != nil {
		s.Fatal(err)
	}
}

func (s *scene) want(conn net.Conn, want frame.Frame) {
	s.Helper()
	s.limit(conn)
	got, err := frame.Read(conn)
	if err != nil {
		s.Fatal(err)
	}
	if got.Stream != want.Stream || got.Type != want.Type || got.Flags != want.Flags || !bytes.Equal(got.Payload, want.Payload) {
		s.Fatalf("got %v %+v, not %+v", got.Type, got, want)
	}
}

func request(t *testing.T, service, method, payload string) []byte {
	t.Helper()
	data, err := proto.Marshal(&ttrpc.Request{Service: service, Method: method, Payload: []byte(payload), TimeoutNano: 7})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func response(t *testing.T, payload string, err error) []byte {
	t.Helper()
	r := &ttrpc.Response{Payload: []byte(payload)}
	if err != nil {
		r = &ttrpc.Response{Status: status.Convert(err).Proto()}
	}
	data, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestFramesPassInOrderBothWays(t *testing.T) {
	s := newScene(t, nil)
	up := s.accept()
	frames := []frame.Frame{
		{Stream: 1, Type: frame.Request, Flags: 2, Payload: request(t, "a", "b", "c")},
		{Stream: 1, Type: frame.Data, Payload: []byte("x")},
		{Stream: 3, Type: frame.Request, Payload: []byte("this is no request")},
		{Stream: 1, Type: frame.Data, Flags: 5},
		{Stream: 5, Type: frame.Request, Payload: append(request(t, "later", "b", "c"), 0x7a, 1, 'x')}, // a field to come
		{Stream: 7, Type: frame.Request, Payload: request(t, "handled", "absent", strings.Repeat("x", 1<<20))},
		{Stream: 9, Type: frame.Response, Flags: 128},
	}
	for _, way := range [][2]net.Conn{{s.down, up}, {up, s.down}} {
		go func() {
			for _, f := range frames {
				if err := frame.Write(way[0], f); err != nil {
					t.Error(err)
				}
			}
		}()
		for _, f := range frames {
			s.want(way[1], f)
		}
	}
}

func TestAHandledCallHasAConnectionOfItsOwn(t *testing.T) {
	prepared := make(chan struct{})
	s := newScene(t, handler{"slow": func(_ context.Context, payload []byte, forward func() ([]byte, error)) ([]byte, error) {
		if string(payload) != "in" {
			return nil, fmt.Errorf("payload %q", payload)
		}
		<-prepared
		answer, err := forward()
		return append(answer, "!"...), err
	}})
	up := s.accept()
	slow := request(t, "handled", "slow", "in")
	s.send(s.down, frame.Frame{Stream: 1, Type: frame.Request, Payload: slow})
	other := frame.Frame{Stream: 3, Type: frame.Request, Payload: request(t, "x", "y", "z")}
	s.send(s.down, other)
	s.want(up, other) // It overtakes the first.
	s.send(up, frame.Frame{Stream: 3, Type: frame.Response, Payload: response(t, "z", nil)})
	s.want(s.down, frame.Frame{Stream: 3, Type: frame.Response, Payload: response(t, "z", nil)})
	close(prepared)
	own := s.accept()
	s.want(own, frame.Frame{Stream: 1, Type: frame.Request, Payload: slow})
	s.send(own, frame.Frame{Stream: 1, Type: frame.Response, Payload: response(t, "out", nil)})
	s.want(s.down, frame.Frame{Stream: 1, Type: frame.Response, Payload: response(t, "out!", nil)})
}

func TestErrorsOfAHandledCall(t *testing.T) {
	detailed, err := status.New(codes.ResourceExhausted, "full").WithDetails(wrapperspb.String("detail"))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		call   Call
		answer func(*testing.T) frame.Frame // of the upstream, if it is asked
		want   error
	}{
		"its own": {
			call: func(context.Context, []byte, func() ([]byte, error)) ([]byte, error) {
				return nil, fmt.Errorf("no: %w", errdefs.ErrInvalidArgument)
			},
			want: status.Error(codes.InvalidArgument, "no: invalid argument"),
		},
		"of the upstream": {
			call: pass,
			answer: func(t *testing.T) frame.Frame {
				return frame.Frame{Stream: 1, Type: frame.Response, Payload: response(t, "", detailed.Err())}
			},
			want: detailed.Err(),
		},
		"of an upstream that answers data": {
			call: pass,
			answer: func(t *testing.T) frame.Frame {
				return frame.Frame{Stream: 1, Type: frame.Data, Payload: response(t, "x", nil)}
			},
			want: status.Error(codes.Internal, "the stock shim answered with a data on stream 1"),
		},
		"of an upstream that answers another": {
			call: pass,
			answer: func(t *testing.T) frame.Frame {
				return frame.Frame{Stream: 3, Type: frame.Response, Payload: response(t, "x", nil)}
			},
			want: status.Error(codes.Internal, "the stock shim answered with a response on stream 3"),
		},
		"an answer that is too large": {
			call: func(context.Context, []byte, func() ([]byte, error)) ([]byte, error) {
				return make([]byte, frame.MaxPayload), nil
			},
			want: status.Error(codes.Internal, "the response cannot be sent: <nil>"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, handler{"call": test.call})
			s.accept()
			s.send(s.down, frame.Frame{Stream: 5, Type: frame.Request, Payload: request(t, "handled", "call", "")})
			if test.answer != nil {
				own := s.accept()
				if _, err := frame.Read(own); err != nil {
					t.Fatal(err)
				}
				s.send(own, test.answer(t))
			}
			s.want(s.down, frame.Frame{Stream: 5, Type: frame.Response, Payload: response(t, "", test.want)})
		})
	}
}

func TestAnUpstreamThatDiesInACallIsUnavailable(t *testing.T) {
	s := newScene(t, handler{"call": pass})
	s.accept()
	s.send(s.down, frame.Frame{Stream: 5, Type: frame.Request, Payload: request(t, "handled", "call", "")})
	own := s.accept()
	if _, err := frame.Read(own); err != nil {
		t.Fatal(err)
	}
	own.Close()
	s.limit(s.down)
	f, err := frame.Read(s.down)
	if err != nil {
		t.Fatal(err)
	}
	r := new(ttrpc.Response)
	if err := proto.Unmarshal(f.Payload, r); err != nil || codes.Code(r.Status.GetCode()) != codes.Unavailable {
		t.Errorf("got %v, %v", r, err)
	}
}

func TestACallOutlivesItsCaller(t *testing.T) {
	done := make(chan error, 1)
	s := newScene(t, handler{"call": func(ctx context.Context, _ []byte, forward func() ([]byte, error)) ([]byte, error) {
		_, err := forward()
		done <- errors.Join(err, ctx.Err())
		return nil, err
	}})
	up := s.accept()
	s.send(s.down, frame.Frame{Stream: 1, Type: frame.Request, Payload: request(t, "handled", "call", "")})
	own := s.accept()
	if _, err := frame.Read(own); err != nil {
		t.Fatal(err)
	}
	s.down.Close()
	if _, err := frame.Read(up); err == nil {
		t.Error("the upstream still has the caller's connection")
	}
	s.send(own, frame.Frame{Stream: 1, Type: frame.Response, Payload: response(t, "", nil)})
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestTheUpstreamsEndIsSeenWhenItMayBe(t *testing.T) {
	for name, send := range map[string]bool{"by a reader": false, "by a writer": true} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, nil)
			s.accept().Close()
			<-s.ended
			if send {
				s.send(s.down, frame.Frame{Stream: 1, Type: frame.Request, Payload: request(t, "a", "b", "c")})
				<-s.ended
			}
			if err := s.down.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			var timeout net.Error
			if _, err := frame.Read(s.down); !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Fatalf("it is seen already: %v", err)
			}
			s.releaseOnce()
			s.limit(s.down)
			if _, err := frame.Read(s.down); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("it is not seen: %v", err)
			}
		})
	}
}

func TestAFrameThatIsNoneEndsTheConnection(t *testing.T) {
	s := newScene(t, nil)
	up := s.accept()
	if _, err := s.down.Write(bytes.Repeat([]byte{0xff}, 10)); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{up, s.down} {
		s.limit(conn)
		if _, err := frame.Read(conn); err == nil {
			t.Error("the connection goes on")
		}
	}
}

func TestARealClientAndServerTalkThroughIt(t *testing.T) {
	s := newScene(t, handler{"Echo": pass})
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	echo := func(_ context.Context, decode func(any) error) (any, error) {
		in := new(wrapperspb.StringValue)
		return in, decode(in)
	}
	for _, service := range []string{"handled", "other"} {
		server.RegisterService(service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{"Echo": echo}})
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(context.Background(), s.upstream) })
	client := ttrpc.NewClient(s.down)
	var calls sync.WaitGroup
	for n := range 200 {
		calls.Go(func() {
			service, text, out := []string{"handled", "other"}[n%2], fmt.Sprint(n), new(wrapperspb.StringValue)
			if err := client.Call(t.Context(), service, "Echo", wrapperspb.String(text), out); err != nil || out.Value != text {
				t.Errorf("%s %d: %q, %v", service, n, out.Value, err)
			}
		})
	}
	calls.Wait()
	if err := client.Call(t.Context(), "handled", "Absent", new(emptypb.Empty), new(emptypb.Empty)); status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
	if err := errors.Join(client.Close(), server.Close()); err != nil {
		t.Error(err)
	}
	serving.Wait()
}
