package gate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/mountns"
	"github.com/sealvol/sealvol/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// journal is what happened, in order, across all fakes.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) all() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.lines)
}

func (j *journal) count(line string) int {
	n := 0
	for _, l := range j.all() {
		if l == line {
			n++
		}
	}
	return n
}

// fakeAgent answers every method with an empty message unless a test put a function there.
type fakeAgent struct {
	*journal
	mu     sync.Mutex
	answer map[string]func(ctx context.Context, req proto.Message) (proto.Message, error)
	seen   map[string]proto.Message // the last request of each method
}

func (a *fakeAgent) on(method string, f func(ctx context.Context, req proto.Message) (proto.Message, error)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answer[method] = f
}

func (a *fakeAgent) refuse(method string, err error) {
	a.on(method, func(context.Context, proto.Message) (proto.Message, error) { return nil, err })
}

func (a *fakeAgent) last(method string) proto.Message {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.seen[method]
}

func (a *fakeAgent) serve(t testing.TB, socket string) {
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	services := map[string]map[string]ttrpc.Method{}
	for _, m := range methods() {
		if m.in == nil {
			continue
		}
		if services[m.service] == nil {
			services[m.service] = map[string]ttrpc.Method{}
		}
		services[m.service][m.name] = func(ctx context.Context, unmarshal func(any) error) (any, error) {
			req := m.in.New().Interface()
			if err := unmarshal(req); err != nil {
				return nil, err
			}
			a.add("agent %s", m.name)
			a.mu.Lock()
			f := a.answer[m.name]
			a.seen[m.name] = req
			a.mu.Unlock()
			if f == nil {
				return m.out.New().Interface(), nil
			}
			resp, err := f(ctx, req)
			if resp == nil {
				resp = m.out.New().Interface()
			}
			return resp, err
		}
	}
	for name, methods := range services {
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: methods})
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(context.Background(), l)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

// fakeVolumes fails where a test says so.
type fakeVolumes struct {
	*journal
	mu      sync.Mutex
	fail    map[string]error // by "acquire data" and the like
	acquire func(ctx context.Context) error
	held    map[string][]string       // container → volumes
	disks   map[string]device.Address // of the volumes that were ever held
	shown   map[string]bool
}

func (v *fakeVolumes) failing(what string, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fail[what] = err
}

func (v *fakeVolumes) step(what string) error {
	v.add("%s", what)
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.fail[what]
}

func (v *fakeVolumes) Acquire(ctx context.Context, container, name string, _ policy.Volume, address device.Address) error {
	if err := v.step("acquire " + name); err != nil {
		return err
	}
	if v.acquire != nil {
		if err := v.acquire(ctx); err != nil {
			return err
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.held[container] = append(v.held[container], name)
	v.disks[name] = address
	return nil
}

func (v *fakeVolumes) Attach(_ context.Context, name string) (string, error) {
	if err := v.step("attach " + name); err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.shown[name] = true
	return "/run/sealvol/volumes/" + name, nil
}

func (v *fakeVolumes) Detach(_ context.Context, name string) error {
	err := v.step("detach " + name)
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.shown, name)
	return err
}

func (v *fakeVolumes) Release(_ context.Context, container string) error {
	err := v.step("release " + container)
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.held, container)
	return err
}

func (v *fakeVolumes) Disks() map[string]device.Address {
	v.mu.Lock()
	defer v.mu.Unlock()
	disks := map[string]device.Address{}
	for _, names := range v.held {
		for _, name := range names {
			disks[name] = v.disks[name]
		}
	}
	return disks
}

func (v *fakeVolumes) Number(context.Context, string) (uint32, uint32, error) { return 253, 7, nil }

func (v *fakeVolumes) Destroy(context.Context) error { return v.step("destroy") }

func (v *fakeVolumes) holds(container string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.held[container]) > 0
}

func (v *fakeVolumes) attached() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.shown) > 0
}

type fakeNamespaces struct {
	mu    sync.Mutex
	alive bool
	wrong error
	want  []mountns.Mount
	check func()
	blind map[string]bool // containers that see no volume
}

// hang puts a function into the way of Check.
func (n *fakeNamespaces) hang(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.check = f
}

func (n *fakeNamespaces) set(alive bool, wrong error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.alive, n.wrong = alive, wrong
}

func (n *fakeNamespaces) Alive(string) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.alive, nil
}

func (n *fakeNamespaces) Check(_ string, want []mountns.Mount) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.check != nil {
		n.check()
	}
	n.want = want
	return n.wrong
}

func (n *fakeNamespaces) Usage(container string, _ mountns.Mount) (space, inodes mountns.Usage, err error) {
	if n.blind[container] {
		return space, inodes, fmt.Errorf("no process of container %s has it: %w", container, errdefs.ErrNotFound)
	}
	return mountns.Usage{Total: 10, Used: 4, Available: 6}, mountns.Usage{Total: 3, Used: 1, Available: 2}, nil
}

// fakePolicy seals one pod: "app" and "beside" with the volume "data" at /data, and whatever else by name.
// Each storage of a container is the volume with its index.
type fakePolicy struct {
	text string
	deny map[string]error
}

func (p fakePolicy) Sealed() bool      { return true }
func (p fakePolicy) Digest() string    { return "digest of " + p.text }
func (p fakePolicy) AgentText() []byte { return []byte("for the agent: " + p.text) }
func (p fakePolicy) Containers() map[string]policy.Container {
	return map[string]policy.Container{"app": {RootFS: policy.HostRootFS}}
}

