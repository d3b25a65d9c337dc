// Package gate stands between the host and the Kata agent. The host speaks the agent's ttrpc
// protocol to it as if it were the agent; each request is decoded, judged and, if it passes,
// sent on re-encoded, so that the agent parses what was judged and nothing else.
//
// Everything is denied that the table of methods does not pass. What the gate judges itself
// is protocol: who may call, in which order, how often, with which ids, through which paths.
// What a pod may run and which volumes its containers have is judged by the pod's policy, which
// also knows each method that passes by its name; only what ends containers and sandbox is not
// asked of it.
//
// State belongs to the sandbox, never to a connection: the host may drop a connection at
// any moment and come back on another, and finds the sandbox where it was.
package gate

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/mountns"
	"github.com/sealvol/sealvol/policy"
)

// Port is the vsock port on which Kata expects its agent.
const Port = 1024

// Policy is what the gate needs of a loaded policy.
type Policy interface {
	Sealed() bool
	Digest() string
	AgentText() []byte
	Containers() map[string]policy.Container
	Volumes() map[string]policy.Volume
	Judges(rpc string) bool
	Decide(ctx context.Context, rpc string, req proto.Message, state policy.State) (policy.Decision, error)
}

// Volumes are the sealed volumes of the sandbox.
type Volumes interface {
	// Acquire makes a volume ready for a container and undoes what it did if it fails.
	Acquire(ctx context.Context, container, name string, spec policy.Volume, address device.Address) error
	// Attach makes the volume visible at the directory that it returns, until Detach.
	Attach(ctx context.Context, name string) (string, error)
	Detach(ctx context.Context, name string) error
	// Release drops what the container has acquired; the last container's closes the volume.
	Release(ctx context.Context, container string) error
	// Disks are the addresses of the disks that volumes have at present, by volume.
	Disks() map[string]device.Address
	// Number is the device number of the volume's file system.
	Number(ctx context.Context, name string) (major, minor uint32, err error)
	// Destroy closes everything and overwrites the keys.
	Destroy(ctx context.Context) error
}

// Namespaces looks at the containers' processes.
type Namespaces interface {
	// Alive reports whether the container has a process.
	Alive(container string) (bool, error)
	// Check is errdefs.ErrPermissionDenied unless each process of the container lives in a
	// mount namespace of its own and sees each of the mounts, on top, at its path.
	Check(container string, want []mountns.Mount) error
	// Usage is the space and the inodes of a mount that the container sees.
	Usage(container string, at mountns.Mount) (space, inodes mountns.Usage, err error)
}

// Config is what a Gate works with. All fields are needed.
type Config struct {
	Log *slog.Logger
	// Dial opens a connection to the agent.
	Dial func(ctx context.Context) (net.Conn, error)
	// Load reads the policy's text that the host brings.
	Load func(ctx context.Context, text []byte) (Policy, error)
	// Default is in force as long as the host has brought none.
	Default    Policy
	Origin     Origin // of Default
	Volumes    Volumes
	Namespaces Namespaces
	// Disk looks at the disk at an address. It is errdefs.ErrNotFound when there is none yet, and errdefs.ErrFailedPrecondition when what
	// is there is not one plain disk.
	Disk func(address device.Address) (device.Disk, error)
	// Inspect finds what would open the guest beside the gate. What it returns refuses
	// every request, so it must be fit for the host's eyes.
	Inspect func() error
	// Run is the directory of the agent's own files, below which the share is.
	Run string
}

// Limits on what the host may have under way. They bound memory, not what Kata does: it
// holds some four blocked calls for each process.
const (
	maxConnections = 32
	maxRequests    = 1024 // for each connection
	maxJudged      = 1024 // that the gate judges; they outlive their connection
)

// The bounds of what has no deadline of the host's.
const (
	createTimeout  = 60 * time.Second // CreateContainer, when the host gave none
	removeTimeout  = 2 * time.Minute
	settleTimeout  = undoTimeout + 10*time.Second
	destroyTimeout = 30 * time.Second
	undoTimeout    = 20 * time.Second
	maxUndoReserve = 10 * time.Second
)

