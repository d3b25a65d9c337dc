package main

import (
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestShippedConfigurationIsTheDefault(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../nri.conf")
	if err != nil {
		t.Fatal(err)
	}
	// The shipped file sets every key, so that it documents every default.
	for _, key := range []string{"runtime_handlers", "published_dir", "log_level"} {
		if !slices.ContainsFunc(strings.Split(string(text), "\n"), func(line string) bool {
			return strings.HasPrefix(line, key+" = ")
		}) {
			t.Errorf("nri.conf does not set %s", key)
		}
	}
	for name, text := range map[string][]byte{"nri.conf": text, "empty": nil} {
		got, err := parseConfig(text)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(defaultConfig(), got, cmp.AllowUnexported(config{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestConfigurationIsRead(t *testing.T) {
	t.Parallel()
	got, err := parseConfig([]byte("runtime_handlers = ['', 'cc-*', 'tdx']\npublished_dir = '/run/driver'\nlog_level = 'debug'"))
	if err != nil {
		t.Fatal(err)
	}
	want := config{handlers: handlerPatterns{"", "cc-*", "tdx"}, published: "/run/driver", logLevel: slog.LevelDebug}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(config{})); diff != "" {
		t.Error(diff)
	}
}

func TestConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ text, want string }{
		"no TOML":           {"{", "configuration"},
		"an unknown key":    {"handlers = ['kata']", `unknown key "handlers"`},
		"a table":           {"[nri]\nlog_level = 'info'", "unknown key"},
		"no handler":        {"runtime_handlers = []", "empty"},
		"another type":      {"runtime_handlers = 'kata'", "runtime_handlers"},
		"a bad pattern":     {"runtime_handlers = ['kata[']", "syntax error in pattern"},
		"a relative folder": {"published_dir = 'published'", "published_dir"},
		"no folder":         {"published_dir = ''", "published_dir"},
		"no such level":     {"log_level = 'loud'", "loud"},
		"a key twice":       {"log_level = 'info'\nlog_level = 'info'", "log_level"},
		"trailing things":   {"log_level = 'info' x", "configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := parseConfig([]byte(test.text)); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, not an invalid argument with %q", err, test.want)
			}
		})
	}
}

func TestRuntimeHandlersMatch(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		patterns handlerPatterns
		handler  string
		want     bool
	}{
		{handlerPatterns{"kata*"}, "kata", true},
		{handlerPatterns{"kata*"}, "kata-qemu-snp", true},
		{handlerPatterns{"kata*"}, "runc", false},
		{handlerPatterns{"kata*"}, "my-kata", false},
		{handlerPatterns{"kata*"}, "Kata", false},
		{handlerPatterns{"kata*"}, "", false},
		{handlerPatterns{"*"}, "runc", true},
		{handlerPatterns{"*"}, "", false},
		{handlerPatterns{"kata", ""}, "", true},
		{handlerPatterns{"kata", ""}, "runc", false},
	} {
		if got := test.patterns.match(test.handler); got != test.want {
			t.Errorf("%q matches %q: %v", test.patterns, test.handler, got)
		}
	}
}
