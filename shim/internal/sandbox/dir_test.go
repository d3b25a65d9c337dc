package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/process"
)

func TestAFolderNamesItsSandbox(t *testing.T) {
	t.Parallel()
	for _, ids := range [][2]string{{"k8s.io", "abc"}, {"a-b", "c"}, {"a", "b-c"}} {
		d, err := newDir("/run/s", ids[0], ids[1])
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseDir(d.path); err != nil || got != d {
			t.Errorf("%v became %+v, %v", ids, got, err)
		}
	}
	for _, path := range []string{"/run/s/abc", "/run/s/a:b:c", "/run/s/a:", "/run/s/:a", "/run/s/a:..", "a:b/../c:d", "/run/s/a:b/"} {
		if got, err := parseDir(path); err == nil {
			t.Errorf("%q is taken for %+v", path, got)
		}
	}
}

func TestAFolderOfAnotherNameIsRefused(t *testing.T) {
	t.Parallel()
	for _, ids := range [][2]string{{"", "x"}, {"x", ""}, {"..", "x"}, {"x", "../y"}, {"x", "a/b"}, {"a:b", "c"}, {"x", strings.Repeat("a", 77)}} {
		if _, err := newDir("/run/s", ids[0], ids[1]); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v", ids, err)
		}
	}
	if _, err := newDir("/"+strings.Repeat("d", 60), "k8s.io", strings.Repeat("a", 64)); err == nil || !strings.Contains(err.Error(), "choose a shorter state_dir") {
		t.Errorf("a path that no socket can have: %v", err)
	}
}

func TestALockIsHeldOnce(t *testing.T) {
	t.Parallel()
	d := testDir(t)
	if _, err := d.lock(false); !errdefs.IsNotFound(err) {
		t.Errorf("without the folder: %v", err)
	}
	first, err := d.lock(true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.lock(true); !errdefs.IsUnavailable(err) {
		t.Errorf("while it is held: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := d.lock(false)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestTheStateComesBack(t *testing.T) {
	t.Parallel()
	d := testDir(t)
	if _, err := d.read(); !errdefs.IsNotFound(err) {
		t.Errorf("without a state: %v", err)
	}
	if err := os.MkdirAll(d.path, 0o700); err != nil {
		t.Fatal(err)
	}
	want := state{
		Version: stateVersion, StockShim: "/kata", Stock: &process.ID{Pid: 7, Start: 8, Boot: "9"},
		Socket: "/run/s", Answer: []byte("a"), Containers: map[string]string{"sb": "/b"},
	}
	if err := d.write(want); err != nil {
		t.Fatal(err)
	}
	got, err := d.read()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestAStateThatDoesNotFitIsRefused(t *testing.T) {
	t.Parallel()
	const good = `{"version":1,"stock_shim":"/kata","stock":{"pid":7,"start":8,"boot":"9"},"devices":["8:16"],"containers":{"sb":"/b"}}`
	if _, err := parseState([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string][2]string{
		"nothing":                  {good, ""},
		"half a file":              {`"}}`, ""},
		"a later version":          {`"version":1`, `"version":2`},
		"an unknown key":           {`"version"`, `"x":1,"version"`},
		"trailing data":            {`"/b"}}`, `"/b"}}{}`},
		"init as the stock shim":   {`"pid":7`, `"pid":1`},
		"a group as the stock":     {`"pid":7`, `"pid":-7`},
		"a relative shim":          {`"/kata"`, `"kata"`},
		"no shim":                  {`"/kata"`, `""`},
		"a bundle that climbs":     {`"/b"`, `"/b/../c"`},
		"a container that is none": {`"sb"`, `"../sb"`},
		"a device that is none":    {`"8:16"`, `"8:16\n"`},
	} {
		text := strings.Replace(good, edit[0], edit[1], 1)
		if _, err := parseState([]byte(text)); err == nil {
			t.Errorf("%s: %s is taken", name, text)
		}
	}
}

func TestADeviceIsFreeUnlessAnotherSandboxMayHaveIt(t *testing.T) {
	t.Parallel()
	d := testDir(t)
	number := hotplug.Device{Major: 8, Minor: 16}
	for name, test := range map[string]struct {
		sandbox, state string
		free           bool
	}{
		"its own state":                {"sb", `{"version":1,"stock_shim":"/kata","devices":["8:16"],"containers":{}}`, true},
		"another's with other devices": {"other", `{"version":1,"stock_shim":"/kata","devices":["8:1","8:160"],"containers":{}}`, true},
		"another's with the device":    {"other", `{"version":1,"stock_shim":"/kata","devices":["8:1","8:16"],"containers":{}}`, false},
		"another's that is damaged":    {"other", `{`, false},
		"no folder of a sandbox's":     {"..", `{`, true},
	} {
		path := filepath.Join(filepath.Dir(d.path), "ns"+separator+test.sandbox)
		if err := errors.Join(os.MkdirAll(path, 0o700), os.WriteFile(filepath.Join(path, "state.json"), []byte(test.state), 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := d.checkFree(number); test.free != (err == nil) || err != nil && !errdefs.IsUnavailable(err) {
			t.Errorf("%s: got %v", name, err)
		}
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestContainersEndBeforeTheirSandbox(t *testing.T) {
	t.Parallel()
	d := dir{sandbox: "m"}
	got := d.containers(state{Containers: map[string]string{"z": "", "m": "", "a": "", "n": ""}})
	if diff := cmp.Diff([]string{"a", "n", "z", "m"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestParseCall(t *testing.T) {
	t.Parallel()
	args := []string{"-namespace", "k8s.io", "-address", "/a", "-publish-binary", "/p", "-id", "c", "-bundle", "/b", "-debug", "delete"}
	call, err := ParseCall(args)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(args, call.args()); diff != "" {
		t.Error(diff)
	}
	for name, test := range map[string]struct {
		args string
		is   func(error) bool
	}{
		"the version":       {"-v", errdefs.IsNotImplemented},
		"an unknown flag":   {"-later x -namespace n -id c start", errdefs.IsNotImplemented},
		"no action":         {"-namespace n -id c", errdefs.IsNotImplemented},
		"another action":    {"-namespace n -id c serve", errdefs.IsNotImplemented},
		"two actions":       {"-namespace n -id c start delete", errdefs.IsNotImplemented},
		"no id":             {"-namespace n start", errdefs.IsInvalidArgument},
		"no namespace":      {"-id c start", errdefs.IsInvalidArgument},
		"a path for an id":  {"-namespace n -id ../c start", errdefs.IsInvalidArgument},
		"a path as a space": {"-namespace n/m -id c start", errdefs.IsInvalidArgument},
	} {
		if _, err := ParseCall(strings.Fields(test.args)); !test.is(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestRemoveTree(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "sb")
	if err := os.MkdirAll(filepath.Join(path, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 { // Also when it is not there.
		if err := removeTree(path); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("it is still there: %v", err)
		}
	}
}

func testDir(t *testing.T) dir {
	t.Helper()
	root, err := os.MkdirTemp("", "shim-") // A socket's path is short.
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	d, err := newDir(root, "ns", "sb")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(`{"version":1,"stock_shim":"/kata","stock":{"pid":7,"start":8,"boot":"9"},"containers":{"sb":"/b"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseState(data)
		if err == nil && s.Stock != nil && s.Stock.Pid <= 1 {
			t.Errorf("%q gives pid %d", data, s.Stock.Pid)
		}
	})
}
