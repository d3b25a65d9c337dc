package policy

import (
	"encoding/json"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/tester"
)

// TestFramework runs the framework's own tests, framework_test.rego.
func TestFramework(t *testing.T) {
	t.Parallel()
	modules := map[string]*ast.Module{
		"framework.rego":      ast.MustParseModule(framework),
		"framework_test.rego": ast.MustParseModule(string(read(t, "framework_test.rego"))),
	}
	results, err := tester.NewRunner().SetModules(modules).RunTests(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for r := range results {
		ran++
		if !r.Pass() {
			t.Errorf("%s: %v", r.Name, r.Error)
		}
	}
	if ran == 0 {
		t.Error("no test ran")
	}
}

// Every rule of the framework denies in some case, so none holds by mistake.
func TestEveryRuleDeniesSomewhere(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*/*/cases.json")
	if err != nil {
		t.Fatal(err)
	}
	denied := map[string]bool{}
	for _, file := range files {
		var cases []decisionCase
		if err := json.Unmarshal(read(t, file), &cases); err != nil {
			t.Fatal(err)
		}
		for _, c := range cases {
			denied[c.Rule] = true
		}
	}
	results, err := rego.New(
		rego.Module("framework.rego", framework),
		rego.Query("rules := object.keys(data.sealvol.reasons); fixed := object.keys(data.sealvol.fixed_mounts) | data.sealvol.host_files"),
	).Eval(t.Context())
	if err != nil || len(results) != 1 {
		t.Fatalf("%v %v", results, err)
	}
	for _, rule := range results[0].Bindings["rules"].([]any) {
		if !denied[rule.(string)] {
			t.Errorf("no case is denied by rule %s", rule)
		}
	}
	// What the framework lets every container mount, no volume may touch.
	for _, path := range results[0].Bindings["fixed"].([]any) {
		if !slices.ContainsFunc(occupied, func(o string) bool { return overlap(path.(string), o) }) {
			t.Errorf("a volume could lie at %s, which the framework lets every container have", path)
		}
	}
}

// The framework and the policies use what the agent's interpreter has too, nothing with an effect, and nothing that this one renamed.
func TestBuiltinsArePure(t *testing.T) {
	t.Parallel()
	known := map[string]*ast.Builtin{}
	for _, b := range ast.CapabilitiesForThisVersion().Builtins {
		known[b.Name] = b
	}
	for _, name := range strings.Fields(builtins) {
		b, ok := known[name]
		if !ok {
			t.Errorf("there is no %s", name)
			continue
		}
		if b.Nondeterministic {
			t.Errorf("%s is not a function of its arguments", name)
		}
	}
	if got := capabilities(); len(got.Builtins) != len(strings.Fields(builtins)) || got.AllowNet == nil || len(got.AllowNet) > 0 {
		t.Errorf("capabilities are not what the list says: %d builtins of %d, network %v",
			len(got.Builtins), len(slices.Sorted(maps.Keys(known))), got.AllowNet)
	}
}