func (p fakePolicy) Volumes() map[string]policy.Volume {
	mount := func(path string, readOnly bool) policy.Volume {
		return policy.Volume{
			Options: []policy.Option{policy.NoSUID, policy.NoDev, policy.LazyTime},
			Mounts:  []policy.Mount{{Container: "app", Path: path, ReadOnly: readOnly}, {Container: "beside", Path: path, ReadOnly: readOnly}},
		}
	}
	return map[string]policy.Volume{"data": mount("/data", false), "more": mount("/more", true)}
}

func (p fakePolicy) Judges(string) bool { return true }

func (p fakePolicy) Decide(_ context.Context, rpc string, req proto.Message, state policy.State) (policy.Decision, error) {
	if err := p.deny[rpc]; err != nil {
		return policy.Decision{}, err
	}
	create, ok := req.(*agent.CreateContainerRequest)
	if !ok {
		return policy.Decision{}, nil
	}
	d := policy.Decision{Container: create.OCI.GetAnnotations()["name"]}
	for i := range create.Storages {
		d.Attachments = append(d.Attachments, policy.Attachment{Volume: []string{"data", "more"}[i%2], Mount: i, Storage: i, ReadOnly: i == 1})
	}
	return d, nil
}

type harness struct {
	*journal
	t       testing.TB
	gate    *Gate
	agent   *fakeAgent
	volumes *fakeVolumes
	ns      *fakeNamespaces
	socket  string // of the gate
	host    agent.AgentServiceService
	run     string
}

type option func(*Config)

// start makes a gate with fakes around it, and one client of the host.
func start(t testing.TB, options ...option) *harness {
	t.Helper()
	j := &journal{}
	dir := t.TempDir()
	h := &harness{
		journal: j, t: t, socket: filepath.Join(dir, "gate"), run: filepath.Join(dir, "run"),
		agent:   &fakeAgent{journal: j, answer: map[string]func(context.Context, proto.Message) (proto.Message, error){}, seen: map[string]proto.Message{}},
		volumes: &fakeVolumes{journal: j, fail: map[string]error{}, held: map[string][]string{}, disks: map[string]device.Address{}, shown: map[string]bool{}},
		ns:      &fakeNamespaces{},
	}
	agentSocket := filepath.Join(dir, "agent")
	h.agent.serve(t, agentSocket)
	cfg := Config{
		Log: slog.New(slog.DiscardHandler),
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", agentSocket)
		},
		Load: func(_ context.Context, text []byte) (Policy, error) {
			if string(text) == "bad" {
				return nil, fmt.Errorf("policy: bad text: %w", errdefs.ErrInvalidArgument)
			}
			return fakePolicy{text: string(text)}, nil
		},
		Default: fakePolicy{text: "default"}, Origin: Origin{Source: FromImage}, Volumes: h.volumes, Namespaces: h.ns,
		Disk: func(address device.Address) (device.Disk, error) {
			return device.Disk{}, fmt.Errorf("no disk at %v: %w", address, errdefs.ErrNotFound)
		},
		Inspect: func() error { return nil }, Run: h.run,
	}
	for _, o := range options {
		o(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g, err := New(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	h.gate = g
	l, err := net.Listen("unix", h.socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- g.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("serve: ", err)
		}
		if err := g.Close(); err != nil {
			t.Error("close: ", err)
		}
	})
	h.host, _ = h.connect()
	return h
}

func (h *harness) dial() net.Conn {
	h.t.Helper()
	c, err := net.Dial("unix", h.socket)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	return c
}

// connect makes another connection of the host.
func (h *harness) connect() (agent.AgentServiceService, *ttrpc.Client) {
	h.t.Helper()
	client := ttrpc.NewClient(h.dial())
	h.t.Cleanup(func() { client.Close() })
	return agent.NewAgentServiceClient(client), client
}

func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func (h *harness) sandbox() *harness {
	h.t.Helper()
	if _, err := h.host.CreateSandbox(soon(h.t), &agent.CreateSandboxRequest{SandboxId: "sandbox"}); err != nil {
		h.t.Fatal(err)
	}
	return h
}

// request is a CreateContainer with storages at the given PCI paths for the volumes.
func request(id, name string, sources ...string) *agent.CreateContainerRequest {
	req := &agent.CreateContainerRequest{
		ContainerId: id, ExecId: id, OCI: &agent.Spec{Annotations: map[string]string{"name": name}},
	}
	for i, s := range sources {
		point := fmt.Sprintf("/run/kata-containers/sandbox/storage/%d", i)
		req.Storages = append(req.Storages, &agent.Storage{Driver: "blk", Source: s, MountPoint: point})
		req.OCI.Mounts = append(req.OCI.Mounts, &agent.Mount{
			Destination: []string{"/data", "/more"}[i], Source: point, Type: "ext4", Options: []string{"rbind", "suid", "rshared"},
		})
	}
	return req
}

func (h *harness) create(id, name string, sources ...string) error {
	_, err := h.host.CreateContainer(soon(h.t), request(id, name, sources...))
	return err
}

func (h *harness) begin(id string) error {
	_, err := h.host.StartContainer(soon(h.t), &agent.StartContainerRequest{ContainerId: id})
	return err
}

func (h *harness) remove(id string) error {
	_, err := h.host.RemoveContainer(soon(h.t), &agent.RemoveContainerRequest{ContainerId: id})
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wants fails unless err has the code and its message has the words.
func wants(t testing.TB, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("got %v, want %v", err, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not mention %q", err, w)
		}
	}
	if strings.ContainsRune(err.Error(), '\n') {
		t.Errorf("%q is not one line", err)
	}
}

func (h *harness) wantJournal(want ...string) {
	h.t.Helper()
	if got := h.all(); !slices.Equal(got, want) {
		h.t.Errorf("happened:\n  %s\nwant:\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func (h *harness) forget() { h.mu.Lock(); defer h.mu.Unlock(); h.lines = nil }

var errBroken = errors.New("broken")
