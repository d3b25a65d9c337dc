package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
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

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/config"
	"github.com/sealvol/sealvol/shim/internal/process"
	"github.com/sealvol/sealvol/shim/internal/record"
	"github.com/sealvol/sealvol/shim/internal/sandbox"
)

const (
	shimName  = "containerd-shim-kata-sealvol-v2"
	stockName = "containerd-shim-kata-v2"
	// testRoot names the folder that stands for the host.
	testRoot = "TEST_ROOT"
)

// TestMain is each of the programs that the tests start, by the name they are started with.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case shimName:
		os.Exit(run(os.Args[1:], testHost(os.Getenv(testRoot))))
	case stockName:
		os.Exit(stock())
	}
	os.Exit(m.Run())
}

func testHost(root string) sandbox.Host {
	return sandbox.Host{
		Records: record.Dir(filepath.Join(root, "records")),
		Kata:    []string{filepath.Join(root, "sbs"), filepath.Join(root, "vm")},
		Open: func(b hotplug.Backing) (sandbox.Device, error) {
			file, err := os.Open(filepath.Join(root, "disks", strings.ReplaceAll(b.String(), "/", "_")))
			if err != nil {
				return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
			}
			return disk{file}, nil
		},
		Log: slog.New(slog.DiscardHandler),
	}
}

// disk is a file that stands for a block device.
type disk struct{ *os.File }

func (d disk) Path() string { return "/dev/" + filepath.Base(d.Name()) }

// host is one test's host, with a stand-in for the stock shim.
type host struct {
	*testing.T
	root, shim string
	env        []string
}

