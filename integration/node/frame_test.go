//go:build node

package node

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/mdlayher/vsock"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/frame"
)

// answerLimit is how long the gate may take for an answer, on a machine without KVM that has other work.
const answerLimit = 2 * time.Minute

// The bytes of a permitted request, cut off and with single bits turned, on the vsock itself. Whatever they say then, the gate gives no
// answer but a refusal, and answers the next who calls.
func (p *player) damagedFrames(t *testing.T) {
	p = p.in(t)
	j := p.judge()
	cid, port, err := agentAddress(p.ctx, p.sandbox)
	if err != nil {
		t.Fatal(err)
	}
	dial := func() *vsock.Conn {
		conn, err := vsock.Dial(cid, port, nil)
		if err != nil {
			t.Fatalf("the gate must take connections: %v", err)
		}
		if err := conn.SetDeadline(time.Now().Add(answerLimit)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	message, err := proto.Marshal(p.request("third", absent[:]...))
	if err != nil {
		t.Fatal(err)
	}
	request, err := proto.Marshal(&ttrpc.Request{Service: "grpc.AgentService", Method: "CreateContainer", Payload: message, TimeoutNano: int64(answerLimit)})
	if err != nil {
		t.Fatal(err)
	}
	var whole bytes.Buffer
	if err := frame.Write(&whole, frame.Frame{Stream: 1, Type: frame.Request, Payload: request}); err != nil {
		t.Fatal(err)
	}
	for n := 1; n < whole.Len(); n += 1 + whole.Len()/16 {
		wantNoConsent(t, dial(), whole.Bytes()[:n])
	}
	// Bits of the length, the stream's lowest, which makes it a server's, of the type and of the flags.
	for _, bit := range []int{0, 7, 8, 15, 16, 23, 24, 27, 56, 64, 65, 71, 72, 79} {
		turned := bytes.Clone(whole.Bytes())
		turned[bit/8] ^= 1 << (bit % 8)
		wantNoConsent(t, dial(), turned)
	}

	// A whole frame with a damaged message is refused on a connection that goes on.
	conn := dial()
	defer conn.Close()
	stream, refused := uint32(1), map[codes.Code]int{}
	for i := 0; i < len(request); i += 1 + len(request)/40 {
		turned := slices.Clone(request)
		turned[i] ^= 1 << (i % 8)
		if p.permitted(j, turned) {
			continue
		}
		if err := frame.Write(conn, frame.Frame{Stream: stream, Type: frame.Request, Payload: turned}); err != nil {
			t.Fatal(err)
		}
		answer, err := frame.Read(conn)
		if err != nil {
			t.Fatalf("bit %d of byte %d turned: no answer: %v", i%8, i, err)
		}
		resp := &ttrpc.Response{}
		if err := frame.Unmarshal(answer.Payload, resp, nil); err != nil {
			t.Fatal(err)
		}
		code := codes.Code(resp.Status.GetCode())
		if answer.Stream != stream || !slices.Contains([]codes.Code{codes.InvalidArgument, codes.PermissionDenied, codes.Unimplemented, codes.DeadlineExceeded}, code) {
			t.Errorf("bit %d of byte %d turned: the gate must refuse it, and says %v", i%8, i, resp.Status)
		}
		refused[code]++
		stream += 2
	}
	t.Logf("refused: %v", refused)
}

// permitted says whether a gate that makes no mistake would pass a request on.
func (p *player) permitted(j judge, payload []byte) bool {
	r, err := frame.ParseRequest(payload)
	if err != nil || r.Method != "CreateContainer" {
		return false
	}
	req := &kata.CreateContainerRequest{}
	return frame.Unmarshal(r.Payload, req, nil) == nil && p.decide(j, req) == nil
}

// wantNoConsent sends bytes and nothing more: the connection ends, with a refusal before that or without.
func wantNoConsent(t *testing.T, conn *vsock.Conn, bytes []byte) {
	t.Helper()
	defer conn.Close()
	if _, err := conn.Write(bytes); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for {
		answer, err := frame.Read(conn)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the connection must end, after %d bytes that are no request", len(bytes))
		}
		if err != nil {
			return
		}
		resp := &ttrpc.Response{}
		if err := frame.Unmarshal(answer.Payload, resp, nil); err != nil || resp.Status.GetCode() == int32(codes.OK) {
			t.Errorf("the gate must refuse %d bytes that are no request, and says %v, %v", len(bytes), resp, err)
		}
	}
}
