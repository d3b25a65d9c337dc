package gate

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/sealvol/sealvol/policy"
)

// BenchmarkRPC measures one call of the host at a time, with the gate and without, and gives
// the percentiles in microseconds.
func BenchmarkRPC(b *testing.B) {
	h := start(b)
	conn, err := h.gate.Dial(context.Background())
	must(b, err)
	client := ttrpc.NewClient(conn)
	b.Cleanup(func() { client.Close() })
	output := &agent.WriteStreamRequest{ContainerId: "c1", ExecId: "c1", Data: make([]byte, 32<<10)}
	for name, host := range map[string]agent.AgentServiceService{"direct": agent.NewAgentServiceClient(client), "gate": h.host} {
		b.Run("StatsContainer/"+name, func(b *testing.B) {
			measure(b, func() error {
				_, err := host.StatsContainer(context.Background(), &agent.StatsContainerRequest{ContainerId: "c1"})
				return err
			})
		})
		b.Run("WriteStdin32K/"+name, func(b *testing.B) {
			measure(b, func() error {
				_, err := host.WriteStdin(context.Background(), output)
				return err
			})
		})
	}
}

func measure(b *testing.B, call func() error) {
	times := make([]time.Duration, 0, b.N)
	for b.Loop() {
		start := time.Now()
		if err := call(); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	at := func(q float64) float64 { return float64(times[int(q*float64(len(times)-1))].Nanoseconds()) / 1e3 }
	b.ReportMetric(at(0.5), "p50-µs")
	b.ReportMetric(at(0.99), "p99-µs")
}

// BenchmarkDecide is the part of a CreateContainer that is the real policy's.
func BenchmarkDecide(b *testing.B) {
	pol, err := policy.Load(b.Context(), []byte(realPolicy))
	must(b, err)
	req := sealedCreate()
	for b.Loop() {
		if _, err := pol.Decide(b.Context(), "CreateContainer", req, policy.State{}); err != nil {
			b.Fatal(err)
		}
	}
}