func newHost(t *testing.T, env ...string) *host {
	t.Helper()
	// Not t.TempDir: the path of a socket is short.
	root, err := os.MkdirTemp("", "shim-")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{T: t, root: root, shim: filepath.Join(root, shimName)}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	stock := filepath.Join(root, stockName)
	h.must(os.Symlink(self, h.shim))
	copyFile(t, self, stock)
	h.must(os.Mkdir(filepath.Join(root, "disks"), 0o700))
	h.write(filepath.Join(root, "shim.toml"), fmt.Sprintf("stock_shim = %q\nstate_dir = %q\n", stock, filepath.Join(root, "s")))
	h.env = append(os.Environ(), testRoot+"="+root, stockForm+"=plain", stockVersion+"=2")
	h.env = append(h.env, env...)
	t.Cleanup(func() {
		// What a test that failed left behind must not outlive it.
		for range 100 {
			left := h.processes()
			for _, id := range left {
				if err := id.Kill(); err != nil {
					t.Log(err)
				}
			}
			if len(left) == 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := os.RemoveAll(root); err != nil {
			t.Log(err)
		}
	})
	return h
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

func (h *host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

func (h *host) write(path, text string) {
	h.Helper()
	h.must(os.WriteFile(path, []byte(text), 0o600))
}

// processes lists all that this host runs: everything inherits its name.
func (h *host) processes() []process.ID {
	h.Helper()
	ids, err := process.Marked(testRoot + "=" + h.root)
	h.must(err)
	return ids
}

// program gives the one process of this host that runs a program in a role.
func (h *host) program(name, role string) process.ID {
	h.Helper()
	id, running := h.find(name, role)
	if !running {
		h.Fatalf("no process %s %s", name, role)
	}
	return id
}

// find is program where there may be none.
func (h *host) find(name, role string) (id process.ID, running bool) {
	ids, err := process.Marked(testRoot + "=" + h.root)
	if err != nil {
		h.Error(err)
	}
	for _, id := range ids {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", id.Pid))
		if err != nil {
			continue
		}
		args := strings.Split(string(line), "\x00")
		if filepath.Base(args[0]) == name && (role == "" || args[1] == role) {
			return id, true
		}
	}
	return process.ID{}, false
}

func (h *host) daemon() process.ID { return h.program(shimName, sandbox.RoleDaemon) }

// daemonOf is daemon where there is more than one sandbox.
func (h *host) daemonOf(sandboxID string) process.ID {
	h.Helper()
	for _, id := range h.processes() {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", id.Pid))
		if args := strings.Split(string(line), "\x00"); err == nil && len(args) > 1 && args[1] == sandbox.RoleDaemon && slices.Contains(args, sandboxID) {
			return id
		}
	}
	h.Fatalf("sandbox %s has no daemon", sandboxID)
	return process.ID{}
}

func (h *host) stock() process.ID { return h.program(stockName, "") }

// kill kills a process and waits until it has ended.
func (h *host) kill(id process.ID) {
	h.Helper()
	h.must(process.End(h.Context(), func() ([]process.ID, error) {
		if id.Alive() {
			return []process.ID{id}, nil
		}
		return nil, nil
	}))
}

// annotations of a container's config.json.
type annotations map[string]string

// bundle makes the bundle of a container: the sandbox's own if id is "sb".
func (h *host) bundle(id string, extra annotations, mounts ...string) string {
	h.Helper()
	dir := filepath.Join(h.root, "bundles", id)
	h.must(os.MkdirAll(dir, 0o700))
	all := annotations{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "sb"}
	if id == "sb" {
		all = annotations{"io.kubernetes.cri.container-type": "sandbox", "container-type": "sandbox"}
	}
	for key, value := range extra {
		all[key] = value
	}
	type mount struct {
		Destination string `json:"destination"`
		Source      string `json:"source"`
	}
	spec := struct {
		Annotations annotations `json:"annotations"`
		Mounts      []mount     `json:"mounts"`
	}{all, nil}
	for _, m := range mounts {
		source, destination, _ := strings.Cut(m, " ")
		spec.Mounts = append(spec.Mounts, mount{destination, source})
	}
	data, err := json.Marshal(spec)
	h.must(err)
	h.write(filepath.Join(dir, "config.json"), string(data))
	return dir
}

// volumeBundle makes the bundle of a container that asks for volume "vol" on a disk.
func (h *host) volumeBundle(id, disk string, extra annotations) string {
	h.Helper()
	if disk != "" {
		h.write(filepath.Join(h.root, "disks", disk), "")
	}
	source := hotplug.Source("sb", "vol")
	request, err := hotplug.Request{Volumes: []hotplug.Volume{
		{Name: "vol", MountPath: "/mnt", Source: source, Backing: hotplug.Device{Major: 7, Minor: 3}},
	}}.Encode()
	h.must(err)
	all := annotations{hotplug.Annotation: string(request)}
	for key, value := range extra {
		all[key] = value
	}
	return h.bundle(id, all, source+" /mnt")
}

// command is how containerd calls the shim.
func (h *host) command(id, action, bundle string) *exec.Cmd {
	args := []string{"-namespace", "test", "-address", "/containerd.sock", "-publish-binary", "/containerd", "-id", id}
	if action == "delete" {
		args = append(args, "-bundle", bundle)
	}
	command := exec.Command(h.shim, append(args, action)...)
	command.Dir = bundle
	command.Env = h.env
	if action == "start" {
		// containerd gives it to start alone.
		command.Env = append(slices.Clone(h.env), config.Env+"="+filepath.Join(h.root, "shim.toml"))
		command.Stdin = strings.NewReader("bootstrap parameters")
	}
	return command
}

// start gives the answer as containerd reads it, with stderr mixed in.
func (h *host) start(id, bundle string) []byte {
	h.Helper()
	out, err := h.command(id, "start", bundle).CombinedOutput()
	if err != nil {
		h.Fatalf("start %s: %v: %s", id, err, out)
	}
	return out
}

func (h *host) delete(id, bundle string) *taskv2.DeleteResponse {
	h.Helper()
	command := h.command(id, "delete", bundle)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		h.Fatalf("delete %s: %v: %s", id, err, stderr.String())
	}
	if stderr.Len() > 0 {
		h.Errorf("delete %s warns: %s", id, stderr.String())
	}
	response := new(taskv2.DeleteResponse)
	h.must(proto.Unmarshal(out, response))
	return response
}

func (h *host) connect(address string) *ttrpc.Client {
	h.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	h.must(err)
	client := ttrpc.NewClient(conn)
	h.Cleanup(func() { client.Close() })
	return client
}

// up starts a sandbox with its container and gives a client.
func (h *host) up() (*ttrpc.Client, taskv2.TTRPCTaskService) {
	h.Helper()
	bundle := h.bundle("sb", nil)
	client := h.connect(string(h.start("sb", bundle)))
	tasks := taskv2.NewTTRPCTaskClient(client)
	_, err := tasks.Create(h.Context(), &taskv2.CreateTaskRequest{ID: "sb", Bundle: bundle})
	h.must(err)
	return client, tasks
}

// wantNothing demands that soon nothing of the sandbox is left.
func (h *host) wantNothing() {
	h.Helper()
	var left []string
	for range 500 {
		left = nil
		for _, id := range h.processes() {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", id.Pid))
			left = append(left, "process "+strings.ReplaceAll(string(line), "\x00", " "))
		}
		for _, pattern := range []string{"s/*", "records/*", "sbs/*", "vm/*", "stock-*"} {
			paths, err := filepath.Glob(filepath.Join(h.root, pattern))
			h.must(err)
			left = append(left, paths...)
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	h.Errorf("left behind: %q", left)
}

// saw gives what the stock shim saw at a container's Create, nil if it was not asked.
func (h *host) saw(bundle string) *seen {
	h.Helper()
	data, err := os.ReadFile(filepath.Join(bundle, "seen"))
	if os.IsNotExist(err) {
		return nil
	}
	h.must(err)
	s := new(seen)
	h.must(json.Unmarshal(data, s))
	return s
}

func (h *host) records() int {
	h.Helper()
	paths, err := filepath.Glob(filepath.Join(h.root, "records", "*"))
	h.must(err)
	return len(paths)
}

// open says whether a process of this host has a file open.
func (h *host) open(path string) bool {
	h.Helper()
	for _, id := range h.processes() {
		links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", id.Pid))
		h.must(err)
		for _, link := range links {
			if target, err := os.Readlink(link); err == nil && target == path {
				return true
			}
		}
	}
	return false
}

func TestASandboxLivesAndEndsInEachFormAndVersion(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ form, version string }{
		{"plain", "2"}, {"json", "2"}, {"json", "3"}, {"proto", "2"}, {"proto", "3"},
	} {
		t.Run(test.form+test.version, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, stockForm+"="+test.form, stockVersion+"="+test.version)
			bundle := h.bundle("sb", nil)
			out := h.start("sb", bundle)
			socket := filepath.Join(h.root, "s", "test:sb", "sock")
			address := string(out)
			switch test.form {
			case "json":
				var result struct {
					Version           int
					Address, Protocol string
				}
				h.must(json.Unmarshal(out, &result))
				if fmt.Sprint(result.Version) != test.version || result.Protocol != "ttrpc" {
					t.Errorf("answer %s", out)
				}
				address = result.Address
			case "proto":
				result := new(bootapi.BootstrapResult)
				h.must(proto.Unmarshal(out, result))
				if fmt.Sprint(result.Version) != test.version || result.Protocol != "ttrpc" || result.Metadata["made"] != "by stock" {
					t.Errorf("answer %v", result)
				}
				address = result.Address
			}
			if address != "unix://"+socket {
				t.Fatalf("address %q, not %q", address, socket)
			}
			info, err := os.Stat(socket)
			h.must(err)
			if info.Mode().Perm() != 0o600 {
				t.Errorf("the socket has mode %v", info.Mode())
			}
			if stdin, err := os.ReadFile(filepath.Join(bundle, "stdin")); err != nil || string(stdin) != "bootstrap parameters" {
				t.Errorf("the stock shim read %q (%v) on stdin", stdin, err)
			}

			client := h.connect(address)
			service := "containerd.task.v" + test.version + ".Task"
			call := func(method string, in, out proto.Message) error {
				return client.Call(t.Context(), service, method, in, out)
			}
			h.must(call("Create", &taskv3.CreateTaskRequest{ID: "sb", Bundle: bundle}, new(taskv3.CreateTaskResponse)))
			state := new(taskv3.StateResponse)
			h.must(call("State", &taskv3.StateRequest{ID: "sb"}, state))
			if int(state.Pid) != h.stock().Pid {
				t.Errorf("State is answered by %d", state.Pid)
			}
			deleted := new(taskv3.DeleteResponse)
			h.must(call("Delete", &taskv3.DeleteRequest{ID: "sb"}, deleted))
			if deleted.ExitStatus != 7 {
				t.Errorf("Delete gives %v", deleted)
			}
			// The stock shim exits without an answer.
			if err := call("Shutdown", &taskv3.ShutdownRequest{ID: "sb"}, new(emptypb.Empty)); !errors.Is(err, ttrpc.ErrClosed) {
				t.Errorf("Shutdown gives %v", err)
			}
			h.wantNothing()
			if _, err := os.Stat(filepath.Join(bundle, "deleted")); err == nil {
				t.Error("the stock shim's delete ran for a container that was deleted")
			}
			if got := h.delete("sb", bundle); got.ExitStatus != 137 {
				t.Errorf("delete afterwards gives %v", got)
			}
		})
	}
}

func TestOtherCallsPassAsTheyAre(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	client, _ := h.up()
	t.Run("big payloads at once", func(t *testing.T) {
		var calls sync.WaitGroup
		for n := range 8 {
			calls.Go(func() {
				in := wrapperspb.Bytes(bytes.Repeat([]byte{byte(n)}, 4<<20-1000))
				out := new(wrapperspb.BytesValue)
				if err := client.Call(t.Context(), "test.Service", "Echo", in, out); err != nil || !bytes.Equal(in.Value, out.Value) {
					t.Errorf("echo %d: %v", n, err)
				}
			})
		}
		calls.Wait()
	})
	t.Run("metadata", func(t *testing.T) {
		ctx := ttrpc.WithMetadata(t.Context(), ttrpc.MD{"extra": {" and more"}})
		out := new(wrapperspb.BytesValue)
		if err := client.Call(ctx, "test.Service", "Echo", wrapperspb.Bytes([]byte("this")), out); err != nil || string(out.Value) != "this and more" {
			t.Errorf("got %q, %v", out.Value, err)
		}
	})
	t.Run("an error with details", func(t *testing.T) {
		err := client.Call(t.Context(), "test.Service", "Fail", new(emptypb.Empty), new(emptypb.Empty))
		s := status.Convert(err)
		if s.Code() != codes.ResourceExhausted || s.Message() != "no more" || len(s.Details()) != 1 {
			t.Errorf("got %v", s)
		}
	})
	t.Run("an unknown method", func(t *testing.T) {
		err := client.Call(t.Context(), "test.Service", "Absent", new(emptypb.Empty), new(emptypb.Empty))
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("got %v", err)
		}
	})
	t.Run("streams at once", func(t *testing.T) {
		var streams sync.WaitGroup
		for n := range 8 {
			streams.Go(func() {
				stream, err := client.NewStream(t.Context(), &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}, "test.Service", "Stream", nil)
				if err != nil {
					t.Error(err)
					return
				}
				for i := range 100 {
					want, got := fmt.Sprintf("%d-%d", n, i), new(wrapperspb.StringValue)
					if err := errors.Join(stream.SendMsg(wrapperspb.String(want)), stream.RecvMsg(got)); err != nil || got.Value != want {
						t.Errorf("got %q, %v, not %q", got.Value, err, want)
						return
					}
				}
				if err := stream.CloseSend(); err != nil {
					t.Error(err)
				}
			})
		}
		streams.Wait()
	})
}

