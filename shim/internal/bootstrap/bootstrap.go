// Package bootstrap reads what a containerd shim answers to `start`, and gives
// it back with another address, in the form in which it came.
package bootstrap

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// maxVersion is the newest version of the task API that the relay knows.
const maxVersion = 3

// Answer is a shim's answer to `start`.
type Answer struct {
	// Socket is the path of the unix socket on which the shim serves ttrpc.
	Socket string

	rewrite func(address string) ([]byte, error)
}

// Parse reads an answer in each of the forms that containerd takes, told apart
// as its parseStartResponse in core/runtime/v2/shim.go does: a protobuf
// BootstrapResult (containerd 2.3), JSON (1.7), the address alone. An answer
// that does not name a unix socket with ttrpc in a version that we know is an
// errdefs.ErrFailedPrecondition.
func Parse(data []byte) (Answer, error) {
	result := new(bootapi.BootstrapResult)
	answer := Answer{}
	text := bytes.TrimSpace(data)
	var fields map[string]json.RawMessage
	switch {
	case len(text) == 0:
		return Answer{}, fmt.Errorf("the stock shim answered nothing to start: %w", errdefs.ErrFailedPrecondition)
	case proto.Unmarshal(data, result) == nil:
		answer.rewrite = func(address string) ([]byte, error) {
			result.Address = address
			return proto.Marshal(result)
		}
	case json.Unmarshal(text, result) == nil && result.Version >= 2 && json.Unmarshal(text, &fields) == nil:
		answer.rewrite = func(address string) ([]byte, error) {
			value, err := json.Marshal(address)
			if err != nil {
				return nil, err
			}
			fields["address"] = value
			return json.Marshal(fields)
		}
	default:
		result = &bootapi.BootstrapResult{Version: 2, Address: string(text), Protocol: "ttrpc"}
		answer.rewrite = func(address string) ([]byte, error) { return []byte(address), nil }
	}
	path, unix := strings.CutPrefix(result.Address, "unix://")
	switch {
	case !unix || !strings.HasPrefix(path, "/") || strings.ContainsAny(path, "\x00\n"):
		return Answer{}, fmt.Errorf("the stock shim's address %.200q is no unix socket: %w", result.Address, errdefs.ErrFailedPrecondition)
	case !strings.EqualFold(result.Protocol, "ttrpc"):
		return Answer{}, fmt.Errorf("the stock shim speaks %q, not ttrpc: %w", result.Protocol, errdefs.ErrFailedPrecondition)
	case result.Version < 2 || result.Version > maxVersion:
		return Answer{}, fmt.Errorf("the stock shim has version %d, not 2 to %d: %w", result.Version, maxVersion, errdefs.ErrFailedPrecondition)
	}
	answer.Socket = path
	return answer, nil
}

// At gives the answer as it is if the shim listens on another socket.
func (a Answer) At(socket string) ([]byte, error) { return a.rewrite("unix://" + socket) }
