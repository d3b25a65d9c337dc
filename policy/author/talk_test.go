package author

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/sealvol/sealvol/policy"
)

// TestTheTalksManifestGivesTheDemosPod: the YAML of the talk goes through the tool unchanged but for one annotation, and what its policy
// says of volume and container is what the demo plays and the README shows. Those say more of their own: what may be executed, and
// options that a manifest has no words for.
func TestTheTalksManifestGivesTheDemosPod(t *testing.T) {
	t.Parallel()
	manifest := string(read(t, "testdata/pods/talk.yaml"))
	result, err := Annotate(t.Context(), []byte(manifest), Options{})
	if err != nil {
		t.Fatal(err)
	}
	before, after, _ := strings.Cut(manifest, "  name: my-app\n")
	want := before + "  annotations:\n    " + Annotation + ": " + encode(string(result.Pods[0].Policy)) + "\n  name: my-app\n" + after
	if diff := cmp.Diff(want, string(result.Manifest)); diff != "" {
		t.Errorf("more than the annotation changed:\n%s", diff)
	}
	if len(result.Warnings) > 0 {
		t.Errorf("the talk's pod leaves nothing open: %q", result.Warnings)
	}
	got, err := policy.Load(t.Context(), result.Pods[0].Policy)
	if err != nil {
		t.Fatal(err)
	}
	for file, mark := range map[string][2]string{
		"../../integration/demo/main.go": {"policyText = `", "`"},
		"../../README.md":                {"```rego\n", "```"},
	} {
		_, text, found := strings.Cut(string(read(t, file)), mark[0])
		text, _, ended := strings.Cut(text, mark[1])
		if !found || !ended {
			t.Fatalf("%s holds no policy", file)
		}
		shown, err := policy.Load(t.Context(), []byte(text))
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if diff := cmp.Diff(shown.Containers(), got.Containers(), cmpopts.IgnoreFields(policy.Container{}, "Exec", "Image")); diff != "" {
			t.Errorf("%s has another container:\n%s", file, diff)
		}
		if diff := cmp.Diff(shown.Volumes(), got.Volumes(), cmpopts.IgnoreFields(policy.Volume{}, "FSGroup", "MaxTagMemory", "PreallocateTags"),
			cmpopts.IgnoreFields(policy.Size{}, "Min")); diff != "" {
			t.Errorf("%s has another volume:\n%s", file, diff)
		}
	}
}

// TestTheReadmesManifestsWork: each source of volumes has its smallest manifest in the README, and all of them ask for the volume of the
// policy that stands there too.
func TestTheReadmesManifestsWork(t *testing.T) {
	t.Parallel()
	parts := strings.Split(string(read(t, "../../README.md")), "```yaml\n")[1:]
	if len(parts) != 4 {
		t.Errorf("%d manifests, where there are four sources", len(parts))
	}
	for _, part := range parts {
		manifest, _, _ := strings.Cut(part, "```")
		result, err := Annotate(t.Context(), []byte(manifest), Options{})
		if err != nil {
			t.Errorf("%v:\n%s", err, manifest)
			continue
		}
		pod, err := policy.Load(t.Context(), result.Pods[0].Policy)
		if err != nil {
			t.Fatal(err)
		}
		mounts := pod.Volumes()["encrypted"].Mounts
		if len(result.Warnings) > 0 || len(mounts) != 1 || mounts[0] != (policy.Mount{Container: "my-container", Path: "/mnt/encrypted"}) {
			t.Errorf("warnings %q, and the volume is mounted %v:\n%s", result.Warnings, mounts, manifest)
		}
	}
}
