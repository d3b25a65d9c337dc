package agent_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/sealvol/sealvol/guest/internal/agent"
)

// TestMain lets the test binary play the agent: its configuration file says how.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "--config" {
		play(os.Args[2])
		return
	}
	goleak.VerifyTestMain(m)
}

func play(config string) {
	text, err := os.ReadFile(config)
	if err != nil {
		panic(err)
	}
	how, socket, _ := strings.Cut(string(text), " ")
	if how == "dies" {
		os.Exit(3)
	}
	fmt.Println(os.Environ())
	if how == "serves" {
		l, err := net.Listen("unix", socket)
		if err != nil {
			panic(err)
		}
		for {
			c, err := l.Accept()
			if err != nil {
				panic(err)
			}
			c.Close()
		}
	}
	time.Sleep(time.Hour)
}

func config(t *testing.T, how string) (agent.Config, *os.File) {
	t.Helper()
	dir := t.TempDir()
	cfg := agent.Config{Path: os.Args[0], ConfigFile: filepath.Join(dir, "agent.toml"), Socket: filepath.Join(dir, "run", "agent.sock")}
	if err := os.WriteFile(cfg.ConfigFile, []byte(how+" "+cfg.Socket), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	cfg.Output = out
	return cfg, out
}

func TestStartWaitsForTheSocketAndCleansTheEnvironment(t *testing.T) {
	t.Setenv("KATA_AGENT_SERVER_ADDR", "vsock://-1:1024")
	cfg, out := config(t, "serves")
	a, err := agent.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if st, err := os.Stat(filepath.Dir(cfg.Socket)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("directory of the socket: %v, %v", st.Mode(), err)
	}
	select {
	case <-a.Done():
		t.Error("it ended")
	default:
	}
	a.Stop()
	<-a.Done()
	if a.Err() == nil {
		t.Error("no error after its end")
	}
	env, err := os.ReadFile(out.Name())
	if err != nil || !strings.HasPrefix(string(env), "[PATH=") || strings.Count(string(env), "=") != 1 {
		t.Errorf("environment %s, %v", env, err)
	}
}

func TestAgentThatDiesAtOnceIsTold(t *testing.T) {
	t.Parallel()
	cfg, _ := config(t, "dies")
	if _, err := agent.Start(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v", err)
	}
}

func TestAgentThatDoesNotAnswerIsKilled(t *testing.T) {
	t.Parallel()
	cfg, _ := config(t, "sleeps")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := agent.Start(ctx, cfg); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
}

func TestAbsentAgent(t *testing.T) {
	t.Parallel()
	cfg, _ := config(t, "serves")
	cfg.Path = "/absent/kata-agent"
	if _, err := agent.Start(t.Context(), cfg); err == nil {
		t.Error("started")
	}
}