func TestABlockedCreateHoldsNothingUp(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	client, tasks := h.up()
	blocked := h.bundle("c1", annotations{"test": "block"})
	created := make(chan error, 1)
	go func() {
		_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: blocked})
		created <- err
	}()
	for h.saw(blocked) == nil {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for range 10 {
		if _, err := tasks.State(ctx, &taskv2.StateRequest{ID: "sb"}); err != nil {
			t.Fatal(err)
		}
	}
	other := h.bundle("c2", nil)
	if _, err := tasks.Create(ctx, &taskv2.CreateTaskRequest{ID: "c2", Bundle: other}); err != nil {
		t.Fatal(err)
	}
	stream, err := client.NewStream(ctx, &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}, "test.Service", "Stream", nil)
	h.must(err)
	h.must(stream.SendMsg(wrapperspb.String("x")))
	h.must(stream.RecvMsg(new(wrapperspb.StringValue)))
	select {
	case err := <-created:
		t.Fatalf("the Create that blocks has ended: %v", err)
	default:
	}
	h.write(filepath.Join(blocked, "go-on"), "")
	h.must(<-created)
}

// The lock on a device ends with the daemon that holds it, and the hypervisor may live on.
func TestADiskOfAKilledShimIsNobodysBeforeItsSandboxHasEnded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	_, first := h.up()
	next := h.bundle("next", annotations{"io.kubernetes.cri.container-type": "sandbox"})
	second := taskv2.NewTTRPCTaskClient(h.connect(string(h.start("next", next))))
	_, err := second.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "next", Bundle: next})
	h.must(err)

	lent := h.volumeBundle("c1", "7:3", nil)
	h.start("c1", lent)
	_, err = first.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: lent})
	h.must(err)
	h.kill(h.daemonOf("sb"))

	source := hotplug.Source("next", "vol")
	request, err := hotplug.Request{Volumes: []hotplug.Volume{
		{Name: "vol", MountPath: "/mnt", Source: source, Backing: hotplug.Device{Major: 7, Minor: 3}},
	}}.Encode()
	h.must(err)
	wanting := h.bundle("c2", annotations{hotplug.Annotation: string(request), "io.kubernetes.cri.sandbox-id": "next"}, source+" /mnt")
	create := func() error {
		_, err := second.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c2", Bundle: wanting})
		return err
	}
	if err := create(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "block device 7:3 is that of another pod (sandbox sb)") {
		t.Errorf("two guests may write one disk: %v", err)
	}
	if h.saw(wanting) != nil {
		t.Error("the stock shim was asked")
	}
	h.delete("sb", filepath.Join(h.root, "bundles", "sb"))
	if err := create(); err != nil {
		t.Errorf("the disk of a sandbox that has ended is still taken: %v", err)
	}
}

