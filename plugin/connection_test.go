package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/net/multiplex"
	validator "github.com/containerd/nri/plugins/default-validator/builtin"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sealvol/sealvol/shim/hotplug"
)

// runAsPlugin in the environment makes the test binary be the plugin.
const runAsPlugin = "SEALVOL_TEST_RUN_AS_PLUGIN"

const patience = 20 * time.Second

func TestMain(m *testing.M) {
	// A runtime that launches a plugin gives it no environment but its own.
	_, launched := os.LookupEnv(api.PluginSocketEnvVar)
	if launched || os.Getenv(runAsPlugin) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// runtime is the NRI of a runtime as containerd has it, with its default
// validator requiring the plugin.
type runtime struct {
	*adaptation.Adaptation
	socket, plugins, configs string
}

func newRuntime(t *testing.T) *runtime {
	t.Helper()
	dir := t.TempDir()
	r := &runtime{
		socket: filepath.Join(dir, "nri.sock"), plugins: filepath.Join(dir, "plugins"), configs: filepath.Join(dir, "conf.d"),
	}
	for _, sub := range []string{r.plugins, r.configs} {
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	r.Adaptation, err = adaptation.New("containerd", "v2.4.2",
		func(ctx context.Context, synchronize adaptation.SyncCB) error {
			_, err := synchronize(ctx, nil, nil)
			return err
		},
		func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil },
		adaptation.WithSocketPath(r.socket),
		adaptation.WithPluginPath(r.plugins),
		adaptation.WithPluginConfigPath(r.configs),
		adaptation.WithDefaultValidator(&validator.DefaultValidatorConfig{Enable: true, RequiredPlugins: []string{"sealvol"}}),
	)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *runtime) start(t *testing.T) {
	t.Helper()
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
}

// create asks for a container whose pod is as change makes it.
func (r *runtime) create(t *testing.T, change func(*api.PodSandbox)) (*api.ContainerAdjustment, error) {
	t.Helper()
	pod := testPod()
	change(pod)
	response, err := r.CreateContainer(t.Context(), &api.CreateContainerRequest{Pod: pod, Container: testContainer()})
	return response.GetAdjust(), err
}

func sealed(*api.PodSandbox)      {}
func plain(pod *api.PodSandbox)   { pod.Annotations = nil }
func refused(pod *api.PodSandbox) { pod.Annotations[key] = `{"mode":"ephemeral","mountPath":"/mnt"}` }

// await waits until containers can be created, which needs the plugin.
func (r *runtime) await(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		_, err := r.create(t, plain)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the plugin does not come: %v", err)
		}
	}
}

// startPlugin runs a plugin within the test and gives the end of it.
func startPlugin(t *testing.T, socket string) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"-socket", socket}, t.Output(), t.Output()) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("the plugin ended with %v", err)
		}
	})
	return stop
}

func TestRuntimeGetsTheAdjustment(t *testing.T) {
	t.Parallel()
	r := newRuntime(t)
	r.start(t)
	startPlugin(t, r.socket)
	r.await(t)

	got, err := r.create(t, sealed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hotplug.Parse([]byte(got.Annotations[hotplug.Annotation])); err != nil {
		t.Error(err)
	}
	if len(got.Mounts) != 1 || got.Mounts[0].Source != hotplug.Source(sandboxID, "encrypted") {
		t.Errorf("mounts are %v", got.Mounts)
	}
	// When NRI learns to remove devices, the shim need not do it, and package
	// hotplug's documentation is to say so.
	if devices := got.GetLinux().GetDevices(); len(devices) != 0 {
		t.Errorf("NRI passes on %v", devices)
	}
}

func TestRuntimeGetsTheRefusal(t *testing.T) {
	t.Parallel()
	r := newRuntime(t)
	r.start(t)
	startPlugin(t, r.socket)
	r.await(t)

	for range 2 { // a refusal does not cost the connection
		_, err := r.create(t, refused)
		want := `sealvol: container "app" of pod "default/web" refused: pod annotation "volume.sealvol.io/encrypted": device "" is not an absolute path`
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, not an invalid argument with %q", err, want)
		}
	}
}

func TestNoContainerIsCreatedWithoutThePlugin(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(t *testing.T, r *runtime) (stop func()){
		"ended": func(t *testing.T, r *runtime) func() {
			stop := startPlugin(t, r.socket)
			return func() { _ = stop() }
		},
		"killed": func(t *testing.T, r *runtime) func() {
			cmd := exec.Command(os.Args[0], "-socket", r.socket)
			cmd.Env = []string{runAsPlugin + "=1"}
			cmd.Stderr = t.Output()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			kill := sync.OnceFunc(func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			})
			t.Cleanup(kill)
			return kill
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRuntime(t)
			r.start(t)
			stop := start(t, r)
			r.await(t)
			stop()
			// At once, when the runtime may not know yet, and later.
			for range 20 {
				if got, err := r.create(t, sealed); err == nil {
					t.Fatalf("a container was created with %v", got)
				}
				time.Sleep(5 * time.Millisecond)
			}
			start(t, r)
			r.await(t)
		})
	}
}

