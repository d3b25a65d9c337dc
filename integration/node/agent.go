package node

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"

	"github.com/containerd/ttrpc"
	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/mdlayher/vsock"
)

// DialAgent connects to what a sandbox's guest has on the agent's port, until hangUp is called.
func (n *Node) DialAgent(ctx context.Context, sandbox string) (agent kata.AgentServiceService, hangUp func() error, err error) {
	cid, port, err := agentAddress(ctx, sandbox)
	if err != nil {
		return nil, nil, err
	}
	conn, err := vsock.Dial(cid, port, nil)
	if err != nil {
		return nil, nil, err
	}
	client := ttrpc.NewClient(conn)
	return kata.NewAgentServiceClient(client), client.Close, nil
}

// agentAddress asks Kata's management socket where a sandbox listens.
func agentAddress(ctx context.Context, sandbox string) (cid, port uint32, err error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join("/run/vc/sbs", sandbox, "shim-monitor.sock"))
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://shim/agent-url", nil)
	if err != nil {
		return 0, 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 256))
	if err != nil {
		return 0, 0, err
	}
	if _, err := fmt.Sscanf(strings.TrimSpace(string(text)), "vsock://%d:%d", &cid, &port); err != nil {
		return 0, 0, fmt.Errorf("agent-url %q: %w", text, err)
	}
	return cid, port, nil
}
