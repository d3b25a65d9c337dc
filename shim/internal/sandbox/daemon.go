package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/bootstrap"
	"github.com/sealvol/sealvol/shim/internal/config"
	"github.com/sealvol/sealvol/shim/internal/process"
	"github.com/sealvol/sealvol/shim/internal/relay"
)

// holdTime bounds how long containerd is kept from seeing the stock shim's
// end while the rest of the sandbox ends. Its `delete` has but five seconds,
// and without its success containerd leaves the bundle behind.
const holdTime = 10 * time.Second

// daemon fronts the stock shim of one sandbox.
type daemon struct {
	dir
	host Host
	call Call

	// stockEnded is closed when the stock shim has ended, released when
	// containerd may see that.
	stockEnded, released chan struct{}
	// over is closed when `delete` was called for the last container, or the
	// sandbox's own was killed and the stock shim could not do it.
	over    chan struct{}
	endOnce sync.Once
	// calls are those that have a part in what mu guards.
	calls sync.WaitGroup

	mu      sync.Mutex
	ending  bool
	state   state
	volumes volumes
}

// Daemon is the program in [RoleDaemon], started in the bundle's folder. It
// returns when the sandbox has ended and nothing of it is left.
func Daemon(c config.Config, h Host, call Call) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	unix.CloseOnExec(lockFD)
	lock := os.NewFile(lockFD, "lock")
	defer lock.Close()
	p := openPost()

	err := func() error {
		bundle, err := os.Getwd()
		if err != nil {
			return err
		}
		dir, err := linked(bundle)
		if err != nil {
			return err
		}
		if err := os.Chdir("/"); err != nil {
			return err
		}
		h.Log = h.Log.With("namespace", dir.namespace, "sandbox", dir.sandbox)
		d := &daemon{
			dir: dir, host: h, call: call,
			stockEnded: make(chan struct{}), released: make(chan struct{}), over: make(chan struct{}),
			state:   state{Version: stateVersion, StockShim: c.StockShim, Containers: map[string]string{}},
			volumes: volumes{sandbox: dir.sandbox, records: h.Records, open: dir.opener(h.Open), byName: map[string]*volume{}, kept: map[hotplug.Backing]Device{}},
		}
		if err := d.run(ctx, p, bundle); err != nil {
			return err
		}
		h.Log.Info("nothing of the sandbox is left")
		return nil
	}()
	if err != nil {
		h.Log.Error("the sandbox ended", "error", err)
		// For a `start` that still waits.
		p.send(letter{Error: err.Error()})
	}
	return err
}

func (d *daemon) run(ctx context.Context, p *post, bundle string) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	acknowledged := make(chan struct{})
	go func() { // It ends with the `start` at the other side.
		if p.acknowledged() {
			close(acknowledged)
		} else {
			cancel(errors.New("containerd gave up on start"))
		}
	}()
	reaping, stopReaping := context.WithCancel(context.WithoutCancel(ctx))
	serving, disconnect := context.WithCancel(context.WithoutCancel(ctx))
	var listener net.Listener
	var reaper, server sync.WaitGroup
	defer func() {
		if listener != nil {
			listener.Close()
		}
		hold := time.AfterFunc(holdTime, disconnect)
		// From here on the stock shim's `delete` is waited for by those who run it.
		stopReaping()
		reaper.Wait()
		err = errors.Join(err, d.down(serving))
		hold.Stop()
		disconnect()
		close(d.released)
		server.Wait()
	}()

	answer, err := d.startStock(ctx, bundle)
	if err != nil {
		return err
	}
	go func() { // It ends in down at the latest.
		if err := process.Wait(d.state.Stock.Pid); err != nil {
			d.host.Log.Error("wait for the stock shim", "error", err)
		}
		close(d.stockEnded)
	}()
	reaper.Go(func() { d.reap(reaping) })
	if listener, err = d.listen(); err != nil {
		return err
	}
	r := relay.Relay{Dial: d.dial, Handler: d, Ending: d.holdEnd, Log: d.host.Log}
	server.Go(func() {
		if err := r.Serve(serving, listener); err != nil {
			d.host.Log.Error("containerd's connections", "error", err)
		}
	})
	if err := p.send(letter{Stdout: answer}); err != nil {
		return fmt.Errorf("containerd gave up on start: %w", err)
	}
	select {
	case <-acknowledged:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d.host.Log.Info("the sandbox has started", "stock shim", d.state.Stock.Pid)
	select {
	case <-d.stockEnded:
		d.host.Log.Info("the stock shim has ended")
	case <-d.over:
		d.host.Log.Info("the last container was deleted, or the sandbox killed")
	case <-ctx.Done():
		d.host.Log.Info("the shim was told to end")
	}
	return nil
}

