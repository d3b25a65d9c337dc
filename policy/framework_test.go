package policy

import (
	"maps"
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

// What the framework lets every container mount, no volume may touch.
func TestVolumesLieClearOfWhatEveryContainerHas(t *testing.T) {
	t.Parallel()
	results, err := rego.New(
		rego.Module("framework.rego", framework),
		rego.Query("fixed := object.keys(data.sealvol.fixed_mounts) | data.sealvol.host_files"),
	).Eval(t.Context())
	if err != nil || len(results) != 1 {
		t.Fatalf("%v %v", results, err)
	}
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
