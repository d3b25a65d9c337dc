package bundle

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	source = `/run/sealvol/direct/sb/a`
	// request is a request as a JSON string, inside of another JSON.
	request = `{\"version\":1,\"volumes\":[{\"name\":\"a\",\"mountPath\":\"/mnt/a\",\"source\":\"` + source +
		`\",\"device\":{\"major\":7,\"minor\":1}}]}`
	config = `{ "ociVersion":"1.2.0", "annotations": {"x" : "<\u00e9>", "hotplug.sealvol.io/request":"` + request + `","y":"z"},
 "mounts":[{"destination":"/proc","type":"proc","source":"proc"}, {"destination":"/mnt/a","type":"bind","source":"` + source + `","options":["rbind","rw"]}],
 "later":{"big":12345678901234567890.10, "e":1E5},
 "linux":{"devices":[{"path":"/dev/a","type":"b","major":7,"minor":1},{"path":"/dev/b","type":"b","major":7,"minor":2},{"path":"/dev/c","type":"c","major":7,"minor":1}],
  "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":7,"minor":1,"access":"rwm"}],"cpu":{"shares":2}}, "x":null}}`
	taken = `{"ociVersion":"1.2.0","annotations":{"x":"<\u00e9>","y":"z"},` +
		`"mounts":[{"destination":"/proc","type":"proc","source":"proc"}, {"destination":"/mnt/a","type":"bind","source":"` + source + `","options":["rbind","rw"]}],` +
		`"later":{"big":12345678901234567890.10, "e":1E5},` +
		`"linux":{"devices":[{"path":"/dev/b","type":"b","major":7,"minor":2},{"path":"/dev/c","type":"c","major":7,"minor":1}],` +
		`"resources":{"devices":[{"allow":false,"access":"rwm"}],"cpu":{"shares":2}},"x":null}}`
)

