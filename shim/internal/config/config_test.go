package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestLoadReadsTheNamedFile(t *testing.T) {
	write(t, "stock_shim = '/a/kata'\nstate_dir = '/b'\nlog_level = 'debug'\n")
	got, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	if want := (Config{StockShim: "/a/kata", StateDir: "/b", LogLevel: slog.LevelDebug}); got != want {
		t.Errorf("got %+v, not %+v", got, want)
	}
}

func TestLoadHasDefaults(t *testing.T) {
	write(t, "")
	got, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	if want := (Config{StockShim: "/opt/kata/bin/containerd-shim-kata-v2", StateDir: "/run/sealvol/shim"}); got != want {
		t.Errorf("got %+v, not %+v", got, want)
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"an unknown key":     {"stock_shin = '/a'", "stock_shin"},
		"another type":       {"state_dir = 1", "StateDir"},
		"an unknown level":   {"log_level = 'loud'", "loud"},
		"no TOML":            {"{", "invalid"},
		"a relative path":    {"stock_shim = 'kata'", "not an absolute"},
		"a path that climbs": {"state_dir = '/run/../etc'", "not an absolute"},
		"the root":           {"state_dir = '/'", "not an absolute"},
	} {
		t.Run(name, func(t *testing.T) {
			write(t, test.text)
			_, err := Load()
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an invalid argument with %q", err, test.want)
			}
		})
	}
}

func TestLoadNeedsTheFileThatTheEnvironmentNames(t *testing.T) {
	t.Setenv(Env, filepath.Join(t.TempDir(), "absent"))
	if _, err := Load(); !os.IsNotExist(err) {
		t.Errorf("got %v", err)
	}
}

func write(t *testing.T, text string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "shim.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(Env, path)
}
