//go:build node

package node

import (
	"context"

	nri "github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
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
	agent, hangUp, err := s.node.DialAgent(s.ctx, sandbox)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { _ = hangUp() })
	return agent
}