func TestCreateTurnsTheRequestIntoARecord(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	_, tasks := h.up()
	first := h.volumeBundle("c1", "7:3", annotations{"keep": "me"})
	if got, want := string(h.start("c1", first)), "unix://"+filepath.Join(h.root, "s", "test:sb", "sock"); got != want {
		t.Errorf("start of a pod's container answers %q, not %q", got, want)
	}
	_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: first})
	h.must(err)
	saw := h.saw(first)
	if strings.Contains(saw.Config, hotplug.Annotation) || !strings.Contains(saw.Config, `"keep":"me"`) {
		t.Errorf("the stock shim saw %s", saw.Config)
	}
	name := base64.URLEncoding.EncodeToString([]byte(hotplug.Source("sb", "vol")))
	if want := `{"volume-type":"block","device":"/dev/7:3","fstype":"ext4"}`; len(saw.Records) != 1 || saw.Records[name] != want {
		t.Errorf("the stock shim saw records %v, not %s: %s", saw.Records, name, want)
	}

	// A second container shares it, and it goes with the last.
	second := h.volumeBundle("c2", "", nil)
	_, err = tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c2", Bundle: second})
	h.must(err)
	for i, id := range []string{"c1", "c2"} {
		if h.records() != 1 {
			t.Errorf("%d records while %s is there", h.records(), id)
		}
		_, err := tasks.Delete(t.Context(), &taskv2.DeleteRequest{ID: id, ExecID: "exec"})
		h.must(err)
		if h.records() != 1 {
			t.Error("the end of an exec removed the record")
		}
		_, err = tasks.Delete(t.Context(), &taskv2.DeleteRequest{ID: id})
		h.must(err)
		if h.records() != 1-i {
			t.Errorf("%d records after %s is deleted", h.records(), id)
		}
	}
	// The device's number stays taken to the end of the sandbox.
	device := filepath.Join(h.root, "disks", "7:3")
	if !h.open(device) {
		t.Error("the device was let go before the sandbox ended")
	}
	third := h.volumeBundle("c3", "", nil)
	_, err = tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c3", Bundle: third})
	h.must(err)
	if h.records() != 1 {
		t.Error("no record for a container that comes again")
	}
}

