package policy

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// costly are rules that an evaluation must not be able to afford. Each defines x, of which a policy can make its pod or its own rules.
func costly() map[string]string {
	const list = "l := [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]\n"
	// double is x, doubled n times over by an expression of the half.
	double := func(first, expression string, n int) string {
		var b strings.Builder
		fmt.Fprintf(&b, "x0 := %s\n", first)
		for i := range n {
			fmt.Fprintf(&b, "x%d := %s\n", i+1, strings.ReplaceAll(expression, "half", fmt.Sprintf("x%d", i)))
		}
		fmt.Fprintf(&b, "x := x%d\n", n)
		return b.String()
	}
	return map[string]string{
		"arrays of arrays":                list + "x := count([[a, b, c, d, e, f] | some a in l; some b in l; some c in l; some d in l; some e in l; some f in l])\n",
		"a text that doubles":             double(`"abc"`, `concat("", [half, half])`, 60),
		"a text of many":                  double(`"ab"`, `concat("", [half, half])`, 16) + "y := concat(\"\", [x | some _ in split(x, \"\")])\n",
		"an array that doubles":           double(`[1]`, `array.concat(half, half)`, 60),
		"an array that holds itself":      double(`[1]`, `[half, half]`, 60),
		"that array, as JSON":             double(`[1]`, `[half, half]`, 60) + "y := json.marshal(x)\n",
		"that array, compared":            double(`[1]`, `[half, half]`, 60) + "y := {x, [x]}\n",
		"an object that holds itself":     double(`{}`, `{"a": half, "b": half}`, 60),
		"a local that holds itself":       "x := count(b59) if {\n" + strings.ReplaceAll(strings.Replace(double(`[1]`, `[half, half]`, 59), "x := x59\n", "", 1), "x", "b") + "}\n",
		"a union that doubles":            double(`{1}`, `half | {[v] | some v in half}`, 60),
		"a replacement of each letter":    double(`"aaaaaaaa"`, `replace(half, "a", half)`, 8),
		"replacements by regexp":          double(`"aaaaaaaa"`, `regex.replace(half, ".", half)`, 8),
		"replacements by list":            double(`"aaaaaaaa"`, `strings.replace_n({"a": half}, half)`, 8),
		"a width":                         `x := sprintf("%999999d", [1])` + "\n",
		"a width from the operands":       `x := sprintf("%*d", [999999, 1])` + "\n",
		"a precision":                     `x := sprintf("%.999999f", [1.5])` + "\n",
		"a number with many digits":       `x := ` + strings.Repeat("9", 100) + "\n",
		"a number with a large exponent":  `x := round(1e999999999)` + "\n",
		"that number out of a text":       `x := round(to_number("1e999999999"))` + "\n",
		"that number out of JSON":         `x := json.unmarshal("1e999999999")` + "\n",
		"a number that squares":           double(`99999999`, `half * half`, 60),
		"a regular expression":            `x := regex.match("` + strings.Repeat("(a{1000})", 100) + `", "a")` + "\n",
		"a call within a comprehension":   double(`"ab"`, `concat("", [half, half])`, 16) + "y := [concat(\"\", [v, v]) | some v in [x]; true]\n",
		"a call within a function":        double(`"ab"`, `concat("", [half, half])`, 16) + "f(v) := concat(\"\", [v, v, v])\ny := f(x)\n",
		"a call within every":             double(`"ab"`, `concat("", [half, half])`, 16) + "y := 1 if { every v in [x] { count(concat(\"\", [v, v, v])) > 0 } }\n",
		"a call within else":              double(`"ab"`, `concat("", [half, half])`, 16) + "y := 1 if { false } else := concat(\"\", [x, x, x])\n",
		"a call whose arguments are ones": double(`"ab"`, `concat("", [half, half])`, 16) + "y := count(upper(concat(\"\", [x, x, x])))\n",
	}
}

// last is the name that a costly text defines last.
func last(text string) string {
	if strings.Contains(text, "\ny := ") {
		return "y"
	}
	return "x"
}

// The text is the host's until the policy is bound to the TEE, and an author errs. What it costs is bounded whatever it says.
func TestCostlyPodsAreRefused(t *testing.T) {
	t.Parallel()
	for name, rules := range costly() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// Nothing but the bounds of memory ends these in time.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := Load(ctx, []byte("package agent_policy\n"+rules+"sealed_pod := {\"version\": 1, \"containers\": {\"c\": {\"args\": ["+last(rules)+"]}}}\n"))
			if !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "must be a string") {
				t.Errorf("want it refused for what it costs, got %v", err)
			}
			if err != nil && (len(err.Error()) > 500 || strings.Contains(err.Error(), "\n")) {
				t.Errorf("must be a short line: %q", err)
			}
			if ctx.Err() != nil {
				t.Error("it went on until its time was over")
			}
		})
	}
}

