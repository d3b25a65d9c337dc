package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/google/go-cmp/cmp"
	"github.com/sealvol/sealvol/contrib/internal/guest"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"google.golang.org/protobuf/proto"
)

var update = flag.Bool("update", false, "write the golden files")

// node is a fake node with one or more sandboxes, and a guest at CID 7.
type node struct {
	inspector
	dialed []string
}

// guestStatus is the guest's control service.
type guestStatus func() (*sealvolv1.StatusResponse, error)

func (g guestStatus) Status(context.Context, *sealvolv1.StatusRequest) (*sealvolv1.StatusResponse, error) {
	r, err := g()
	return r, errgrpc.ToGRPC(err)
}

func (guestStatus) Receipt(context.Context, *sealvolv1.ReceiptRequest) (*sealvolv1.ReceiptResponse, error) {
	return nil, errgrpc.ToGRPC(errdefs.ErrNotImplemented)
}

func newNode(t *testing.T, register func(*ttrpc.Server)) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "sv") // short: the path of a socket has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	register(server)
	socket := filepath.Join(dir, "guest")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(context.Background(), l) }()
	t.Cleanup(func() { server.Close(); <-served })

	n := &node{}
	n.inspector.guests = guests{timeout: 10 * time.Second, Node: guest.Node{
		Roots: []string{filepath.Join(dir, "go"), filepath.Join(dir, "rs"), filepath.Join(dir, "absent")},
		Dial: func(ctx context.Context, cid, port uint32) (net.Conn, error) {
			n.dialed = append(n.dialed, fmt.Sprintf("%d:%d", cid, port))
			if cid != 7 {
				return nil, errors.New("no such device")
			}
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	return n
}

// sandbox adds a sandbox whose shim gives the answer for /agent-url.
func (n *node) sandbox(t *testing.T, root int, id, answer string) {
	t.Helper()
	dir := filepath.Join(n.Roots[root], id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "shim-monitor.sock"))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) })
	server := &http.Server{Handler: mux}
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-served })
}

func (n *node) inspect(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	var out bytes.Buffer
	err = n.run(t.Context(), args, &out)
	return out.String(), err
}

func answering(r *sealvolv1.StatusResponse) func(*ttrpc.Server) {
	return func(s *ttrpc.Server) {
		sealvolv1.RegisterControlService(s, guestStatus(func() (*sealvolv1.StatusResponse, error) { return r, nil }))
	}
}

// fullStatus has a volume in use, one closed and one failed.
func fullStatus() *sealvolv1.StatusResponse {
	return &sealvolv1.StatusResponse{
		Version: "v0.1.0", ResidentBytes: 14 << 20, Tee: "sev_guest",
		Policy: &sealvolv1.Policy{
			Source: "init-data", InForce: true, Digest: strings.Repeat("5e", 32),
			InitData: &sealvolv1.InitData{Algorithm: "sha384", Digest: strings.Repeat("0d", 48)},
			Containers: []*sealvolv1.Container{
				{Name: "my-container", Rootfs: "host", ArgsPinned: true, Id: strings.Repeat("c0", 32), State: "started"},
				{Name: "sidecar", Rootfs: "host"},
			},
		},
		Volumes: []*sealvolv1.Volume{
			{
				Name: "encrypted", State: "open", Layering: "memory-tags", Suite: "aegis128-random", FsType: "ext4",
				CipherDriver: "aegis128-aesni", SizeBytes: 1 << 30, Device: "vda", PciPath: "02/01",
				Mappings: []*sealvolv1.Mapping{
					{Name: "encrypted_disk_k3x9q", Number: "253:2", SizeBytes: 1 << 30,
						Table: "0 2097152 crypt capi:aegis128-random :16:logon:sealvol:encrypted 0 253:1 0 2 integrity:32:aead sector_size:4096"},
					{Name: "encrypted_disk_k3x9q_dif", Number: "253:1", SizeBytes: 1 << 30,
						Table: "0 2097152 integrity 253:0 0 32 D 4 block_size:4096 meta_device:7:0 journal_sectors:64 buffer_sectors:8"},
					{Name: "encrypted_disk_k3x9q_cut", Number: "253:0", SizeBytes: 1 << 30, Table: "0 2097152 linear 254:0 0"},
				},
				Mounts: []*sealvolv1.Mount{
					{Container: "my-container", Path: "/mnt/encrypted", Options: []string{"nosuid", "nodev"}},
					{Container: "sidecar", Path: "/data", ReadOnly: true},
				},
				Counters: &sealvolv1.Counters{TagBytes: 3 << 20, ReadyMicros: 1031000},
				Created:  1772366400, Opened: 1772367000,
			},
			{Name: "models", State: "closed", Layering: "memory-tags", Suite: "aes-xts-random+hmac-sha256", FsType: "ext4", SizeBytes: 20 << 30},
			{Name: "scratch", State: "failed", Layering: "memory-tags", Error: "not closed cleanly", Device: "vdc", PciPath: "02/03"},
		},
		Warnings: []string{"container my-container: its root file system comes from the host, so the host can run code in it"},
	}
}