func TestARefusedCreateNeverReachesTheStockShim(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	_, tasks := h.up()
	source := hotplug.Source("sb", "vol")
	for name, test := range map[string]struct {
		bundle string
		code   codes.Code
		want   string
	}{
		"a malformed request": {
			h.bundle("bad", annotations{hotplug.Annotation: "{}"}), codes.InvalidArgument, "version 0"},
		"a disk that is not there": {
			h.volumeBundle("gone", "", nil), codes.NotFound, `volume "vol"`},
		"a mount of another's volume": {
			h.bundle("foreign", nil, hotplug.Source("other", "vol")+" /mnt"), codes.InvalidArgument, "no volume of the hotplug request"},
		"a mount of a volume without a request": {
			h.bundle("bare", nil, source+" /mnt"), codes.InvalidArgument, "no volume of the hotplug request"},
		"no bundle": {filepath.Join(h.root, "absent"), codes.Unknown, "no such file"},
		"a bundle with a relative path": {
			"bundles/x", codes.InvalidArgument, "not an absolute"},
	} {
		_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: test.bundle})
		if s := status.Convert(err); s.Code() != test.code || !strings.Contains(s.Message(), test.want) {
			t.Errorf("%s: got %v, want %v with %q", name, err, test.code, test.want)
		}
		if h.saw(test.bundle) != nil {
			t.Errorf("%s: the stock shim was asked", name)
		}
		if h.records() != 0 {
			t.Errorf("%s: a record is left", name)
		}
	}
	if _, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "sb", Bundle: h.bundle("x", nil)}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("a container that is there already: %v", err)
	}
	if _, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "../x", Bundle: h.bundle("x", nil)}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("an id with a path: %v", err)
	}
}

func TestAFailedCreateIsUndone(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	_, tasks := h.up()
	bundle := h.volumeBundle("c1", "7:3", annotations{"test": "fail"})
	_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: bundle})
	if s := status.Convert(err); s.Code() != codes.Aborted || s.Message() != "the guest says no" {
		t.Errorf("got %v", err)
	}
	if saw := h.saw(bundle); saw == nil || len(saw.Records) != 1 {
		t.Errorf("the stock shim saw %v", saw)
	}
	if h.records() != 0 {
		t.Error("the record is still there")
	}
	// The id is free again.
	h.must(os.RemoveAll(bundle))
	_, err = tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: h.volumeBundle("c1", "", nil)})
	h.must(err)
}

