package sandboxes

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sealvol/sealvol/contrib/internal/guest"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/shim/hotplug"
)

// world is a node with a sandbox "box", whose guest has CID 7.
type world struct {
	Sandboxes
	dir string
}

// control answers with a status.
type control func() (*sealvolv1.StatusResponse, error)

func (c control) Status(context.Context, *sealvolv1.StatusRequest) (*sealvolv1.StatusResponse, error) {
	return c()
}

func (c control) Receipt(context.Context, *sealvolv1.ReceiptRequest) (*sealvolv1.ReceiptResponse, error) {
	return nil, errors.ErrUnsupported
}

func newWorld(t *testing.T, status control) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "") // short, for the sockets' paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	sealvolv1.RegisterControlService(server, status)
	serve := func(path string, serve func(net.Listener) error, stop func() error) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan struct{})
		go func() { defer close(served); _ = serve(l) }()
		t.Cleanup(func() { _ = stop(); <-served })
	}
	serve(filepath.Join(dir, "guest"), func(l net.Listener) error { return server.Serve(context.Background(), l) }, server.Close)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "vsock://7:1024") })
	shim := &http.Server{Handler: mux}
	serve(filepath.Join(dir, "sbs", "box", "shim-monitor.sock"), shim.Serve, shim.Close)
	return &world{dir: dir, Sandboxes: Sandboxes{
		Bundles: filepath.Join(dir, "bundles"), Timeout: 5 * time.Second,
		Node: guest.Node{
			Roots: []string{filepath.Join(dir, "sbs")},
			Dial: func(ctx context.Context, cid, port uint32) (net.Conn, error) {
				if cid != 7 || port != sealvolv1.ControlPort {
					return nil, errors.New("no such device")
				}
				return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "guest"))
			},
		},
	}}
}

// container puts the bundle of a container on the node.
func (w *world) container(t *testing.T, id, sandbox, name string, mounts ...specs.Mount) {
	t.Helper()
	text, err := json.Marshal(specs.Spec{Version: "1.3.0", Mounts: mounts, Annotations: map[string]string{sandboxID: sandbox, containerName: name, podUID: "uid-of-" + sandbox}})
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, id, string(text))
}

func (w *world) write(t *testing.T, id, text string) {
	t.Helper()
	path := filepath.Join(w.Bundles, "k8s.io", id, "config.json")
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// target is where kubelet publishes a volume for the pod of a sandbox.
func target(sandbox, name string) []string {
	return []string{"/var/lib/kubelet/pods/uid-of-" + sandbox + "/volumes/kubernetes.io~csi/" + name + "/mount"}
}

func mount(sandbox, name, path string) specs.Mount {
	return specs.Mount{Source: hotplug.Source(sandbox, name), Destination: path, Type: "bind"}
}

// twoVolumes has two volumes at the same path of two containers, named as their policy has them.
func twoVolumes() (*sealvolv1.StatusResponse, error) {
	return &sealvolv1.StatusResponse{Volumes: []*sealvolv1.Volume{
		{Name: "scratch", State: "closed", Mounts: nil},
		{Name: "left", State: "open", Mounts: []*sealvolv1.Mount{{Container: "a", Path: "/data"}}},
		{Name: "right", State: "degraded", Mounts: []*sealvolv1.Mount{{Container: "b", Path: "/data"}, {Container: "b", Path: "/more"}}},
	}}, nil
}

func TestAVolumeIsThatOfTheContainersPlace(t *testing.T) {
	t.Parallel()
	w := newWorld(t, twoVolumes)
	w.container(t, "1", "box", "", specs.Mount{Source: "proc", Destination: "/proc"})
	w.container(t, "2", "box", "a", specs.Mount{Source: "proc", Destination: "/proc"}, mount("box", "pvc-1", "/data"))
	w.container(t, "3", "box", "b", mount("box", "pvc-2", "/more"))
	w.container(t, "4", "other", "a", mount("other", "pvc-3", "/data"))
	w.container(t, "5", "other", "b", mount("box", "pvc-4", "/data")) // no source of its own sandbox
	for id, want := range map[string]string{"pvc-1": "left", "pvc-2": "right"} {
		if v, err := w.Volume(t.Context(), id, target("box", id)); err != nil || v.Name != want {
			t.Errorf("%s is %v (%v), not %q", id, v, err, want)
		}
	}
	if v, err := w.Volume(t.Context(), "pvc-3", target("other", "pvc-3")); !errdefs.IsUnavailable(err) {
		t.Errorf("a sandbox that does not run is %v (%v)", v, err)
	}
	for id, is := range map[string]func(error) bool{"pvc-3": errdefs.IsNotFound, "pvc-4": errdefs.IsNotFound, "pvc-5": errdefs.IsNotFound} {
		if v, err := w.Volume(t.Context(), id, target("box", id)); !is(err) {
			t.Errorf("%s is %v (%v)", id, v, err)
		}
	}
}

// The names in hotplug requests are, for some volumes, those of a pod's annotations.
func TestAttackAPodThatNamesItsVolumeLikeAnothers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, twoVolumes)
	w.container(t, "1", "box", "a", mount("box", "pvc-1", "/data"))
	if v, err := w.Volume(t.Context(), "pvc-1", target("victim", "pvc-1")); !errdefs.IsNotFound(err) {
		t.Errorf("another pod's guest answers for the volume: %v (%v)", v, err)
	}
	if v, err := w.Volume(t.Context(), "pvc-1", target("box", "pvc-1")); err != nil || v.Name != "left" {
		t.Errorf("got %v (%v)", v, err)
	}
}