func TestTakeLeavesEverythingElseByteForByte(t *testing.T) {
	t.Parallel()
	dir := bundle(t, config)
	path := filepath.Join(dir, "config.json")
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	r, err := Read(dir, "sb")
	if err != nil {
		t.Fatal(err)
	}
	want := []hotplug.Volume{{Name: "a", MountPath: "/mnt/a", Source: source, Backing: hotplug.Device{Major: 7, Minor: 1}}}
	if diff := cmp.Diff(want, r.Volumes); diff != "" {
		t.Error(diff)
	}
	if got, _ := os.ReadFile(path); string(got) != config {
		t.Errorf("Read has changed the file to %s", got)
	}
	if err := r.Take(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(taken, string(got)); diff != "" {
		t.Error(diff)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("the file's mode has become %v (%v)", info.Mode(), err)
	}
}

func TestTakeOfNothingLeavesTheFile(t *testing.T) {
	t.Parallel()
	const text = `{"annotations":{"a":"b"}, "mounts":null, "linux":null}`
	dir := bundle(t, text)
	before, err := os.Stat(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := Read(dir, "sb")
	if err != nil || len(r.Volumes) != 0 {
		t.Fatalf("got %+v, %v", r, err)
	}
	if err := r.Take(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(filepath.Join(dir, "config.json")); err != nil || !os.SameFile(before, after) {
		t.Errorf("the file was written again (%v)", err)
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	edit := func(old, new string) string {
		if !strings.Contains(config, old) {
			t.Fatalf("%s is not in the config", old)
		}
		return strings.Replace(config, old, new, 1)
	}
	const mount = `{"destination":"/mnt/a","type":"bind","source":"` + source + `","options":["rbind","rw"]}`
	for name, test := range map[string]struct{ text, want string }{
		"no JSON":                       {"x", "invalid character"},
		"data after the JSON":           {config + "{}", "after top-level"},
		"a malformed request":           {edit(request, "{}"), "version 0"},
		"an empty request":              {edit(request, ""), "hotplug request"},
		"another sandbox's volume":      {strings.ReplaceAll(config, "direct/sb/", "direct/sb2/"), "is not \"" + source},
		"no mount":                      {edit(mount, `{"destination":"/x","source":"/y"}`), "no mount of"},
		"two mounts":                    {edit(mount, mount+","+mount), "mounted twice"},
		"a mount elsewhere":             {edit(`"destination":"/mnt/a"`, `"destination":"/mnt/b"`), `mounted at "/mnt/b"`},
		"a mount of a second volume":    {edit(mount, mount+`,{"destination":"/b","source":"/run/sealvol/direct/sb/b"}`), "no volume of the hotplug request"},
		"a mount of all volumes":        {edit(mount, mount+`,{"destination":"/b","source":"/run/sealvol/direct"}`), "no volume of the hotplug request"},
		"a mount by another spelling":   {edit(mount, mount+`,{"destination":"/b","source":"/run//sealvol/x/../direct/sb/a"}`), "no volume of the hotplug request"},
		"a volume's mount, unrequested": {`{"mounts":[` + mount + `]}`, "no volume of the hotplug request"},
		"two requests":                  {edit(`"y":"z"`, `"hotplug.sealvol.io/request":"{}"`), "version 0"},
		"two requests, the last good":   {edit(`"x" :`, `"hotplug.sealvol.io/request":"{}", "x" :`), "ambiguous key"},
		"annotations twice":             {edit(`"later"`, `"annotations":{},"later"`), "ambiguous key"},
		"annotations in another case":   {edit(`"annotations"`, `"Annotations"`), "ambiguous key"},
		"devices in another case":       {edit(`"devices"`, `"DEVICES"`), "ambiguous key"},
		"devices that are none":         {edit(`"devices":[{"path"`, `"devices":[3,{"path"`), "devices"},
		"linux that is a list":          {`{"annotations":{"hotplug.sealvol.io/request":"` + request + `"},"mounts":[` + mount + `],"linux":[]}`, "linux: not a JSON object"},
	} {
		_, err := Read(bundle(t, test.text), "sb")
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want an invalid argument with %q", name, err, test.want)
		}
	}
}

func TestSandboxIsFoundAsTheStockShimFindsIt(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		text, id string
		own      bool
		err      string
	}{
		"CRI sandbox":       {`{"annotations":{"io.kubernetes.cri.container-type":"sandbox"}}`, "me", true, ""},
		"CRI container":     {`{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"sb"}}`, "sb", false, ""},
		"CRI-O container":   {`{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.SandboxID":"sb"}}`, "sb", false, ""},
		"dockershim":        {`{"annotations":{"io.kubernetes.docker.type":"podsandbox"}}`, "me", true, ""},
		"alone":             {`{}`, "me", true, ""},
		"unknown type":      {`{"annotations":{"io.kubernetes.cri.container-type":"x"}}`, "", false, "container type"},
		"without a sandbox": {`{"annotations":{"io.kubernetes.cri.container-type":"container"}}`, "", false, "sandbox id"},
		"a path":            {`{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"../x"}}`, "", false, "sandbox id"},
		"no JSON":           {`[]`, "", false, "cannot unmarshal"},
	} {
		id, own, err := Sandbox(bundle(t, test.text), "me")
		if test.err != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: got %v, want an invalid argument with %q", name, err, test.err)
			}
		} else if err != nil || id != test.id || own != test.own {
			t.Errorf("%s: got %q, %v, %v", name, id, own, err)
		}
	}
}

// FuzzTake holds what take gives against the same done with maps.
func FuzzTake(f *testing.F) {
	f.Add([]byte(config))
	f.Add([]byte(taken))
	f.Add([]byte(`{"annotations":{"a":"b"},"linux":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		volumes, edited, err := take(data, "sb")
		if err != nil {
			return
		}
		if len(volumes) == 0 {
			if string(edited) != string(data) {
				t.Errorf("nothing was asked for, and %q became %q", data, edited)
			}
			return
		}
		if again, _, _ := take(edited, "sb"); len(again) > 0 {
			t.Errorf("%q still asks for volumes", edited)
		}
		before, after := decode(t, data), decode(t, edited)
		delete(before["annotations"].(map[string]any), hotplug.Annotation)
		for _, spec := range []map[string]any{before, after} {
			// Their elements are filtered; the tables above say which.
			if linux, ok := spec["linux"].(map[string]any); ok {
				delete(linux, "devices")
				if resources, ok := linux["resources"].(map[string]any); ok {
					delete(resources, "devices")
				}
			}
		}
		if diff := cmp.Diff(before, after); diff != "" {
			t.Error(diff)
		}
	})
}

func decode(t *testing.T, data []byte) map[string]any {
	t.Helper()
	var object map[string]any
	if err := json.Unmarshal(data, &object); err != nil {
		t.Fatalf("%q: %v", data, err)
	}
	return object
}

func bundle(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}