func TestTheStockShimsEndIsTheSandboxs(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	client, tasks := h.up()
	bundle := h.volumeBundle("c1", "7:3", nil)
	h.start("c1", bundle)
	_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: bundle})
	h.must(err)
	closed := make(chan struct{})
	go func() {
		_ = client.UserOnCloseWait(context.WithoutCancel(t.Context()))
		close(closed)
	}()
	h.must(h.stock().Kill())
	h.wantNothing()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Error("containerd's connection stays open")
	}
	for _, id := range []string{"sb", "c1"} {
		dir := filepath.Join(h.root, "bundles", id)
		if got, err := os.ReadFile(filepath.Join(dir, "deleted")); err != nil || string(got) != id {
			t.Errorf("the stock shim's delete of %s: %q, %v", id, got, err)
		}
		if got := h.delete(id, dir); got.ExitStatus != 137 {
			t.Errorf("delete of %s gives %v", id, got)
		}
	}
}

func TestDeleteEndsASandboxWhoseDaemonWasKilled(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		env     string
		prepare func(h *host)
		pid     uint32
	}{
		"with its stock shim": {"", func(h *host) {}, 4711},
		"without": {"", func(h *host) {
			h.kill(h.stock())
		}, 4711},
		"when the stock shim cannot delete": {stockDelete + "=fail", func(h *host) {}, 0},
		"when the state is damaged": {"", func(h *host) {
			h.write(filepath.Join(h.root, "s", "test:sb", "state.json"), "{")
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, test.env)
			_, tasks := h.up()
			bundle := h.volumeBundle("c1", "7:3", nil)
			h.start("c1", bundle)
			_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: bundle})
			h.must(err)
			h.kill(h.daemon())
			test.prepare(h)
			late := h.command("c2", "start", h.bundle("c2", nil))
			if out, err := late.CombinedOutput(); err == nil || !strings.Contains(string(out), "has died") && !strings.Contains(string(out), "data loss") {
				t.Errorf("start in a dead sandbox: %v: %s", err, out)
			}
			if got := h.delete("c1", bundle); got.ExitStatus != 137 || got.Pid != test.pid {
				t.Errorf("delete gives %v", got)
			}
			if strings.Contains(name, "damaged") {
				// Only the state knew the stock shim's socket.
				h.must(os.Remove(filepath.Join(h.root, "stock-sb")))
			}
			h.wantNothing()
			if got := h.delete("sb", filepath.Join(h.root, "bundles", "sb")); got.ExitStatus != 137 {
				t.Errorf("delete of the sandbox gives %v", got)
			}
		})
	}
}

func TestDeletesAtOnceAllSucceed(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	_, tasks := h.up()
	bundles := map[string]string{"sb": filepath.Join(h.root, "bundles", "sb")}
	for _, id := range []string{"c1", "c2", "c3"} {
		bundles[id] = h.volumeBundle(id, "7:3", nil)
		h.start(id, bundles[id])
		_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: id, Bundle: bundles[id]})
		h.must(err)
	}
	h.kill(h.daemon())
	var deletes sync.WaitGroup
	for id, bundle := range bundles {
		deletes.Go(func() {
			out, err := h.command(id, "delete", bundle).Output()
			response := new(taskv2.DeleteResponse)
			if err := errors.Join(err, proto.Unmarshal(out, response)); err != nil || response.ExitStatus != 137 {
				t.Errorf("delete %s: %v, %v", id, response, err)
			}
		})
	}
	deletes.Wait()
	h.wantNothing()
}

func TestDeleteOfOneContainerLeavesTheOthersAlone(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	_, tasks := h.up()
	for _, id := range []string{"c1", "c2"} {
		bundle := h.volumeBundle(id, "7:3", nil)
		h.start(id, bundle)
		_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: id, Bundle: bundle})
		h.must(err)
	}
	for i, id := range []string{"c1", "c2"} {
		if got := h.delete(id, filepath.Join(h.root, "bundles", id)); got.ExitStatus != 137 || got.Pid != 4711 {
			t.Errorf("delete gives %v", got)
		}
		if h.records() != 1-i {
			t.Errorf("%d records after delete of %s", h.records(), id)
		}
		if _, err := tasks.State(t.Context(), &taskv2.StateRequest{ID: "sb"}); err != nil {
			t.Errorf("the sandbox after delete of %s: %v", id, err)
		}
	}
	// The last one takes the sandbox with it, even if nobody shuts it down.
	if got := h.delete("sb", filepath.Join(h.root, "bundles", "sb")); got.ExitStatus != 137 {
		t.Errorf("delete gives %v", got)
	}
	h.wantNothing()
}

