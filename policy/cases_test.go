package policy

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"
	"github.com/open-policy-agent/opa/v1/rego"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	_ "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc" // the messages
)

// A decisionCase is one request of the host and what comes of it: an entry of testdata/<topic>/<case>/cases.json. Beside that file lie
// the pod, pod.yaml, and in policy.rego the policy that the pod carries in its annotation, to be read.
type decisionCase struct {
	Description string      `json:"description"`
	Request     caseRequest `json:"request"`
	Allowed     bool        `json:"allowed"`
	// Rules are the names of all rules that deny, in the framework's order.
	Rules []string `json:"rules"`
	// Decision is what an allowed request stands for. Absent, it is not looked at.
	Decision *Decision `json:"decision"`
}

// A caseRequest says in a few words what would be pages of JSON: the request that Kata 3.20 sent for the pod, recorded but for names and
// ids, the changes to it, and what the guest knows at that time.
type caseRequest struct {
	RPC   string `json:"rpc"`
	Base  string `json:"base"`  // a file of testdata/recorded; absent: the empty message
	Patch []any  `json:"patch"` // JSON Patch, RFC 6902
	State State  `json:"state"`
}

// casePod is a folder of cases.
type casePod struct {
	dir   string
	cases []decisionCase
}

func (p casePod) policy(tb testing.TB) *Policy { return load(tb, filepath.Join(p.dir, "policy.rego")) }

// casePods reads all cases.
func casePods(tb testing.TB) (pods []casePod) {
	tb.Helper()
	files, err := filepath.Glob("testdata/*/*/cases.json")
	if err != nil || len(files) == 0 {
		tb.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		p := casePod{dir: filepath.Dir(file)}
		d := json.NewDecoder(bytes.NewReader(read(tb, file)))
		d.DisallowUnknownFields()
		if err := d.Decode(&p.cases); err != nil {
			tb.Fatalf("%s: %v", file, err)
		}
		pods = append(pods, p)
	}
	return pods
}

