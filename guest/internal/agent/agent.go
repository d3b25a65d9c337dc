// Package agent runs the Kata agent as a child of the guest service.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
)

// Config says how the agent is started.
type Config struct {
	// Path of the agent's binary.
	Path string
	// ConfigFile of the image. With one the agent does not read the kernel command line,
	// which the host writes.
	ConfigFile string
	// Socket is the unix socket that the configuration file makes the agent listen on.
	Socket string
	// Output gets what the agent prints.
	Output io.Writer
}

// Agent is a running agent.
type Agent struct {
	socket string
	cmd    *exec.Cmd
	done   chan struct{} // closed after the agent ended
	err    error         // why, valid after done
}

// Start starts the agent in our mount namespace, with an environment of PATH alone, and
// waits until its socket answers. ctx bounds the wait only.
func Start(ctx context.Context, cfg Config) (*Agent, error) {
	dir := filepath.Dir(cfg.Socket)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of the agent's socket: %w", err)
	}
	if err := os.Remove(cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("old socket of the agent: %w", err)
	}
	cmd := exec.Command(cfg.Path, "--config", cfg.ConfigFile)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = cfg.Output, cfg.Output
	// Output may be inherited by what the agent leaves behind; do not wait for those.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the agent: %w", err)
	}
	a := &Agent{socket: cfg.Socket, cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(a.done)
		a.err = cmd.Wait()
	}()
	if err := a.ready(ctx); err != nil {
		a.Stop()
		return nil, err
	}
	return a, nil
}

// ready waits for the agent to accept a connection.
func (a *Agent) ready(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := a.Dial(ctx)
		if err == nil {
			return c.Close()
		}
		select {
		case <-tick.C:
		case <-a.done:
			return fmt.Errorf("the agent ended before it answered: %w", a.Err())
		case <-ctx.Done():
			return fmt.Errorf("the agent does not answer: %v: %w", err, errdefs.ErrUnavailable)
		}
	}
}

// Dial connects to the agent's socket.
func (a *Agent) Dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", a.socket)
}

// Done is closed when the agent has ended, which it is not expected to do.
func (a *Agent) Done() <-chan struct{} { return a.done }

// Err says how the agent ended. It may be called after Done is closed.
func (a *Agent) Err() error {
	if a.err != nil {
		return fmt.Errorf("agent ended: %w", a.err)
	}
	return errors.New("agent ended")
}

// Stop kills the agent and waits for its end.
func (a *Agent) Stop() {
	a.cmd.Process.Kill()
	<-a.done
}