// A containerd that dies between Create and Start leaves such a sandbox, and then stops its pod.
func TestASandboxThatWasNeverStartedEndsWhenItIsKilled(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"2", "3"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, stockForm+"=json", stockVersion+"="+version)
			bundle := h.bundle("sb", nil)
			var answer struct{ Address string }
			h.must(json.Unmarshal(h.start("sb", bundle), &answer))
			client := h.connect(answer.Address)
			call := func(method string, in, out proto.Message) error {
				return client.Call(t.Context(), "containerd.task.v"+version+".Task", method, in, out)
			}
			h.must(call("Create", &taskv3.CreateTaskRequest{ID: "sb", Bundle: bundle}, new(taskv3.CreateTaskResponse)))
			container := h.bundle("c1", nil)
			h.must(call("Create", &taskv3.CreateTaskRequest{ID: "c1", Bundle: container}, new(taskv3.CreateTaskResponse)))
			for name, r := range map[string]*taskv3.KillRequest{
				"another signal":             {ID: "sb", Signal: 15},
				"an exec":                    {ID: "sb", ExecID: "exec", Signal: 9},
				"a container of the sandbox": {ID: "c1", Signal: 9},
			} {
				if err := call("Kill", r, new(emptypb.Empty)); err == nil || !strings.Contains(err.Error(), "Sandbox not running") {
					t.Errorf("%s: the stock shim's answer becomes %v", name, err)
				}
			}
			if err := call("Kill", &taskv3.KillRequest{ID: "c2", Signal: 9}, new(emptypb.Empty)); status.Code(err) != codes.NotFound {
				t.Errorf("a container that is not there: %v", err)
			}
			h.must(call("State", &taskv3.StateRequest{ID: "sb"}, new(taskv3.StateResponse)))
			// It may have ended before the answer was written; containerd tries again then.
			if err := call("Kill", &taskv3.KillRequest{ID: "sb", Signal: 9}, new(emptypb.Empty)); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
				t.Errorf("containerd gives the pod up when killing it gives %v", err)
			}
			h.wantNothing()
			// containerd sees the exit in the end of its connection, and calls `delete`.
			if err := client.UserOnCloseWait(t.Context()); err != nil {
				t.Error(err)
			}
			if got := h.delete("sb", bundle); got.ExitStatus != 137 {
				t.Errorf("delete gives %v", got)
			}
		})
	}
}

func TestDeleteWithoutABundle(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	_, tasks := h.up()
	bundle := h.volumeBundle("c1", "7:3", nil)
	_, err := tasks.Create(t.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: bundle})
	h.must(err)
	h.kill(h.daemon())
	h.must(os.RemoveAll(filepath.Join(h.root, "bundles")))
	command := h.command("c1", "delete", bundle)
	command.Dir = "/"
	command.Env = append(command.Env, config.Env+"="+filepath.Join(h.root, "shim.toml"))
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	h.wantNothing()
}

func TestAKilledDeleteIsFinished(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.up()
	h.kill(h.daemon())
	command := h.command("sb", "delete", filepath.Join(h.root, "bundles", "sb"))
	h.must(command.Start())
	// Killed as soon as the work has been handed on.
	for !slices.ContainsFunc(h.processes(), func(id process.ID) bool {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", id.Pid))
		return bytes.Contains(line, []byte("\x00"+sandbox.RoleCleanup+"\x00"))
	}) && command.ProcessState == nil {
		if _, err := os.Stat(filepath.Join(h.root, "s", "test:sb")); err != nil {
			break // It was faster than we are.
		}
	}
	_ = command.Process.Kill()
	_ = command.Wait()
	h.wantNothing()
}

func TestASignalEndsTheSandbox(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.up()
	daemon, err := os.FindProcess(h.daemon().Pid)
	h.must(err)
	h.must(daemon.Signal(os.Interrupt))
	h.wantNothing()
}

func TestAStartThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t, stockStart+"=fail")
	out, err := h.command("sb", "start", h.bundle("sb", nil)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "no hypervisor today") {
		t.Errorf("got %v: %s", err, out)
	}
	h.wantNothing()
}

func TestAnAnswerThatWeCannotFrontFailsStart(t *testing.T) {
	t.Parallel()
	h := newHost(t, stockForm+"=json", stockVersion+"=4")
	out, err := h.command("sb", "start", h.bundle("sb", nil)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "version 4") {
		t.Errorf("got %v: %s", err, out)
	}
	// The stock shim was up already. It is gone, but for its socket: we know
	// no more of it than the address that we refused.
	h.must(os.Remove(filepath.Join(h.root, "stock-sb")))
	h.wantNothing()
}