type phase int

const (
	fresh   phase = iota // SetPolicy may come, once
	created              // CreateSandbox has reached the agent
	ended                // DestroySandbox has come
)

// Gate is the state of the one sandbox that lives in this guest.
type Gate struct {
	Config
	methods map[string]method
	agent   *ttrpc.Client // for what changes state; host connections have clients of their own
	inspect func() error  // Inspect, once

	// work ends with DestroySandbox. It is the parent of all that changes the sandbox,
	// whose connection may go away meanwhile.
	work context.Context
	stop context.CancelFunc
	ops  sync.WaitGroup // requests that change the sandbox; mu guards Add
	ends sync.WaitGroup // DestroySandbox, which waits for those, but not for ever

	settle time.Duration // how long it waits

	// paths is rule 7's lock: held whole while a volume is attached, and in part by
	// every other request that has the agent touch a path or a container.
	paths *semaphore.Weighted

	mu          sync.Mutex
	phase       phase
	judging     int // requests
	policy      Policy
	policySent  bool  // a SetPolicy has been forwarded
	policyTaken bool  // and the agent accepted it
	shared      bool  // the sandbox has a file system that the host serves
	poison      error // why nothing but the end of containers and sandbox is done any more
	containers  map[string]*container
	storages    map[string]string // volumes, by the mount point that Kata chose for them
}

// container is one container of the sandbox. An id that was used once stays.
type container struct {
	id, name string
	sandbox  bool
	busy     chan struct{}  // one place: whoever is in it may change the state
	state    containerState // also guarded by Gate.mu
}

type containerState int

const (
	creating containerState = iota
	ready                   // the agent has created it
	started
	gone // the agent confirmed that it is no more, or never made it
)

func (s containerState) String() string {
	return [...]string{"being created", "created", "started", "removed"}[s]
}

const wholePath = 1 << 30

// New connects to the agent. The caller must Close the gate.
func New(ctx context.Context, cfg Config) (*Gate, error) {
	conn, err := cfg.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to the agent: %w", err)
	}
	g := &Gate{
		Config:     cfg,
		methods:    methods(),
		agent:      ttrpc.NewClient(conn),
		inspect:    sync.OnceValue(func() error { return cmp.Or(cfg.Origin.Refused, cfg.Inspect()) }),
		paths:      semaphore.NewWeighted(wholePath),
		settle:     settleTimeout,
		policy:     cfg.Default,
		containers: map[string]*container{},
		storages:   map[string]string{},
	}
	g.work, g.stop = context.WithCancel(context.WithoutCancel(ctx))
	return g, nil
}

// Close ends what is under way and lets go of the agent. The volumes stay as they are.
func (g *Gate) Close() error {
	g.mu.Lock()
	g.phase = ended
	g.mu.Unlock()
	g.stop()
	g.ops.Wait()
	g.ends.Wait()
	return g.agent.Close()
}

// Serve answers the connections of l until ctx ends or l fails, and then closes them.
// l must yield connections of the host alone.
func (g *Gate) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	places := make(chan struct{}, maxConnections)
	for {
		nc, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept a connection of the host: %w", err)
		}
		select {
		case places <- struct{}{}:
		default:
			g.Log.Warn("connection refused, there are too many", "limit", maxConnections)
			nc.Close()
			continue
		}
		conns.Go(func() {
			defer func() { <-places }()
			if err := g.serve(ctx, nc); err != nil {
				g.Log.Warn("connection ended", "error", err)
			}
		})
	}
}

