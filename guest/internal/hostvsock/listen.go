// Package hostvsock listens on vsock ports for the host alone, and lists who else listens.
package hostvsock

import (
	"fmt"
	"log/slog"
	"net"

	"github.com/mdlayher/vsock"
)

// Listen listens on a vsock port. The listener yields connections of the host (CID 2) and
// closes all others at once: a container can dial the guest's own ports by loopback.
func Listen(port uint32, log *slog.Logger) (net.Listener, error) {
	l, err := vsock.Listen(port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return hostOnly{Listener: l, log: log}, nil
}

type hostOnly struct {
	net.Listener
	log *slog.Logger
}

// Accept implements net.Listener.
func (l hostOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if peer, ok := c.RemoteAddr().(*vsock.Addr); ok && peer.ContextID == vsock.Host {
			return c, nil
		}
		l.log.Warn("connection refused, the peer is not the host", "port", l.Addr().String(), "peer", c.RemoteAddr().String())
		c.Close()
	}
}