func luksStatus() *sealvolv1.StatusResponse {
	return &sealvolv1.StatusResponse{Version: "v0.1.0", Tee: "none", Policy: &sealvolv1.Policy{Source: "image", Digest: strings.Repeat("0a", 32)},
		Volumes: []*sealvolv1.Volume{{
			Name: "encrypted", State: "degraded", Faults: &sealvolv1.Faults{Count: 3, AtLeast: true, FirstSector: 2048, FirstOperation: "write"}, Layering: "luks2", Suite: "aes-xts-plain64+hmac-sha256", FsType: "ext4", Device: "vda", PciPath: "02/01",
			Mappings: []*sealvolv1.Mapping{
				{Name: "encrypted_disk_k3x9q", Number: "253:1", SizeBytes: 10<<30 - 512<<20,
					Table: "0 19922944 crypt capi:authenc(hmac(sha256),xts(aes))-plain64 " + strings.Repeat("0", 192) + " 0 253:0 0 2 integrity:32:aead sector_size:4096"},
				{Name: "encrypted_disk_k3x9q_dif", Number: "253:0", SizeBytes: 10<<30 - 512<<20,
					Table: "0 19922944 integrity 254:0 32768 32 J 6 journal_sectors:64 block_size:4096"},
			},
			Mounts: []*sealvolv1.Mount{{Container: "my-container", Path: "/mnt/encrypted", ReadOnly: true}},
		}}}
}

func TestOutput(t *testing.T) {
	t.Parallel()
	for name, status := range map[string]*sealvolv1.StatusResponse{
		"memory-tags": fullStatus(),
		"luks2":       luksStatus(),
		"empty":       {},
	} {
		for _, format := range []string{"table", "json"} {
			t.Run(name+"."+format, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, answering(status))
				n.sandbox(t, 0, "3f2a9", "vsock://7:1024")
				got, err := n.inspect(t, "-o", format, "3f2")
				if err != nil {
					t.Fatal(err)
				}
				golden := filepath.Join("testdata", name+"."+format)
				if *update {
					if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(string(want), got); diff != "" {
					t.Errorf("differs from %s (-want +got), see -update:\n%s", golden, diff)
				}
			})
		}
	}
}

func TestCIDNeedsNoKata(t *testing.T) {
	t.Parallel()
	n := newNode(t, answering(&sealvolv1.StatusResponse{}))
	out, err := n.inspect(t, "--cid", "7")
	if err != nil || !strings.Contains(out, "vsock CID 7") || strings.Contains(out, "sandbox:") {
		t.Errorf("%v\n%s", err, out)
	}
	if want := fmt.Sprint([]string{"7:1040"}); fmt.Sprint(n.dialed) != want {
		t.Errorf("dialed %v, want %v", n.dialed, want)
	}
}

