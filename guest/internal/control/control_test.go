package control_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type sandbox struct{}

func (sandbox) Describe() (*sealvolv1.Policy, []string) {
	return &sealvolv1.Policy{Digest: "d"}, []string{"w"}
}

type volumes struct{}

func (volumes) Status() []*sealvolv1.Volume { return []*sealvolv1.Volume{{Name: "data"}} }

func TestStatusTellsPolicyVolumesAndMemory(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "control"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- control.Service{Version: "v", Sandbox: sandbox{}, Volumes: volumes{}}.Serve(ctx, l)
	}()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(c)
	defer client.Close()
	got, err := sealvolv1.NewControlClient(client).Status(ctx, &sealvolv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got.Version != "v" || got.Policy.Digest != "d" || got.Volumes[0].Name != "data" || got.Warnings[0] != "w" || got.ResidentBytes < 1<<20 {
		t.Errorf("got %v", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