func TestCostlyRulesOfTheAuthorsOwnDeny(t *testing.T) {
	t.Parallel()
	for name, rules := range costly() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := Load(t.Context(), []byte("package agent_policy\n"+rules+"sealed_pod_deny contains \"no\" if "+last(rules)+" == 0\n"))
			if errdefs.IsInvalidArgument(err) {
				return // what can be seen in the text is refused with it
			}
			if err != nil {
				t.Fatal(err)
			}
			_, err = p.Decide(t.Context(), "StatsContainer", message(t, "StatsContainer"), State{})
			wantDenial(t, err, denyRule)
		})
	}
}

// rules is a policy that has rules of the author's own and no sealed_pod.
func ownRules(t *testing.T, text string) *Policy {
	t.Helper()
	p, err := Load(t.Context(), []byte("package agent_policy\n"+text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestOwnRulesWithoutAnAnswerDeny(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"an error":               `sealed_pod_deny contains "x" if to_number("x") == 1`,
		"a number":               `sealed_pod_deny contains 1`,
		"an object":              `sealed_pod_deny contains {"reason": "x"}`,
		"a null among reasons":   "sealed_pod_deny contains null\nsealed_pod_deny contains \"x\"",
		"a function that is two": "f(x) := 1\nf(x) := 2\nsealed_pod_deny contains \"x\" if f(1) == 1",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := ownRules(t, text)
			_, err := p.Decide(t.Context(), "StatsContainer", message(t, "StatsContainer"), State{})
			wantDenial(t, err, denyRule)
			if !strings.Contains(err.Error(), "came to no answer") {
				t.Errorf("must say whose fault it is: %v", err)
			}
		})
	}
}

func TestOwnRulesThatLoopDenyInTime(t *testing.T) {
	t.Parallel()
	p := ownRules(t, "l := [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]\n"+
		"sealed_pod_deny contains \"x\" if { some a in l; some b in l; some c in l; some d in l; some e in l; some f in l; some g in l; some h in l; a + b + c + d + e + f + g + h < 0 }\n")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := p.Decide(ctx, "StatsContainer", message(t, "StatsContainer"), State{})
	wantDenial(t, err, denyRule)
}

// An expression that no cancellation reaches keeps its turn: there is never more than one, and the others are denied.
func TestOwnRulesThatDoNotEndKeepNobodyWaiting(t *testing.T) {
	t.Parallel()
	p := ownRules(t, "sealed_pod_deny contains \"x\" if false\n")
	p.author.turn <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := p.Decide(ctx, "StatsContainer", message(t, "StatsContainer"), State{})
	wantDenial(t, err, denyRule)
	<-p.author.turn
	if _, err := p.Decide(t.Context(), "StatsContainer", message(t, "StatsContainer"), State{}); err != nil {
		t.Errorf("after it has ended: %v", err)
	}
}

// What the author says is foreign text to a terminal.
func TestReasonOfTheAuthorIsOneLine(t *testing.T) {
	t.Parallel()
	p := ownRules(t, `sealed_pod_deny contains "a reason\n\u001b[2J of\ttwo lines"`)
	_, err := p.Decide(t.Context(), "StatsContainer", message(t, "StatsContainer"), State{})
	wantDenial(t, err, denyRule)
	const want = `policy denies "StatsContainer" (rule sealed_pod_deny): a reason ?[2J of two lines; the author's own rules say so: permission denied`
	if err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestOwnRulesSeeWhatTheFrameworkSees(t *testing.T) {
	t.Parallel()
	p := ownRules(t, `sealed_pod_deny contains concat(" ", [input.rpc, input.request.container_id, input.state.containers.c, sprintf("%v", [input.pod])])`)
	_, err := p.Decide(t.Context(), "StatsContainer", caseRequest{RPC: "StatsContainer", Patch: []any{map[string]any{"op": "add", "path": "/container_id", "value": "c"}}}.message(t.Context(), t), State{Containers: map[string]string{"c": "app"}})
	wantDenial(t, err, denyRule)
	if !strings.Contains(err.Error(), "StatsContainer c app null;") {
		t.Errorf("got %v", err)
	}
}

func TestOwnRulesOfAnotherFormAreRefused(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"one value":   `sealed_pod_deny := "x"`,
		"true":        `sealed_pod_deny if true`,
		"an array":    `sealed_pod_deny := ["x"]`,
		"an object":   `sealed_pod_deny["x"] := 1`,
		"a function":  `sealed_pod_deny(x) := x`,
		"a default":   "default sealed_pod_deny := set()\nsealed_pod_deny := {\"x\"}",
		"a part":      `sealed_pod_deny.create contains "x"`,
		"a forbidden": `sealed_pod_deny contains http.send({}).body`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := Load(t.Context(), []byte("package agent_policy\n"+text)); !errdefs.IsInvalidArgument(err) {
				t.Errorf("want an invalid argument, got %v", err)
			}
		})
	}
}
