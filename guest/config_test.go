package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func load(t *testing.T, text string) (config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "guest.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return loadConfig(file)
}

func TestConfigDefaults(t *testing.T) {
	t.Parallel()
	for _, c := range []func() (config, error){
		func() (config, error) { return loadConfig("/absent") },
		func() (config, error) { return load(t, "") },
	} {
		got, err := c()
		if d := cmp.Diff(defaults(), got); err != nil || d != "" {
			t.Error(err, d)
		}
	}
}

func TestConfigSetsEveryKey(t *testing.T) {
	t.Parallel()
	got, err := load(t, `
log_level = "debug"
policy = "/etc/sealvol/policy.rego"
policy_source = "init-data"
insecure_tee = "/etc/sealvol/report"
mkfs = "/sbin/mkfs.ext4"
mkfs_xfs = "/sbin/mkfs.xfs"
cryptsetup = "/sbin/cryptsetup"
patched_kernel = true
vsock_ports = [1025]
[agent]
path = "/a"
config = "/b"
socket = "/c"
start_timeout = "90s"
`)
	if err != nil {
		t.Fatal(err)
	}
	want := config{LogLevel: slog.LevelDebug, Policy: "/etc/sealvol/policy.rego", PolicySource: sourceInitData, InsecureTEE: "/etc/sealvol/report", Mkfs: "/sbin/mkfs.ext4", MkfsXFS: "/sbin/mkfs.xfs", Cryptsetup: "/sbin/cryptsetup", PatchedKernel: true, VsockPorts: []uint32{1025}}
	want.Agent.Path, want.Agent.Config, want.Agent.Socket, want.Agent.StartTimeout = "/a", "/b", "/c", duration(90*time.Second)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestConfigRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, words string }{
		"unknown key":          {"debug_console = true", "debug_console"},
		"unknown key below":    {"[agent]\nenv = 1", "env"},
		"unknown table":        {"[gate]\nport = 1", "gate"},
		"wrong type":           {"vsock_ports = 1", "VsockPorts"},
		"port out of range":    {"vsock_ports = [-1]", ""},
		"unknown level":        {`log_level = "chatty"`, "chatty"},
		"no duration":          {"[agent]\nstart_timeout = \"soon\"", "soon"},
		"no time":              {"[agent]\nstart_timeout = \"0s\"", "start_timeout"},
		"relative agent":       {"[agent]\npath = \"kata-agent\"", "agent.path"},
		"relative mkfs":        {`mkfs = "mkfs.ext4"`, "mkfs"},
		"relative mkfs.xfs":    {`mkfs_xfs = "mkfs.xfs"`, "mkfs_xfs"},
		"relative cryptsetup":  {`cryptsetup = "cryptsetup"`, "cryptsetup"},
		"relative policy":      {`policy = "policy.rego"`, "policy"},
		"relative double":      {`insecure_tee = "report"`, "insecure_tee"},
		"unknown source":       {`policy_source = "host"`, "host"},
		"source in capitals":   {`policy_source = "Image"`, "Image"},
		"empty source":         {`policy_source = ""`, ""},
		"source of two":        {`policy_source = ["image", "init-data"]`, ""},
		"image without policy": {`policy_source = "image"`, "needs policy"},
		"not TOML":             {"{", ""},
		"the same key twice":   {"mkfs = \"/a\"\nmkfs = \"/b\"", ""},
		"the same table twice": {"[agent]\n[agent]", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := load(t, c.text); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("got %v", err)
			}
		})
	}
}
