package author

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/sealvol/sealvol/policy"
)

// merged is the policy that a pod gets that has one already.
func merged(t *testing.T, there string) (string, error) {
	t.Helper()
	annotation := "  annotations: {" + Annotation + ": " + encode(there) + "}\n"
	result, err := Annotate(t.Context(), with(t, "  annotations: {}\n", annotation), Options{})
	if err != nil {
		return "", err
	}
	return string(result.Pods[0].Policy), nil
}

func TestAPolicyThatIsThereKeepsItsText(t *testing.T) {
	t.Parallel()
	result, err := Annotate(t.Context(), []byte(sealedManifest), Options{})
	if err != nil {
		t.Fatal(err)
	}
	alone := string(result.Pods[0].Policy)
	_, block, _ := strings.Cut(alone, "package agent_policy\n\n")
	for name, c := range map[string]struct{ there, want string }{
		"another's":                    {"# mine\npackage agent_policy\nimport rego.v1\n\ndefault AddSwapRequest := false\n", "# mine\npackage agent_policy\nimport rego.v1\n\ndefault AddSwapRequest := false\n\n" + block},
		"without an end of line":       {"package agent_policy", "package agent_policy\n\n" + block},
		"an older block of ours":       {strings.Replace(alone, `"rootfs": "host"`, `"args": ["old"]`, 1), alone},
		"rules of the author after it": {alone + "\nsealed_pod_deny contains \"no\" if false\n", alone + "\nsealed_pod_deny contains \"no\" if false\n"},
		"rules before and after":       {"package agent_policy\na := 1\n" + block + "b := 2\n", "package agent_policy\na := 1\n" + block + "b := 2\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := merged(t, c.there)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if again, err := merged(t, got); err != nil || again != got {
				t.Errorf("a second run changed the policy: %v\n%s", err, cmp.Diff(got, again))
			}
			if p, err := policy.Load(t.Context(), []byte(got)); err != nil || !p.Sealed() {
				t.Errorf("not sealed: %v", err)
			}
		})
	}
}

func TestAPolicyThatCannotBeMergedIsRefused(t *testing.T) {
	t.Parallel()
	const hand = "sealed_pod := {\"version\": 1, \"containers\": {}}\n"
	for name, c := range map[string]struct{ there, want string }{
		"a sealed_pod by hand":            {"package agent_policy\n" + hand, "was written by hand"},
		"one beside the block":            {"package agent_policy\n" + hand + blockBegin + blockEnd, "a second sealed_pod"},
		"a block without its end":         {"package agent_policy\n" + blockBegin, "do not stand in pairs"},
		"two blocks":                      {"package agent_policy\n" + blockBegin + blockEnd + blockBegin + blockEnd, "do not stand in pairs"},
		"another package":                 {"package other\n", "package must be agent_policy"},
		"no Rego":                         {"<?xml?>", "policy"},
		"no Rego, that speaks of the pod": {"sealed_pod", "the policy that is there"},
		// By whoever wrote the annotation before: all of these load, and without a block the guest would run an open pod.
		"a rule that goes on where the block ends": {
			"package agent_policy\n" + blockBegin + blockEnd + "if 1 == 2 else := {\"version\": 1, \"containers\": {\"c\": {\"exec\": [[\"...\"]]}}, \"volumes\": {}}\n", "changes what sealvol's block says",
		},
		"a raw string around the block":  {"package agent_policy\nx := `" + blockBegin + blockEnd + "`\n", "with the policy that is there"},
		"a raw string that does not end": {"package agent_policy\nx := `\n", "with the policy that is there"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := merged(t, c.there)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want an error with %q, got %v\n%s", c.want, err, got)
			}
			if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("an error of no class: %v", err)
			}
		})
	}
}

// What is in a manifest's strings must stay a string in the policy.
func TestWordsOfTheManifestCannotLeaveTheirStrings(t *testing.T) {
	t.Parallel()
	word := "\"}\n}\nsealed_pod := {} # `\\\" {} ü \u2028 " + blockEnd + blockBegin
	manifest := with(t, "    command: [run]\n", "    command: ["+inline(word)+"]\n")
	result, err := Annotate(t.Context(), manifest, Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Load(t.Context(), result.Pods[0].Policy)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{word}, p.Containers()["c"].Args); diff != "" {
		t.Errorf("the policy says something else than the manifest:\n%s", diff)
	}
	wantOnlyAnnotations(t, manifest, Options{}, result)
}