func TestRuntimeLaunchesThePlugin(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		config string
		want   string
	}{
		"with its configuration": {"runtime_handlers = ['other']", `runtime handler "kata" is not in`},
		"with a bad one":         {"runtime_handlers = 1", `required plugin "sealvol" not present`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRuntime(t)
			binary, err := filepath.Abs(os.Args[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(binary, filepath.Join(r.plugins, "10-sealvol")); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(r.configs, "10-sealvol.conf"), []byte(test.config), 0o600); err != nil {
				t.Fatal(err)
			}
			r.start(t)
			if _, err := r.create(t, sealed); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, not %q", err, test.want)
			}
		})
	}
}

// relay is a socket before another, whose connections the test can cut as the
// death of the runtime would.
type relay struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
}

func startRelay(t *testing.T, from, to string) *relay {
	t.Helper()
	listener, err := net.Listen("unix", from)
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{listener: listener}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			a, err := listener.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("unix", to)
			if err != nil {
				t.Error(err)
				a.Close()
				return
			}
			r.mu.Lock()
			r.conns = append(r.conns, a, b)
			r.mu.Unlock()
			for _, pair := range [][2]net.Conn{{a, b}, {b, a}} {
				work.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					pair[0].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		r.cut()
		work.Wait()
	})
	return r
}

// cut closes the socket and every connection.
func (r *relay) cut() {
	r.listener.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
}

func TestPluginComesBack(t *testing.T) {
	t.Parallel()
	r := newRuntime(t)
	r.start(t)
	socket := filepath.Join(t.TempDir(), "nri.sock")
	startPlugin(t, socket) // before there is a socket
	for range 3 {
		relay := startRelay(t, socket, r.socket)
		r.await(t)
		if _, err := r.create(t, sealed); err != nil {
			t.Error(err)
		}
		relay.cut()
		if got, err := r.create(t, sealed); err == nil {
			t.Errorf("a container was created with %v", got)
		}
	}
}

// registrar is a runtime that takes a plugin's registration and dies.
type registrar struct{ registered chan struct{} }

func (r registrar) RegisterPlugin(context.Context, *api.RegisterPluginRequest) (*api.Empty, error) {
	close(r.registered)
	return &api.Empty{}, nil
}

func (registrar) UpdateContainers(context.Context, *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	return nil, errors.ErrUnsupported
}

func TestPluginEndsWhenRegistrationDoesNot(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "nri.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	p := &plugin{
		name: "sealvol", index: "10", socket: socket, startLimit: 200 * time.Millisecond,
		config: defaultConfig(), level: new(slog.LevelVar), log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	done := make(chan error, 1)
	go func() { done <- p.run(t.Context()) }()

	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	mux := multiplex.Multiplex(conn)
	runtimeListener, err := mux.Listen(multiplex.RuntimeServiceConn)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	r := registrar{make(chan struct{})}
	api.RegisterRuntimeService(server, r)
	served := make(chan struct{})
	go func() {
		_ = server.Serve(context.Background(), runtimeListener)
		close(served)
	}()
	<-r.registered
	if err := <-done; !errors.Is(err, errStuck) {
		t.Errorf("the plugin ended with %v", err)
	}
	server.Close()
	mux.Close()
	<-served
}

func TestRunRefusesWhatItDoesNotUnderstand(t *testing.T) {
	t.Parallel()
	config := filepath.Join(t.TempDir(), "nri.conf")
	if err := os.WriteFile(config, []byte("handler = 'kata'"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"a flag":                    {[]string{"-verbose"}, "not defined: -verbose, see -help"},
		"an argument":               {[]string{"start"}, `unexpected argument "start"`},
		"an index":                  {[]string{"-index", "1"}, `invalid plugin index "1"`},
		"a name":                    {[]string{"-name", "a/b"}, `invalid plugin name "a/b"`},
		"a configuration":           {[]string{"-config", config}, config + `: configuration: unknown key "handler"`},
		"an absent configuration":   {[]string{"-config", config + "x"}, "no such file"},
		"a configuration's absence": {[]string{"-config"}, "flag needs an argument"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			err := run(t.Context(), test.args, &out, &out)
			if err == nil || !strings.Contains(err.Error(), test.want) || out.Len() > 0 {
				t.Errorf("error %v, output %q, not %q", err, &out, test.want)
			}
		})
	}
}

func TestHelpNamesEveryFlag(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-help"}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	for _, name := range []string{"config", "socket", "name", "index", "version"} {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "  -"+name) }) {
			t.Errorf("no -%s in\n%s", name, &out)
		}
	}
	// The examples are ones that work.
	for _, key := range []string{key, "volume.sealvol.io/pages"} {
		_, example, _ := strings.Cut(out.String(), key+": '")
		example, _, _ = strings.Cut(example, "'\n")
		if _, err := parseAsk("a", example); err != nil {
			t.Error(err)
		}
	}
}