// admit says whether a request passes at all now. If it does, the caller has to call done
// after it: those that the gate judges are waited for at the sandbox's end.
func (g *Gate) admit(m method) (done func(), err error) {
	if err := g.inspect(); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.phase == ended {
		return nil, fmt.Errorf("the sandbox has ended, nothing is accepted any more: %w", errdefs.ErrFailedPrecondition)
	}
	if g.poison != nil && m.verdict == judged && !m.end {
		return nil, fmt.Errorf("the sandbox can only be removed: %w", g.poison)
	}
	switch {
	case m.last:
		g.phase = ended
		g.ends.Add(1)
		return g.ends.Done, nil
	case m.verdict == judged:
		if g.judging == maxJudged {
			return nil, fmt.Errorf("more than %d requests that change the sandbox at once: %w", maxJudged, errdefs.ErrResourceExhausted)
		}
		g.judging++
		g.ops.Add(1)
		return g.judgedOne, nil
	default:
		return func() {}, nil
	}
}

func (g *Gate) judgedOne() {
	g.mu.Lock()
	g.judging--
	g.mu.Unlock()
	g.ops.Done()
}

// poisoned stops everything that changes the sandbox but its end and that of its containers:
// what the agent holds is not known any more.
func (g *Gate) poisoned(reason string, args ...any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.Log.Error("sandbox poisoned: "+reason, args...)
	if g.poison == nil {
		g.poison = fmt.Errorf("%s: %w", reason, errdefs.ErrFailedPrecondition)
	}
}

// lock takes the container for the caller alone, until the returned function is called.
func (c *container) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case c.busy <- struct{}{}:
		return func() { <-c.busy }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("container %s is busy: %w", c.id, ctx.Err())
	}
}

// running returns the policy and what it has to know to judge a request that needs a sandbox.
// It is an error when there is none, which may also have become so since the request was admitted.
func (g *Gate) running() (Policy, policy.State, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.phase != created {
		return nil, policy.State{}, fmt.Errorf("there is no sandbox, CreateSandbox comes first: %w", errdefs.ErrFailedPrecondition)
	}
	if g.poison != nil {
		return nil, policy.State{}, fmt.Errorf("the sandbox can only be removed: %w", g.poison)
	}
	return g.policy, g.stateLocked(), nil
}

// stateLocked is what the policy has to know, but for devices: the containers that live or may
// live, the volumes that have a disk, and where the host believes them mounted.
func (g *Gate) stateLocked() policy.State {
	state := policy.State{
		Containers: make(map[string]string, len(g.containers)),
		Volumes:    map[string]string{},
		Paths:      make(map[string]string, len(g.storages)),
		Shared:     g.shared,
	}
	for id, c := range g.containers {
		if c.state != gone {
			state.Containers[id] = c.name
		}
	}
	for volume, address := range g.Volumes.Disks() {
		state.Volumes[volume] = address.Source()
	}
	maps.Copy(state.Paths, g.storages)
	return state
}

// allow asks the policy in force about a request. What only passes, each piece of a container's output say, costs no more than a look-up.
func (g *Gate) allow(ctx context.Context, name string, req proto.Message) error {
	g.mu.Lock()
	if !g.policy.Judges(name) {
		g.mu.Unlock()
		return nil
	}
	pol, state := g.policy, g.stateLocked()
	g.mu.Unlock()
	_, err := pol.Decide(ctx, name, req, state)
	return err
}

// find returns the container. An id that never was is errdefs.ErrNotFound.
func (g *Gate) find(id string) (*container, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c, ok := g.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %.64q was never created: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// inState is an error unless the container is in one of the states.
func (g *Gate) inState(c *container, states ...containerState) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !slices.Contains(states, c.state) {
		return fmt.Errorf("container %s is %v: %w", c.id, c.state, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// enter changes the state of a container that the caller has locked.
func (g *Gate) enter(c *container, state containerState) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c.state = state
}

// share takes part of the path lock: nothing is attached until release is called.
func (g *Gate) share(ctx context.Context) (release func(), err error) { return g.take(ctx, 1) }

// own takes the path lock whole: no other request touches a path until release is called.
func (g *Gate) own(ctx context.Context) (release func(), err error) { return g.take(ctx, wholePath) }

func (g *Gate) take(ctx context.Context, n int64) (func(), error) {
	if err := g.paths.Acquire(ctx, n); err != nil {
		return nil, fmt.Errorf("wait for requests under way: %w", err)
	}
	return func() { g.paths.Release(n) }, nil
}