// startStock starts the stock shim and gives its answer, with our address in it.
func (d *daemon) startStock(ctx context.Context, bundle string) ([]byte, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become a subreaper: %w", err)
	}
	if err := d.write(d.state); err != nil {
		return nil, err
	}
	start := exec.CommandContext(ctx, d.state.StockShim, d.call.args()...)
	start.Dir = bundle
	start.Stdin = os.Stdin
	output, err := run(start)
	if err != nil {
		return nil, err
	}
	stock, err := d.findStock(bundle)
	if err != nil {
		return nil, err
	}
	answer, err := bootstrap.Parse(output)
	if err != nil {
		return nil, err
	}
	d.state.Stock, d.state.Socket = &stock, answer.Socket
	if d.state.Answer, err = answer.At(d.socket()); err != nil {
		return nil, err
	}
	return d.state.Answer, d.write(d.state)
}

// findStock finds the process that the stock shim's `start` left behind: it
// has become our child. Should there be more than one, shim.pid in the bundle
// says which one it is.
func (d *daemon) findStock(bundle string) (process.ID, error) {
	children, err := process.Children()
	if err != nil {
		return process.ID{}, err
	}
	if len(children) == 1 {
		return children[0], nil
	}
	if data, err := os.ReadFile(filepath.Join(bundle, "shim.pid")); err == nil {
		for _, child := range children {
			if strconv.Itoa(child.Pid) == strings.TrimSpace(string(data)) {
				return child, nil
			}
		}
	}
	return process.ID{}, fmt.Errorf("the stock shim's start left %d processes, none of them the one of shim.pid: %w", len(children), errdefs.ErrFailedPrecondition)
}

// reap collects the sandbox's processes that have ended, but for the stock
// shim, until the context ends.
func (d *daemon) reap(ctx context.Context) {
	stock := d.state.Stock.Pid
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	defer signal.Stop(ended)
	for {
		if err := process.Reap(func(pid int) bool { return pid == stock }); err != nil {
			d.host.Log.Error("collect processes", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ended:
		}
	}
}

func (d *daemon) listen() (net.Listener, error) {
	listener, err := net.Listen("unix", d.socket())
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(d.socket(), 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

func (d *daemon) dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", d.state.Socket)
}

// holdEnd keeps containerd from seeing that the stock shim has ended.
func (d *daemon) holdEnd() {
	select {
	case <-d.stockEnded:
		<-d.released
	case <-time.After(time.Second): // It closed one connection, but lives on.
	}
}

// down ends the sandbox and removes what is left of it.
func (d *daemon) down(ctx context.Context) error {
	d.mu.Lock()
	d.ending = true
	s := d.state
	s.Containers = maps.Clone(s.Containers)
	d.mu.Unlock()
	ctx = context.WithoutCancel(ctx)
	if _, err := d.end(ctx, d.host, d.call, s); err != nil {
		// What may still be in use stays for a `delete` to come.
		return err
	}
	// With the stock shim gone they come to an end.
	d.calls.Wait()
	if err := errors.Join(d.volumes.close(), d.clear(d.host, s)); err != nil {
		return err
	}
	return d.remove()
}
