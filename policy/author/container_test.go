package author

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sealvol/sealvol/policy"
)

// written is container c of sealedManifest, with other lines for its command.
func written(t *testing.T, lines string, options Options) (policy.Container, []string) {
	t.Helper()
	result, err := Annotate(t.Context(), with(t, "    command: [run]\n", lines), options)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Load(t.Context(), result.Pods[0].Policy)
	if err != nil {
		t.Fatal(err)
	}
	return p.Containers()["c"], result.Warnings
}

// The four ways of Kubernetes' table of command and args, with images that have both, one or none of their own.
func TestTheImageSaysWhatThePodDoesNot(t *testing.T) {
	t.Parallel()
	both := ImageConfig{Entrypoint: []string{"entry", "a"}, Cmd: []string{"cmd", "b"}}
	for name, c := range map[string]struct {
		lines string
		image ImageConfig
		want  []string
	}{
		"neither":                    {"", both, []string{"entry", "a", "cmd", "b"}},
		"command":                    {"    command: [run]\n", both, []string{"run"}},
		"args":                       {"    args: [x]\n", both, []string{"entry", "a", "x"}},
		"both":                       {"    command: [run]\n    args: [x]\n", both, []string{"run", "x"}},
		"empty command":              {"    command: []\n    args: []\n", both, []string{"entry", "a", "cmd", "b"}},
		"no entry point":             {"", ImageConfig{Cmd: []string{"sh"}}, []string{"sh"}},
		"an entry point of no words": {"    args: [x]\n", ImageConfig{Entrypoint: []string{""}, Cmd: []string{"sh"}}, []string{"x"}},
		"dollars of the image stay":  {"    args: [$$(A)]\n", ImageConfig{Entrypoint: []string{"$(A)"}}, []string{"$(A)", "$(A)"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, warnings := written(t, c.lines, Options{Images: map[string]ImageConfig{"docker.io/library/i:1": c.image}})
			if diff := cmp.Diff(c.want, got.Args); diff != "" {
				t.Error(diff)
			}
			if len(warnings) > 0 {
				t.Errorf("nothing is open: %q", warnings)
			}
		})
	}
}

func TestAnImageWithoutACommandIsAnError(t *testing.T) {
	t.Parallel()
	_, err := Annotate(t.Context(), with(t, "    command: [run]\n", ""), Options{Images: map[string]ImageConfig{"": {}}})
	if err == nil || !strings.Contains(err.Error(), "says what to run") {
		t.Errorf("containerd would not run it, got %v", err)
	}
}

func TestVariablesAreExpandedAsKubeletDoes(t *testing.T) {
	t.Parallel()
	env := func(lines ...string) string { return "    env:\n    - " + strings.Join(lines, "\n    - ") + "\n" }
	for name, c := range map[string]struct {
		word, env string
		want      string // "": not known
	}{
		"declared":                    {"$(A)", env("{name: A, value: a}"), "a"},
		"of another":                  {"$(B)", env("{name: A, value: a}", "{name: B, value: '$(A)b'}"), "ab"},
		"of a later one":              {"$(A)", env("{name: A, value: '$(B)'}", "{name: B, value: b}"), "$(B)"},
		"declared twice":              {"$(A)", env("{name: A, value: a}", "{name: A, value: '$(A)a'}"), "aa"},
		"undeclared":                  {"$(A)", "", "$(A)"},
		"escaped":                     {"$$(A)", env("{name: A, value: a}"), "$(A)"},
		"a value that looks like one": {"$(A)", env("{name: A, value: $$(B)}", "{name: B, value: b}"), "$(B)"},
		"empty":                       {"-$(A)-", env("{name: A}"), "--"},
		"of a field":                  {"$(A)", env("{name: A, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}"), ""},
		"of a field, by another":      {"$(B)", env("{name: A, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}", "{name: B, value: $(A)}"), ""},
		"a field that nobody uses":    {"x", env("{name: A, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}"), "x"},
		"of a service":                {"$(KUBERNETES_PORT_443_TCP)", "", ""},
		"of a service, declared":      {"$(A_PORT)", env("{name: A_PORT, value: '1'}"), "1"},
		"perhaps of a config map":     {"$(A)", "    envFrom: [{configMapRef: {name: m}}]\n", ""},
		"declared over a config map":  {"$(A)", "    envFrom: [{configMapRef: {name: m}}]\n" + env("{name: A, value: a}"), "a"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, warnings := written(t, "    command: [run, '"+c.word+"']\n"+c.env, Options{})
			if c.want == "" {
				if got.Args != nil || len(warnings) != 1 {
					t.Errorf("only the cluster knows this; want any arguments and a warning, got %q, %q", got.Args, warnings)
				}
				return
			}
			if diff := cmp.Diff([]string{"run", c.want}, got.Args); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestExecIsWhatProbesHooksAndTheAuthorSay(t *testing.T) {
	t.Parallel()
	got, _ := written(t, "    command: [run]\n    livenessProbe: {exec: {command: [check]}}\n    readinessProbe: {exec: {command: [check]}}\n"+
		"    lifecycle: {preStop: {exec: {command: [stop, $(A)]}}}\n", Options{Exec: [][]string{{"sh", "..."}, {"check"}}})
	if diff := cmp.Diff([][]string{{"check"}, {"stop", "$(A)"}, {"sh", "..."}}, got.Exec); diff != "" {
		t.Error(diff)
	}
}

func TestImageNamesAreThoseOfContainerd(t *testing.T) {
	t.Parallel()
	for image, normalised := range map[string]string{
		"busybox":           "docker.io/library/busybox:latest",
		"a/b:1":             "docker.io/a/b:1",
		"registry:5000/a/b": "registry:5000/a/b:latest",
		"quay.io/a/b:1@sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945": "quay.io/a/b@sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
	} {
		for _, c := range []struct {
			normalise bool
			want      string
		}{{false, image}, {true, normalised}} {
			result, err := Annotate(t.Context(), with(t, "    image: i:1\n", "    image: "+image+"\n"), Options{NormaliseImages: c.normalise})
			if err != nil || !strings.Contains(string(result.Pods[0].Policy), `"image": "`+c.want+`"`) {
				t.Errorf("%s: want %s, got %v, %s", image, c.want, err, result.Pods)
			}
		}
	}
}