// A raw block volume, and one that is not published, is in no pod's folder.
func TestAttackAPodThatNamesItsVolumeLikeOneThatNoPodHas(t *testing.T) {
	t.Parallel()
	w := newWorld(t, twoVolumes)
	w.container(t, "1", "box", "a", mount("box", "pvc-1", "/data"))
	for _, targets := range [][]string{nil, {"/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1/uid-of-box"}} {
		if v, err := w.Volume(t.Context(), "pvc-1", targets); !errdefs.IsNotFound(err) {
			t.Errorf("at %q a pod's guest answers for the volume: %v (%v)", targets, v, err)
		}
	}
}

func TestAnotherContainersTornBundleIsNotInTheWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, twoVolumes)
	w.write(t, "0", "{")
	w.write(t, "00", strings.Repeat(" ", maxSpec)+"{}")
	w.container(t, "1", "box", "a", mount("box", "pvc-1", "/data"))
	if v, err := w.Volume(t.Context(), "pvc-1", target("box", "pvc-1")); err != nil || v.Name != "left" {
		t.Errorf("got %v (%v)", v, err)
	}
}

func TestANodeWithoutContainersHasNoVolumes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, twoVolumes)
	if v, err := w.Volume(t.Context(), "pvc-1", target("box", "pvc-1")); !errdefs.IsNotFound(err) {
		t.Errorf("got %v (%v)", v, err)
	}
}

// A volume that a container has, of which its guest says nothing, is never taken
// for one without a container: its numbers would be those of an empty disk.
func TestAGuestThatSaysNothingIsUnavailable(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status control
		spoil  func(t *testing.T, w *world)
		want   string
	}{
		"it errs":            {func() (*sealvolv1.StatusResponse, error) { return nil, errdefs.ErrUnknown }, nil, "control service"},
		"it hides its error": {func() (*sealvolv1.StatusResponse, error) { return nil, errors.New("\x1b[2J") }, nil, "cannot be printed"},
		"it has no volumes":  {func() (*sealvolv1.StatusResponse, error) { return &sealvolv1.StatusResponse{}, nil }, nil, "has no volume at"},
		"it answers emptiness": {func() (*sealvolv1.StatusResponse, error) {
			return &sealvolv1.StatusResponse{Volumes: []*sealvolv1.Volume{{}}}, nil
		}, nil, "has no volume at"},
		"its shim is gone": {twoVolumes, func(t *testing.T, w *world) {
			if err := os.RemoveAll(filepath.Join(w.dir, "sbs")); err != nil {
				t.Fatal(err)
			}
		}, "no running Kata sandbox"},
		"it is gone": {twoVolumes, func(t *testing.T, w *world) {
			if err := os.Remove(filepath.Join(w.dir, "guest")); err != nil {
				t.Fatal(err)
			}
		}, "does it still run"},
		"its bundle is torn": {twoVolumes, func(t *testing.T, w *world) { w.write(t, "1", "{") }, "unexpected end"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, test.status)
			w.container(t, "1", "box", "a", mount("box", "pvc-1", "/data"))
			if test.spoil != nil {
				test.spoil(t, w)
			}
			v, err := w.Volume(t.Context(), "pvc-1", target("box", "pvc-1"))
			if !errdefs.IsUnavailable(err) || errdefs.IsNotFound(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v (%v), not %q", v, err, test.want)
			}
		})
	}
}
