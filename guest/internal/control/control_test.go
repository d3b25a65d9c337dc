package control_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/sealvol/sealvol/guest/api/receipt"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type sandbox struct{}

func (sandbox) Describe() (*sealvolv1.Policy, []string) {
	return &sealvolv1.Policy{
		Source: "init-data", Digest: "d", InForce: true, InitData: &sealvolv1.InitData{Algorithm: "sha384", Digest: "i"},
		Containers: []*sealvolv1.Container{{Name: "app", Rootfs: "host", ArgsPinned: true, Id: "c1", State: "started"}},
	}, []string{"w"}
}

type volumes struct{}

func (volumes) Status() []*sealvolv1.Volume {
	return []*sealvolv1.Volume{
		{
			Name: "data", State: "open", Layering: "memory-tags", Suite: "aegis128-random", CipherDriver: "aesni", FsType: "ext4", SizeBytes: 4096,
			PciPath: "02/01", Created: 1, Opened: 2, Device: "vda",
			Mappings: []*sealvolv1.Mapping{{Name: "m", Table: "0 8 crypt"}},
			Mounts:   []*sealvolv1.Mount{{Container: "app", Path: "/data", ReadOnly: true, Options: []string{"nodev"}}},
			Faults:   &sealvolv1.Faults{Count: 3},
		},
		{Name: "lost", State: "failed", Error: "not closed cleanly"},
	}
}

// tee answers with the report data, or fails.
type tee struct{ err error }

func (tee) Provider() string { return "sev_guest" }

func (t tee) Quote(_ context.Context, reportData [64]byte) ([]byte, error) {
	return reportData[:], t.err
}

// serve serves and returns a client.
func serve(t *testing.T, s control.Service) sealvolv1.ControlService {
	t.Helper()
	s.Version, s.Sandbox, s.Volumes = "v", sandbox{}, volumes{}
	s.Now = func() time.Time { return time.Unix(1500000000, 999).In(time.FixedZone("somewhere", 3600)) }
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "control"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(c)
	t.Cleanup(func() { client.Close() })
	return sealvolv1.NewControlClient(client)
}

func TestStatusTellsPolicyVolumesAndMemory(t *testing.T) {
	t.Parallel()
	got, err := serve(t, control.Service{}).Status(t.Context(), &sealvolv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got.Version != "v" || got.Policy.Digest != "d" || got.Volumes[0].Name != "data" || got.Warnings[0] != "w" || got.ResidentBytes < 1<<20 {
		t.Errorf("got %v", got)
	}
	if got.Tee != "none" {
		t.Errorf("a guest without TEE says %q", got.Tee)
	}
}

// nonce is one that may be used.
func nonce() []byte { return []byte("0123456789abcdef") }

func TestReceiptSaysWhatIsSealedAndIsQuoted(t *testing.T) {
	t.Parallel()
	got, err := serve(t, control.Service{TEE: tee{}}).Receipt(t.Context(), &sealvolv1.ReceiptRequest{Nonce: nonce()})
	if err != nil {
		t.Fatal(err)
	}
	r, err := receipt.Verify(got.Quote, got.Receipt, nonce())
	if err != nil {
		t.Fatalf("%v: a relying party could not check %s", err, got.Receipt)
	}
	want := receipt.Receipt{
		Version: 1, Service: "v", TEE: "sev_guest", Nonce: "30313233343536373839616263646566", Issued: time.Unix(1500000000, 0).UTC(),
		Policy:     receipt.Policy{Source: "init-data", Digest: "d", InForce: true, InitData: &receipt.InitData{Algorithm: "sha384", Digest: "i"}},
		Containers: []receipt.Container{{Name: "app", RootFS: "host", ArgsPinned: true, State: "started", ID: "c1"}},
		Volumes: []receipt.Volume{
			{
				Name: "data", State: "open", Layering: "memory-tags", Suite: "aegis128-random", Driver: "aesni", FSType: "ext4", SizeBytes: 4096,
				PCIPath: "02/01", Created: time.Unix(1, 0).UTC(), Opened: time.Unix(2, 0).UTC(), FailedIO: 3,
				Mounts: []receipt.Mount{{Container: "app", Path: "/data", ReadOnly: true, Options: []string{"nodev"}}},
			},
			{Name: "lost", State: "failed", Error: "not closed cleanly", Mounts: []receipt.Mount{}},
		},
		Warnings: []string{"w"},
	}
	if d := cmp.Diff(want, r); d != "" {
		t.Error(d)
	}
}

func TestReceiptWithoutTEEOrNonceHasNoQuote(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		service control.Service
		nonce   []byte
		tee     string
	}{
		"no TEE":   {control.Service{}, nonce(), "none"},
		"no nonce": {control.Service{TEE: tee{err: errors.New("asked for a quote that could be an old one")}}, nil, "sev_guest"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := serve(t, c.service).Receipt(t.Context(), &sealvolv1.ReceiptRequest{Nonce: c.nonce})
			if err != nil || len(got.Quote) > 0 {
				t.Fatalf("got %v, %v", got, err)
			}
			r, err := receipt.Parse(got.Receipt)
			if err != nil || r.TEE != c.tee || r.Nonce != hex.EncodeToString(c.nonce) {
				t.Errorf("got %v, %v", r, err)
			}
		})
	}
}

func TestReceiptRefusesANonceThatDoesNotDo(t *testing.T) {
	t.Parallel()
	client := serve(t, control.Service{TEE: tee{}})
	for _, n := range []int{1, 15, 65, 1 << 20} {
		_, err := client.Receipt(t.Context(), &sealvolv1.ReceiptRequest{Nonce: make([]byte, n)})
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestReceiptFailsWithTheTEE(t *testing.T) {
	t.Parallel()
	client := serve(t, control.Service{TEE: tee{err: fmt.Errorf("no quote: %w", errdefs.ErrUnavailable)}})
	got, err := client.Receipt(t.Context(), &sealvolv1.ReceiptRequest{Nonce: nonce()})
	if !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
		t.Errorf("a receipt that was to be quoted came without: %v, %v", got, err)
	}
}