func TestSandboxIsFoundByUniquePrefix(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		arg  string
		want string // part of the error; empty for success
	}{
		"whole id":                      {"aaa1", ""},
		"unique start":                  {"b", ""},
		"id that is also a start":       {"cc", ""},
		"start of two":                  {"aaa", `"aaa" is the start of 2 sandboxes, give more of the id: aaa1, aaa2`},
		"unknown":                       {"zz", "`crictl pods`"},
		"folder without a shim":         {"dead", `no running Kata sandbox "dead"`},
		"way out of the folder":         {"../go/aaa1", "is no sandbox id"},
		"folder above":                  {"..", "is no sandbox id"},
		"terminal escape":               {"\x1b[2J", "is no sandbox id"},
		"shim of another hypervisor":    {"hybrid", "give --cid"},
		"shim that names the host":      {"host", "CID 2, which is no guest's"},
		"shim that names too large CID": {"large", "CID 9999999999, which is no guest's"},
		"shim that talks too much":      {"chatty", "only hypervisors with vhost-vsock"},
		"guest that is gone":            {"gone", "no control service on vsock port 1040: no such device"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, answering(&sealvolv1.StatusResponse{}))
			n.sandbox(t, 0, "aaa1", "vsock://7:1024")
			n.sandbox(t, 1, "aaa2", "vsock://7:1024")
			n.sandbox(t, 1, "bbbb", "vsock://7:1024")
			n.sandbox(t, 0, "cc", "vsock://7:1024")
			n.sandbox(t, 0, "ccc", "vsock://8:1024")
			n.sandbox(t, 0, "hybrid", "hvsock:///run/vc/vm/x/ch.sock:1024")
			n.sandbox(t, 0, "host", "vsock://2:1024")
			n.sandbox(t, 0, "large", "vsock://9999999999:1024")
			n.sandbox(t, 0, "chatty", "vsock://7:1024"+strings.Repeat("\n", 1<<20))
			n.sandbox(t, 0, "gone", "vsock://9:1024")
			if err := os.MkdirAll(filepath.Join(n.Roots[0], "dead"), 0o755); err != nil {
				t.Fatal(err)
			}
			_, err := n.inspect(t, tc.arg)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if err != nil && strings.ContainsFunc(err.Error(), guest.Unprintable) {
				t.Errorf("unprintable error %q", err)
			}
		})
	}
}

func TestForgedAnswersAreRefused(t *testing.T) {
	t.Parallel()
	many := make([]*sealvolv1.Volume, maxItems+1)
	for i := range many {
		many[i] = &sealvolv1.Volume{}
	}
	for name, tc := range map[string]struct {
		change func(*sealvolv1.StatusResponse)
		want   string
	}{
		"escape in a volume's name": {func(r *sealvolv1.StatusResponse) { r.Volumes[1].Name = "a\x1b[31m" }, `status.volumes[1].name holds the character '\x1b'`},
		"newline in a warning":      {func(r *sealvolv1.StatusResponse) { r.Warnings[0] = "a\nb" }, "status.warnings[0]"},
		"text that runs backwards":  {func(r *sealvolv1.StatusResponse) { r.Volumes[0].Mounts[0].Path = "/a\u202eb" }, "path"},
		"no-break space":            {func(r *sealvolv1.StatusResponse) { r.Version = "a\u00a0b" }, "status.version"},
		"too long":                  {func(r *sealvolv1.StatusResponse) { r.Version = strings.Repeat("a", maxText+1) }, "more than 4096"},
		"too many":                  {func(r *sealvolv1.StatusResponse) { r.Volumes = many }, "more than 1024"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := fullStatus()
			tc.change(r)
			out, err := newNode(t, answering(r)).inspect(t, "--cid", "7")
			if err == nil || out != "" || !strings.Contains(err.Error(), "damaged or forged") || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, output %q", err, out)
			}
		})
	}
}

func TestUnmaskedKeyIsNotPrinted(t *testing.T) {
	t.Parallel()
	const key = "00112233445566778899aabbccddeeff"
	for name, table := range map[string]string{
		"crypt":     "0 8 crypt capi:aegis128-random " + key + " 0 253:0 0 1 integrity:32:aead",
		"integrity": "0 8 integrity 253:0 0 32 D 1 internal_hash:hmac(sha256):" + key,
	} {
		for _, format := range []string{"table", "json"} {
			r := &sealvolv1.StatusResponse{Volumes: []*sealvolv1.Volume{{Name: "v", Mappings: []*sealvolv1.Mapping{{Name: "m", Table: table}}}}}
			out, err := newNode(t, answering(r)).inspect(t, "-o", format, "--cid", "7")
			if err != nil || strings.Contains(out, key) || !strings.Contains(out, "did not mask a key of mapping m") {
				t.Errorf("%s as %s: %v\n%s", name, format, err, out)
			}
		}
	}
}

