//go:build node

package node

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"

	nri "github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/mdlayher/vsock"
)

// hostilePlugin is a second NRI plugin: what a host could do to a container's
// spec after our plugin has seen it.
type hostilePlugin struct {
	change func(*nri.ContainerAdjustment)
}

func (p hostilePlugin) CreateContainer(context.Context, *nri.PodSandbox, *nri.Container) (*nri.ContainerAdjustment, []*nri.ContainerUpdate, error) {
	a := &nri.ContainerAdjustment{}
	p.change(a)
	return a, nil, nil
}

func startHostilePlugin(ctx context.Context, socket string, change func(*nri.ContainerAdjustment)) (stop func(), err error) {
	s, err := stub.New(hostilePlugin{change}, stub.WithPluginName("hostile"), stub.WithPluginIdx("99"), stub.WithSocketPath(socket))
	if err != nil {
		return nil, err
	}
	if err := s.Start(ctx); err != nil {
		return nil, err
	}
	return s.Stop, nil
}

// dialGate connects to a sandbox's gate as the host's runtime does, and as
// any program of the host can.
func (s *scene) dialGate(sandbox string) kata.AgentServiceService {
	s.Helper()
	cid, err := sandboxCID(s.ctx, sandbox)
	if err != nil {
		s.Fatal(err)
	}
	conn, err := vsock.Dial(cid, 1024, nil)
	if err != nil {
		s.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	s.Cleanup(func() { _ = client.Close() })
	return kata.NewAgentServiceClient(client)
}

// sandboxCID asks Kata's management socket where a sandbox listens.
func sandboxCID(ctx context.Context, sandbox string) (uint32, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join("/run/vc/sbs", sandbox, "shim-monitor.sock"))
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://shim/agent-url", nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 256))
	if err != nil {
		return 0, err
	}
	var cid, port uint32
	if _, err := fmt.Sscanf(strings.TrimSpace(string(text)), "vsock://%d:%d", &cid, &port); err != nil {
		return 0, fmt.Errorf("agent-url %q: %w", text, err)
	}
	return cid, nil
}
