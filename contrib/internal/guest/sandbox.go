package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/mdlayher/vsock"
)

// Sandbox is a pod sandbox that Kata's shim serves on this node.
type Sandbox struct {
	ID     string
	socket string // Kata's management socket
}

// Find finds the sandbox whose id starts with prefix. Without one the error is an errdefs.ErrNotFound.
func (n Node) Find(prefix string) (Sandbox, error) {
	if !regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,128}$`).MatchString(prefix) || strings.Trim(prefix, ".") == "" {
		return Sandbox{}, fmt.Errorf("%q is no sandbox id; `crictl pods -q` lists them", prefix)
	}
	var found []Sandbox
	for _, root := range n.Roots {
		entries, err := os.ReadDir(root)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Sandbox{}, fmt.Errorf("look for sandboxes: %w", err)
		}
		for _, e := range entries {
			s := Sandbox{e.Name(), filepath.Join(root, e.Name(), "shim-monitor.sock")}
			fi, err := os.Stat(s.socket)
			if err != nil || fi.Mode().Type() != fs.ModeSocket {
				continue
			}
			if s.ID == prefix {
				return s, nil
			}
			if strings.HasPrefix(s.ID, prefix) {
				found = append(found, s)
			}
		}
	}
	switch len(found) {
	case 0:
		return Sandbox{}, fmt.Errorf("no running Kata sandbox %q below %s: `crictl pods` shows which pods run, and their ids: %w", prefix, strings.Join(n.Roots, ", "), errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	var ids []string
	for _, s := range found {
		ids = append(ids, s.ID)
	}
	slices.Sort(ids)
	return Sandbox{}, fmt.Errorf("%q is the start of %d sandboxes, give more of the id: %s", prefix, len(ids), strings.Join(ids, ", "))
}

// agentURL is what Kata answers for a hypervisor with vhost-vsock.
var agentURL = regexp.MustCompile(`^vsock://([0-9]{1,10}):[0-9]{1,10}$`)

// CID asks Kata's shim where the guest is.
func (s Sandbox) CID(ctx context.Context) (uint32, error) {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://shim/agent-url", nil)
	if err != nil {
		return 0, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return 0, fmt.Errorf("no answer from Kata's shim on %s: %w: does the pod still run?", s.socket, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 256))
	if err != nil {
		return 0, fmt.Errorf("read the agent's address from Kata's shim: %w", err)
	}
	m := agentURL.FindSubmatch(body)
	if resp.StatusCode != http.StatusOK || m == nil {
		return 0, fmt.Errorf("the shim of Kata says that the agent is at %q (status %d), not vsock://CID:PORT: only hypervisors with vhost-vsock are supported, otherwise give --cid",
			body, resp.StatusCode)
	}
	cid, err := strconv.ParseUint(string(m[1]), 10, 32)
	if err != nil || cid <= vsock.Host {
		return 0, fmt.Errorf("the shim of Kata names CID %s, which is no guest's", m[1])
	}
	return uint32(cid), nil
}

// dialVsock connects to a guest. The kernel itself gives up after two seconds
// when nobody has the CID.
func dialVsock(_ context.Context, cid, port uint32) (net.Conn, error) {
	return vsock.Dial(cid, port, nil)
}