func TestAStartThatContainerdGivesUpIsUndone(t *testing.T) {
	t.Parallel()
	h := newHost(t, stockStart+"=hang")
	command := h.hangingStart()
	h.must(command.Process.Kill())
	_ = command.Wait()
	h.wantNothing()
}

// hangingStart gives a `start` in which the stock shim's hangs.
func (h *host) hangingStart() *exec.Cmd {
	h.Helper()
	command := h.command("sb", "start", h.bundle("sb", nil))
	h.must(command.Start())
	for !slices.ContainsFunc(h.processes(), func(id process.ID) bool {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", id.Pid))
		return strings.HasPrefix(string(line), filepath.Join(h.root, stockName))
	}) {
		time.Sleep(time.Millisecond)
	}
	return command
}

func TestADaemonThatIsKilledDuringStartLeavesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t, stockStart+"=hang")
	command := h.hangingStart()
	h.kill(h.daemon())
	if err := command.Wait(); err == nil {
		t.Error("the start of a sandbox without a shim succeeded")
	}
	h.wantNothing()
}

// containerd calls no `delete` for a sandbox whose start failed, nor for one that it has forgotten.
func TestTheNextStartEndsOrphans(t *testing.T) {
	t.Parallel()
	for name, orphan := range map[string]func(*host){
		"killed during start": func(h *host) {
			h.env = append(h.env, stockStart+"=hang")
			command := h.hangingStart()
			daemon := h.daemon()
			h.must(command.Process.Kill())
			h.kill(daemon)
			_ = command.Wait()
			h.env = append(h.env, stockStart+"=")
		},
		"killed afterwards": func(h *host) {
			_, tasks := h.up()
			bundle := h.volumeBundle("c1", "7:3", nil)
			_, err := tasks.Create(h.Context(), &taskv2.CreateTaskRequest{ID: "c1", Bundle: bundle})
			h.must(err)
			h.kill(h.daemon())
		},
		"killed before it had a state": func(h *host) {
			folder := filepath.Join(h.root, "s", "test:sb")
			h.must(os.MkdirAll(folder, 0o700))
			h.write(filepath.Join(folder, "lock"), "")
			long := time.Now().Add(-time.Hour)
			h.must(os.Chtimes(folder, long, long))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			orphan(h)
			// One that is just being made is let alone.
			fresh := filepath.Join(h.root, "s", "test:fresh")
			h.must(os.MkdirAll(fresh, 0o700))
			h.write(filepath.Join(fresh, "lock"), "")

			next := h.bundle("next", annotations{"io.kubernetes.cri.container-type": "sandbox"})
			h.start("next", next)
			if _, err := os.Stat(fresh); err != nil {
				t.Error(err)
			}
			h.must(os.RemoveAll(fresh))
			h.delete("next", next)
			h.wantNothing()
		})
	}
}

func TestASandboxStartsWhereAKilledOneWas(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.up()
	h.kill(h.daemon())
	h.must(os.RemoveAll(filepath.Join(h.root, "bundles")))
	_, tasks := h.up()
	state, err := tasks.State(t.Context(), &taskv2.StateRequest{ID: "sb"})
	h.must(err)
	if int(state.Pid) != h.stock().Pid {
		t.Error("another stock shim answers")
	}
}

func TestOtherArgumentsGoToTheStockShim(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	command := exec.Command(h.shim, "-v")
	command.Env = append(h.env, config.Env+"="+filepath.Join(h.root, "shim.toml"))
	if out, err := command.CombinedOutput(); err != nil || string(out) != "the stock shim\n" {
		t.Errorf("got %v: %s", err, out)
	}
}

func TestContainersOfASandboxThatIsNotOursGoToTheStockShim(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	bundle := h.bundle("c1", nil)
	if got, want := string(h.start("c1", bundle)), "unix://"+filepath.Join(h.root, "stock-c1"); got != want {
		t.Errorf("start answers %q, not %q", got, want)
	}
	command := h.command("c1", "delete", bundle)
	command.Env = append(command.Env, config.Env+"="+filepath.Join(h.root, "shim.toml"))
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("delete: %v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join(bundle, "deleted")); err != nil {
		t.Error(err)
	}
}

func TestTheShimIsNotItsOwnStockShim(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.write(filepath.Join(h.root, "shim.toml"), fmt.Sprintf("stock_shim = %q\n", h.shim))
	out, err := h.command("sb", "start", h.bundle("sb", nil)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "is this program itself") {
		t.Errorf("got %v: %s", err, out)
	}
}