func read(tb testing.TB, path string) []byte {
	tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// load loads the policy of a file.
func load(tb testing.TB, path string) *Policy {
	tb.Helper()
	p, err := Load(tb.Context(), read(tb, path))
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// message makes an empty message of a method; one that the agent does not have has no fields.
func message(tb testing.TB, rpc string) proto.Message {
	tb.Helper()
	service, err := protoregistry.GlobalFiles.FindDescriptorByName("grpc.AgentService")
	if err != nil {
		tb.Fatal(err)
	}
	method := service.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(rpc))
	if method == nil {
		return &emptypb.Empty{}
	}
	message, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
	if err != nil {
		tb.Fatal(err)
	}
	return message.New().Interface()
}

// message is the request itself.
func (r caseRequest) message(ctx context.Context, tb testing.TB) proto.Message {
	tb.Helper()
	document := any(map[string]any{})
	if r.Base != "" {
		if err := json.Unmarshal(read(tb, filepath.Join("testdata/recorded", r.Base)), &document); err != nil {
			tb.Fatal(err)
		}
	}
	results, err := rego.New(
		rego.Query("x := json.patch(input.document, input.patch)"),
		rego.Input(map[string]any{"document": document, "patch": append([]any{}, r.Patch...)}),
	).Eval(ctx)
	if err != nil || len(results) != 1 {
		tb.Fatalf("the patch does not apply: %v", err)
	}
	text, err := json.Marshal(results[0].Bindings["x"])
	if err != nil {
		tb.Fatal(err)
	}
	req := message(tb, r.RPC)
	if err := protojson.Unmarshal(text, req); err != nil {
		tb.Fatal(err)
	}
	return req
}

// recorded is a request as Kata sent it.
func recorded(tb testing.TB, rpc, base string, patch ...any) proto.Message {
	tb.Helper()
	return caseRequest{RPC: rpc, Base: base, Patch: patch}.message(tb.Context(), tb)
}

func TestDecisions(t *testing.T) {
	t.Parallel()
	for _, pod := range casePods(t) {
		p := pod.policy(t)
		for _, c := range pod.cases {
			t.Run(strings.TrimPrefix(pod.dir, "testdata/")+"/"+c.Description, func(t *testing.T) {
				t.Parallel()
				if c.Allowed != (len(c.Rules) == 0) || c.Rules == nil {
					t.Fatal("a case names the rules that deny, and none where none does")
				}
				req := c.Request.message(t.Context(), t)
				before := proto.Clone(req)
				got, err := p.Decide(t.Context(), c.Request.RPC, req, c.Request.State)
				if !proto.Equal(before, req) {
					t.Error("Decide must not change the request")
				}
				if !c.Allowed {
					wantDenial(t, err, c.Rules...)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if c.Decision == nil {
					return
				}
				if diff := cmp.Diff(*c.Decision, got, cmpopts.EquateEmpty()); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// wantDenial says that a request was denied by these rules and no other, in a line that a person can use and that carries nothing foreign.
func wantDenial(t *testing.T, err error, rules ...string) {
	t.Helper()
	var denial *Denial
	if !errors.As(err, &denial) {
		t.Fatalf("want a denial by %s, got %v", rules, err)
	}
	if !slices.Equal(denial.Rules, rules) {
		t.Errorf("want rules %s, got %s", rules, denial.Rules)
	}
	if !strings.Contains(err.Error(), "(rule "+rules[0]+"): ") {
		t.Errorf("must name rule %s: %v", rules[0], err)
	}
	if len(err.Error()) > 400 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
		t.Errorf("must be a short printable line: %q", err)
	}
	if strings.Contains(err.Error(), "{}") || !strings.Contains(err.Error(), "; ") {
		t.Errorf("must say what is wrong and what to do: %v", err)
	}
}

// The pod.yaml of a case is what a person applies: the policy that it carries is the one that can be read beside it.
func TestPodsOfTheCasesCarryTheirPolicies(t *testing.T) {
	t.Parallel()
	annotation := regexp.MustCompile(`(?m)^    io\.katacontainers\.config\.agent\.policy: ([A-Za-z0-9+/=]+)$`)
	for _, pod := range casePods(t) {
		found := annotation.FindAllSubmatch(read(t, filepath.Join(pod.dir, "pod.yaml")), -1)
		if len(found) != 1 {
			t.Errorf("%s: %d annotations with a policy, want one", pod.dir, len(found))
			continue
		}
		text, err := base64.StdEncoding.DecodeString(string(found[0][1]))
		if err != nil || !bytes.Equal(text, read(t, filepath.Join(pod.dir, "policy.rego"))) {
			t.Errorf("%s: the annotation is not the text of policy.rego (%v); it is its base64, in one line", pod.dir, err)
		}
	}
}

// The cases reach all of the framework: each rule, by name, says no in one and yes in another, and each of its lines is looked at.
func TestCasesCoverTheFramework(t *testing.T) {
	t.Parallel()
	module, err := ast.ParseModuleWithOpts("framework.rego", framework, ast.ParserOptions{RegoVersion: ast.RegoV1})
	if err != nil {
		t.Fatal(err)
	}
	query, err := rego.New(rego.ParsedModule(module), rego.Query("answer := data.sealvol.verdict; rules := data.sealvol.rules")).PrepareForEval(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	coverage := cover.New()
	denied, held := map[string]bool{}, map[string]bool{}
	total, denials := 0, 0
	for _, pod := range casePods(t) {
		p := pod.policy(t)
		for _, c := range pod.cases {
			total++
			if !c.Allowed {
				denials++
			}
			input, err := p.input(c.Request.RPC, c.Request.message(t.Context(), t), c.Request.State)
			if err != nil {
				t.Fatal(err)
			}
			results, err := query.Eval(t.Context(), rego.EvalParsedInput(input), rego.EvalQueryTracer(coverage))
			if err != nil || len(results) != 1 {
				t.Fatalf("%s: %s: %v", pod.dir, c.Description, err)
			}
			no := results[0].Bindings["answer"].(map[string]any)["denied"].([]any)
			for _, rule := range results[0].Bindings["rules"].([]any) {
				if slices.Contains(no, rule) {
					denied[rule.(string)] = true
				} else {
					held[rule.(string)] = true
				}
			}
		}
	}
	held["known_request"] = true // by its nature it never does
	for _, name := range reasonNames(t) {
		if !denied[name] || !held[name] {
			t.Errorf("rule %s: denies in a case: %t, holds in a case: %t; want both", name, denied[name], held[name])
		}
	}
	if total < 150 || 3*denials < 2*total {
		t.Errorf("%d cases, of which %d are denied; want at least 150, and two thirds of them denied", total, denials)
	}
	report := coverage.Report(map[string]*ast.Module{"framework.rego": module})
	for _, file := range report.Files {
		for _, r := range file.NotCovered {
			t.Errorf("framework.rego:%d: no case comes here: %s", r.Start.Row, strings.Split(framework, "\n")[r.Start.Row-1])
		}
	}
	t.Logf("%d cases, %d denied; %.1f %% of framework.rego covered", total, denials, report.Coverage)
}

// reasonNames are the names of all rules of the framework.
func reasonNames(t *testing.T) (names []string) {
	t.Helper()
	results, err := rego.New(rego.Module("framework.rego", framework), rego.Query("names := object.keys(data.sealvol.reasons)")).Eval(t.Context())
	if err != nil || len(results) != 1 {
		t.Fatalf("%v %v", results, err)
	}
	for _, name := range results[0].Bindings["names"].([]any) {
		names = append(names, name.(string))
	}
	return names
}
