package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// talk is the manifest of sealvol's talk.
const talk = "../../policy/author/testdata/pods/talk.yaml"

// recorded is a pod like the talk's, and what Kata's runtime really sends for it.
const (
	recordedPod      = "../../policy/author/testdata/manifests/pod-talk.yaml"
	recordedRequests = "../../policy/author/testdata/recorded/pod-talk.json"
)

// tool runs sealvol as a person would: its output, and its exit status.
func tool(t *testing.T, stdin string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	commands := []command{{"policy", policyShort, policyTool{strings.NewReader(stdin), &errs}.run}}
	status = run(t.Context(), append([]string{"policy"}, args...), commands, &out, &errs)
	return out.String(), errs.String(), status
}

// manifest is a copy of a manifest that may be overwritten.
func manifest(t *testing.T, of string) string {
	t.Helper()
	text, err := os.ReadFile(of)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "my-app.yaml")
	if err := os.WriteFile(file, text, 0o640); err != nil {
		t.Fatal(err)
	}
	return file
}

// request is a file with the request that creates the container of the recorded pod.
func request(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(recordedRequests)
	if err != nil {
		t.Fatal(err)
	}
	var record struct {
		Pods []struct {
			Requests []struct {
				Container string
				Request   json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(text, &record); err != nil {
		t.Fatal(err)
	}
	for _, r := range record.Pods[0].Requests {
		if r.Container == "my-container" {
			file := filepath.Join(t.TempDir(), "request.json")
			if err := os.WriteFile(file, r.Request, 0o600); err != nil {
				t.Fatal(err)
			}
			return file
		}
	}
	t.Fatal("the record has no container")
	return ""
}

func TestAManifestIsAnnotatedInPlace(t *testing.T) {
	t.Parallel()
	file := manifest(t, talk)
	link := filepath.Join(t.TempDir(), "link.yaml")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if out, errs, status := tool(t, "", "-f", link); status != 0 || out+errs != "" {
		t.Fatalf("status %d: %s%s", status, out, errs)
	}
	after, err := os.ReadFile(file)
	if err != nil || !strings.Contains(string(after), "io.katacontainers.config.agent.policy: ") {
		t.Errorf("%v\n%s", err, after)
	}
	if info, err := os.Lstat(file); err != nil || info.Mode() != 0o640 {
		t.Errorf("the file's mode must stay: %v, %v", info.Mode(), err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link must stay one: %v, %v", info.Mode(), err)
	}
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != 1 {
		t.Errorf("a file was left behind: %v, %v", entries, err)
	}

	piped, _, status := tool(t, string(before), "-f", "-", "-o", "-")
	if status != 0 || piped != string(after) {
		t.Errorf("standard input gave another manifest, status %d:\n%s", status, piped)
	}
	elsewhere := filepath.Join(t.TempDir(), "out.yaml")
	if _, errs, status := tool(t, string(before), "-f", "-", "-o", elsewhere); status != 0 {
		t.Errorf("status %d: %s", status, errs)
	}
	if written, err := os.ReadFile(elsewhere); err != nil || string(written) != string(after) {
		t.Errorf("%v\n%s", err, written)
	}
}

func TestAManifestThatIsRefusedStaysAsItIs(t *testing.T) {
	t.Parallel()
	file := manifest(t, talk)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("spec:\n"), []byte("spec:\n  hostPID: true\n  hostUsers: false\n"), 1)
	if err := os.WriteFile(file, text, 0o640); err != nil {
		t.Fatal(err)
	}
	_, errs, status := tool(t, "", "-f", file)
	if status != 1 || !strings.Contains(errs, "sealvol policy: Pod/my-app: spec.hostPID") || !strings.Contains(errs, "sealvol policy: Pod/my-app: spec.hostUsers") {
		t.Errorf("status %d: %s", status, errs)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, text) {
		t.Errorf("the manifest changed: %v\n%s", err, after)
	}
}

func TestOutputThatIsNoFileIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, errs, status := tool(t, "", "-f", talk, "-o", dir); status != 1 || !strings.Contains(errs, "is no regular file") {
		t.Errorf("status %d: %s", status, errs)
	}
	if _, errs, status := tool(t, "", "-f", talk, "-o", filepath.Join(dir, "absent", "out.yaml")); status != 1 || !strings.Contains(errs, "no such file") {
		t.Errorf("status %d: %s", status, errs)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("a file was left behind: %v, %v", entries, err)
	}
}

func TestFlagsSayWhatTheManifestDoesNot(t *testing.T) {
	t.Parallel()
	const text = `apiVersion: v1
kind: Pod
metadata:
  name: p
  annotations: {volume.sealvol.io/v: '{"mode": "ephemeral"}'}
spec:
  runtimeClassName: kata
  containers:
  - {name: c, image: busybox, volumeMounts: [{name: v, mountPath: /v}, {name: w, mountPath: /w}]}
  volumes:
  - {name: v, persistentVolumeClaim: {claimName: data}}
  - {name: w, ephemeral: {volumeClaimTemplate: {spec: {storageClassName: mine, resources: {requests: {storage: 1Mi}}}}}}
`
	config := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(config, []byte(`{"rootfs": {"type": "layers"}, "config": {"Cmd": ["sh"]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, status := tool(t, text, "-f", "-", "-o", "-", "--class", "mine", "--claim", "data", "--size", "v=2Mi", "--allow-exec", "sh ...",
		"--allow-exec", `["ls", "a b"]`, "--image-config", "busybox="+config, "--normalise-images", "--layering", "luks2", "--fs-type", "xfs")
	if status != 0 || errs != "" {
		t.Fatalf("status %d: %s", status, errs)
	}
	rego, errs, status := tool(t, out, "show", "--rego", "-")
	if status != 0 {
		t.Fatalf("status %d: %s", status, errs)
	}
	for _, want := range []string{
		`"args": ["sh"]`, `["sh", "..."]`, `["ls", "a b"]`, `"image": "docker.io/library/busybox:latest"`, `"layering": "luks2"`, `"fs_type": "xfs"`,
		`{"min": 2097152, "max": 2097152}`, `{"min": 1048576, "max": 1048576}`, "# Pod/p\n",
	} {
		if !strings.Contains(rego, want) {
			t.Errorf("no %s in\n%s", want, rego)
		}
	}
}

func TestShowLintAndCheckReadTheAnnotation(t *testing.T) {
	t.Parallel()
	file := manifest(t, recordedPod)
	if _, errs, status := tool(t, "", "-f", file); status != 0 {
		t.Fatalf("status %d: %s", status, errs)
	}
	if out, errs, status := tool(t, "", "show", file); status != 0 || !strings.Contains(out, "seen by    my-container at /mnt/encrypted, read and write") {
		t.Errorf("status %d: %s\n%s", status, errs, out)
	}
	if out, errs, status := tool(t, "", "lint", file); status != 0 || !strings.Contains(out, "warning: Pod/my-app: container my-container: image") {
		t.Errorf("status %d: %s\n%s", status, errs, out)
	}
	if _, errs, status := tool(t, "", "lint", "--strict", file); status != 1 || !strings.Contains(errs, "1 warnings") {
		t.Errorf("status %d: %s", status, errs)
	}

	other := filepath.Join(t.TempDir(), "other.rego")
	rego, _, _ := tool(t, "", "show", "--rego", file)
	if err := os.WriteFile(other, []byte(strings.Replace(rego, "/mnt/encrypted", "/mnt/other", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	create := request(t)
	for name, c := range map[string]struct {
		args   []string
		want   string
		status int
	}{
		"its own policy":      {[]string{"-p", file}, "allowed: CreateContainer of container my-container\n  mount ", 0},
		"the pod by name":     {[]string{"-p", file, "--pod", "Pod/my-app"}, "is volume encrypted, of storage 0, read and write\n", 0},
		"another pod":         {[]string{"-p", file, "--pod", "Pod/other"}, "name one with --pod: Pod/my-app", 1},
		"another policy":      {[]string{"-p", other}, `policy denies container "my-container" (rule `, 1},
		"running already":     {[]string{"-p", file, "--live", "1=my-container"}, "rule container_live", 1},
		"a pod without":       {nil, "rule open_storages", 1},
		"as another's method": {[]string{"-p", file, "--rpc", "ExecProcess"}, "ExecProcess request: ", 1},
	} {
		out, errs, status := tool(t, "", append([]string{"check", "-f", create}, c.args...)...)
		if status != c.status || !strings.Contains(out+errs, c.want) {
			t.Errorf("%s: want status %d and %q, got status %d: %s\n%s", name, c.status, c.want, status, errs, out)
		}
	}
}

func TestWrongUsageIsSaid(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args   []string
		want   string
		status int
	}{
		"nothing":             {nil, "which manifest?", 2},
		"unknown flag":        {[]string{"--nonsense"}, "flag provided but not defined", 2},
		"argument":            {[]string{"-f", talk, "more"}, `unexpected argument "more"`, 2},
		"layering":            {[]string{"-f", talk, "--layering", "none"}, "neither memory-tags nor luks2", 2},
		"file system":         {[]string{"-f", talk, "--fs-type", "btrfs"}, "neither ext4 nor xfs", 2},
		"size of nothing":     {[]string{"--size", "10Gi"}, "want VOLUME=SIZE", 2},
		"size that is none":   {[]string{"--size", "v=-1"}, "is no quantity of bytes", 2},
		"empty command":       {[]string{"--allow-exec", " "}, "is empty", 2},
		"broken command":      {[]string{"--allow-exec", "[1]"}, "cannot unmarshal", 2},
		"no image":            {[]string{"--image-config", "absent"}, "no such file", 2},
		"image of no name":    {[]string{"--image-config", "A B=" + talk}, "invalid reference", 2},
		"no manifest":         {[]string{"-f", "absent"}, "no such file", 1},
		"no sealed volume":    {[]string{"-f", talk, "-o", "-", "--class", "other"}, "no pod here uses a sealed volume", 1},
		"show of nothing":     {[]string{"show"}, "which file?", 2},
		"lint of two":         {[]string{"lint", "a", "b"}, "which file?", 2},
		"check of nothing":    {[]string{"check"}, "which request?", 2},
		"check of two":        {[]string{"check", "-f", talk, "x"}, "unexpected argument", 2},
		"check, live":         {[]string{"check", "--live", "x"}, "want ID=NAME", 2},
		"check of no request": {[]string{"check", "-f", talk}, "CreateContainer request", 1},
		"check, other method": {[]string{"check", "-f", talk, "--rpc", "OpenDoor"}, "has no method", 1},
		"show of no policy":   {[]string{"show", talk}, "no pod here has a policy", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, errs, status := tool(t, "", c.args...)
			if status != c.status || !strings.Contains(errs, c.want) || out != "" {
				t.Errorf("want status %d and %q, got status %d, %q and %q", c.status, c.want, status, errs, out)
			}
		})
	}
}

func TestHelpTeaches(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"", "show", "lint", "check"} {
		args := append(strings.Fields(command), "--help")
		if out, errs, status := tool(t, "", args...); status != 0 || errs != "" || !strings.Contains(out, "Examples:") || !strings.Contains(out, "Flags:") {
			t.Errorf("%q: status %d, %s\n%s", command, status, errs, out)
		}
	}
}