func TestNewerGuestIsNoted(t *testing.T) {
	t.Parallel()
	r := &sealvolv1.StatusResponse{Volumes: []*sealvolv1.Volume{{Name: "v"}}}
	r.Volumes[0].ProtoReflect().SetUnknown([]byte{0xf8, 0x3f, 1}) // field 1023
	out, err := newNode(t, answering(r)).inspect(t, "--cid", "7")
	if err != nil || !strings.Contains(out, "more than this version of sealvol understands") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestGuestErrors(t *testing.T) {
	t.Parallel()
	failing := func(err error) func(*ttrpc.Server) {
		return func(s *ttrpc.Server) {
			sealvolv1.RegisterControlService(s, guestStatus(func() (*sealvolv1.StatusResponse, error) { return nil, err }))
		}
	}
	for name, tc := range map[string]struct {
		guest func(*ttrpc.Server)
		want  string
	}{
		"other version": {func(*ttrpc.Server) {}, "another version than sealvol.v1"},
		"error":         {failing(fmt.Errorf("not ready: %w", errdefs.ErrUnavailable)), "control service: not ready"},
		"escape":        {failing(errors.New("\x1b[31m")), "cannot be printed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := newNode(t, tc.guest).inspect(t, "--cid", "7")
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func TestGuestThatDoesNotAnswerEndsAtTheTimeout(t *testing.T) {
	t.Parallel()
	n := newNode(t, func(*ttrpc.Server) {})
	ours, guests := net.Pipe()
	defer guests.Close()
	go io.Copy(io.Discard, guests)
	n.inspector.Dial = func(context.Context, uint32, uint32) (net.Conn, error) { return ours, nil }
	if _, err := n.inspect(t, "--timeout", "50ms", "--cid", "7"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		args           []string
		status         int
		stdout, stderr string // parts
	}{
		"nothing":            {nil, 2, "", "Commands:"},
		"help":               {[]string{"--help"}, 0, "inspect", ""},
		"unknown command":    {[]string{"seal"}, 2, "", `no command "seal"; see sealvol help`},
		"help of a command":  {[]string{"inspect", "--help"}, 0, "proves nothing", ""},
		"no sandbox":         {[]string{"inspect"}, 2, "", "crictl pods -q"},
		"unknown flag":       {[]string{"inspect", "-x"}, 2, "", "see sealvol inspect --help"},
		"unknown format":     {[]string{"inspect", "-o", "yaml", "a"}, 2, "", "-o yaml is neither table nor json"},
		"flag too late":      {[]string{"inspect", "a", "-o", "json"}, 2, "", "flags go before SANDBOX"},
		"CID and sandbox":    {[]string{"inspect", "--cid", "3", "a"}, 2, "", `unexpected argument "a"`},
		"CID that is none":   {[]string{"inspect", "--cid", "4294967296"}, 2, "", "is no CID"},
		"no sandbox like it": {[]string{"inspect", "a"}, 1, "", `no running Kata sandbox "a"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, func(*ttrpc.Server) {})
			var out, errs bytes.Buffer
			got := run(t.Context(), tc.args, []command{{"inspect", inspectShort, n.run}}, &out, &errs)
			if got != tc.status || !strings.Contains(out.String(), tc.stdout) || !strings.Contains(errs.String(), tc.stderr) {
				t.Errorf("status %d\nstdout %s\nstderr %s", got, &out, &errs)
			}
			if (out.Len() > 0) != (tc.stdout != "") || (errs.Len() > 0) != (tc.stderr != "") {
				t.Errorf("on the wrong stream: stdout %q, stderr %q", &out, &errs)
			}
		})
	}
}

// FuzzReport gives hostile answers to both outputs; nothing unprintable may
// come out, and nothing may panic.
func FuzzReport(f *testing.F) {
	for _, r := range []*sealvolv1.StatusResponse{fullStatus(), luksStatus(), {}} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := report{CID: 7, Status: &sealvolv1.StatusResponse{}}
		if proto.Unmarshal(b, r.Status) != nil {
			return
		}
		var err error
		if r.notes, err = check(r.Status); err != nil {
			return
		}
		var out bytes.Buffer
		if err := errors.Join(r.writeTable(&out), r.writeJSON(&out)); err != nil {
			t.Fatal(err)
		}
		for _, c := range out.String() {
			if c != '\n' && guest.Unprintable(c) {
				t.Fatalf("prints %q", c)
			}
		}
	})
}
