package hostvsock

import (
	"encoding/binary"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// From linux/sock_diag.h, linux/vm_sockets_diag.h and net/tcp_states.h; a vsock socket that
// listens has TCP's state for it.
const (
	sockDiagByFamily = 20
	stateListen      = 10
	requestSize      = 24
	messageSize      = 32
)

// Listeners returns the vsock ports on which some process of the guest listens. It needs
// the kernel's vsock_diag, which it asks for by netlink.
func Listeners() ([]uint32, error) {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("list vsock listeners: %w", err)
	}
	defer c.Close()
	messages, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump},
		Data:   request(),
	})
	if err != nil {
		return nil, fmt.Errorf("list vsock listeners, does the kernel have vsock_diag? %w", err)
	}
	var ports []uint32
	for _, m := range messages {
		port, listens, err := parse(m.Data)
		if err != nil {
			return nil, fmt.Errorf("list vsock listeners: %w", err)
		}
		if listens {
			ports = append(ports, port)
		}
	}
	return ports, nil
}

// request is struct vsock_diag_req: family, protocol, padding, states, inode, show, cookie.
func request() []byte {
	b := make([]byte, requestSize)
	b[0] = unix.AF_VSOCK
	binary.NativeEndian.PutUint32(b[4:8], 1<<stateListen)
	return b
}

// parse reads struct vsock_diag_msg: family, type, state, shutdown, source CID and port,
// destination CID and port, inode, cookie.
func parse(b []byte) (port uint32, listens bool, err error) {
	if len(b) < messageSize || b[0] != unix.AF_VSOCK {
		return 0, false, fmt.Errorf("not a vsock_diag_msg: %x", b)
	}
	return binary.NativeEndian.Uint32(b[8:12]), b[2] == stateListen, nil
}
