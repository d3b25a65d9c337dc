package main

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// runAsDriver in the environment makes the test binary be the driver.
const runAsDriver = "SEALVOL_TEST_RUN_AS_DRIVER"

func TestMain(m *testing.M) {
	if os.Getenv(runAsDriver) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestShippedConfigurationIsTheDefault(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("csi.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(text), ""} {
		got, err := parseConfig([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(defaultConfig(), got, cmp.AllowUnexported(config{})); diff != "" {
			t.Error(diff)
		}
	}
}

func TestConfigurationIsRead(t *testing.T) {
	t.Parallel()
	got, err := parseConfig([]byte(`driver = "a.example"` + "\n" + `capacity = "500Gi"` + "\n" + `log_level = "debug"`))
	if err != nil {
		t.Fatal(err)
	}
	if got.driver != "a.example" || got.capacity != 500<<30 || got.logLevel != slog.LevelDebug {
		t.Errorf("got %+v", got)
	}
}

func TestConfigurationRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ text, want string }{
		"an unknown key":              {`size = "1Gi"`, `unknown key "size"`},
		"a repeated key":              {"driver = 'a'\ndriver = 'b'", "driver"},
		"a key of another type":       {`capacity = 5`, "capacity"},
		"a capacity that is no size":  {`capacity = "much"`, `capacity "much"`},
		"a capacity of nothing":       {`capacity = "0"`, "is not between 1"},
		"a negative capacity":         {`capacity = "-1Gi"`, "of bytes"},
		"a capacity with a fraction":  {`capacity = "100m"`, "of bytes"},
		"a relative socket":           {`socket = "csi.sock"`, "socket"},
		"a folder that climbs":        {`volumes = "/var/../etc"`, "volumes"},
		"no folder":                   {`volumes = ""`, "volumes"},
		"the root":                    {`published = "/"`, "is the root"},
		"a driver that is no name":    {`driver = "a/b"`, `driver "a/b"`},
		"a driver with a long name":   {`driver = "` + strings.Repeat("a", 60) + `"`, "driver"},
		"a level that does not exist": {`log_level = "loud"`, "loud"},
		"text that is no TOML":        {`{"driver": 1}`, "configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := parseConfig([]byte(test.text)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, not %q", err, test.want)
			}
		})
	}
}

func TestRunRefusesWhatItDoesNotUnderstand(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"a flag":                  {[]string{"-verbose"}, "not defined: -verbose, see -help"},
		"an argument":             {[]string{"start"}, `unexpected argument "start"`},
		"an absent configuration": {[]string{"-config", "/nonexistent"}, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			err := run(t.Context(), test.args, &out, &out)
			if err == nil || !strings.Contains(err.Error(), test.want) || out.Len() > 0 {
				t.Errorf("error %v, output %q, not %q", err, &out, test.want)
			}
		})
	}
}

func TestHelpNamesEveryFlag(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-help"}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	for _, name := range []string{"config", "node", "version"} {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "  -"+name) }) {
			t.Errorf("no -%s in\n%s", name, &out)
		}
	}
}
