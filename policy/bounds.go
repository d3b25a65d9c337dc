package policy

import (
	"fmt"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// The bounds of what the author's text may cost. The interpreter can be cancelled between two expressions, and not within one; so a
// single call is bounded by what goes into it and comes out of it, and everything else by a look at the heap now and then.
const (
	// maxOperands bounds the operands and the result of one call of a built-in function: bytes and values, when they are written out.
	maxOperands = 256 << 10
	// maxReplaced bounds what replacing can make of a text, in bytes.
	maxReplaced = 1 << 20
	// maxWords bounds what the parser makes of a text: one or two kilobytes of memory for each word. genpolicy's rules have some eight thousand,
	// and its data for a container two or three.
	maxWords = 100_000
	// maxPattern bounds a regular expression, in bytes: the interpreter keeps the last hundred.
	maxPattern = 256
	// maxDigits bounds a number as it is written, and maxExponent what follows its e.
	maxDigits   = 64
	maxExponent = 400
	// maxHeap bounds by how much the heap of the whole process may grow during one evaluation, in bytes.
	maxHeap = 64 << 20
	// heapPeriod is how often the heap is looked at.
	heapPeriod = 5 * time.Millisecond
)

// fewWords refuses a text whose parsing would take much memory, before anything is parsed. It knows nothing of the language, so that no
// text can mislead it: whatever the parser makes something of begins with a letter, a digit, a quote, a bracket or a number sign, and
// those are counted wherever they stand, also within texts and comments.
func fewWords(text string) error {
	words, inWord := 0, false
	for i := range len(text) {
		c := text[i]
		letter := c == '_' || c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z'
		if letter && !inWord || strings.IndexByte("\"`[{(#", c) >= 0 {
			words++
		}
		inWord = letter
	}
	if words > maxWords {
		return fmt.Errorf("the text has more than %d words", maxWords)
	}
	return nil
}

// boundedPrefix begins the names under which the author's text, when it is compiled, calls the bounded built-in functions.
const boundedPrefix = "bounded."

// bindBuiltins makes the compiled modules call the bounded functions in place of the interpreter's own, which cannot be replaced by name.
// Equality stays: it is no call.
func bindBuiltins(modules map[string]*ast.Module) map[string]*topdown.Builtin {
	bounded := map[string]*topdown.Builtin{}
	for _, module := range modules {
		ast.WalkExprs(module, func(e *ast.Expr) bool {
			b, ok := ast.BuiltinMap[e.Operator().String()]
			if !ok || e.IsEquality() || e.IsAssignment() {
				return false
			}
			name := boundedPrefix + b.Name
			bounded[name] = &topdown.Builtin{Decl: b, Func: boundBuiltin(b.Name, topdown.GetBuiltin(b.Name))}
			e.SetOperator(ast.NewTerm(ast.Ref{ast.VarTerm(name)}))
			return false
		})
	}
	return bounded
}

// boundBuiltin ends the evaluation, whatever the text would make of an error, where a call goes beyond the bounds.
func boundBuiltin(name string, f topdown.BuiltinFunc) topdown.BuiltinFunc {
	return func(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
		if err := checkCall(name, operands); err != nil {
			return topdown.Halt{Err: fmt.Errorf("%s: %w", name, err)}
		}
		return f(bctx, operands, func(result *ast.Term) error {
			if _, err := measure(result.Value, maxOperands); err != nil {
				return topdown.Halt{Err: fmt.Errorf("result of %s: %w", name, err)}
			}
			return iter(result)
		})
	}
}

// checkCall looks at the operands of a call.
func checkCall(name string, operands []*ast.Term) (err error) {
	left := maxOperands
	for _, o := range operands {
		if left, err = measure(o.Value, left); err != nil {
			return err
		}
	}
	switch name {
	case "replace", "strings.replace_n", "regex.replace":
		// Each byte of the text may become one of the replacements, of which none is longer than all of them.
		text, replacement := operands[0].Value, operands[len(operands)-1].Value
		if name == "strings.replace_n" {
			text, replacement = replacement, text
		}
		if (size(text)+1)*(size(replacement)+1) > maxReplaced {
			return fmt.Errorf("may make more than %d bytes", maxReplaced)
		}
	case "sprintf":
		if format, ok := operands[0].Value.(ast.String); ok && !plainFormat(string(format)) {
			return fmt.Errorf("the format may have %%v, %%s, %%q, %%d, %%x, %%t and %%%%, without widths")
		}
	}
	if strings.HasPrefix(name, "regex.") {
		pattern := operands[0]
		if name == "regex.replace" {
			pattern = operands[1]
		}
		if size(pattern.Value) > maxPattern {
			return fmt.Errorf("the pattern is longer than %d bytes", maxPattern)
		}
	}
	return nil
}

// plainFormat reports whether a format says nothing of a width, so that what comes of it is about as long as what goes in.
func plainFormat(format string) bool {
	for {
		_, after, found := strings.Cut(format, "%")
		if !found {
			return true
		}
		if after == "" || !strings.ContainsRune("vsqdxt%", rune(after[0])) {
			return false
		}
		format = after[1:]
	}
}

// size is the number of bytes and values of a value within the bounds.
func size(v ast.Value) int {
	left, err := measure(v, maxOperands)
	if err != nil {
		return maxOperands
	}
	return maxOperands - left
}

// measure takes from what is left the bytes and values of a value as it would be written out, where a part that is shared counts each
// time, and fails when nothing is left or a number is out of bounds.
func measure(v ast.Value, left int) (_ int, err error) {
	left--
	each := func(terms ...*ast.Term) {
		for _, t := range terms {
			if err == nil {
				left, err = measure(t.Value, left)
			}
		}
	}
	switch v := v.(type) {
	case ast.String:
		left -= len(v)
	case ast.Number:
		if !shortNumber(string(v)) {
			return 0, fmt.Errorf("a number has more than %d digits", maxDigits)
		}
	case *ast.Array:
		v.Until(func(t *ast.Term) bool { each(t); return err != nil })
	case ast.Object:
		v.Until(func(key, value *ast.Term) bool { each(key, value); return err != nil })
	case ast.Set:
		v.Until(func(t *ast.Term) bool { each(t); return err != nil })
	}
	if err == nil && left < 0 {
		err = fmt.Errorf("more than %d bytes and values", maxOperands)
	}
	return left, err
}

// shortNumber reports whether a number takes no more room and time than its text does.
func shortNumber(text string) bool {
	i := strings.IndexAny(text, "eE")
	if i < 0 {
		return len(text) <= maxDigits
	}
	exponent, err := strconv.Atoi(strings.TrimPrefix(text[i+1:], "+"))
	return err == nil && len(text) <= maxDigits && exponent <= maxExponent && exponent >= -maxExponent
}

// shortNumbers refuses a text with a number out of bounds, which the interpreter could meet outside of any call.
func shortNumbers(module *ast.Module) error {
	var long []string
	ast.WalkTerms(module, func(t *ast.Term) bool {
		if n, ok := t.Value.(ast.Number); ok && !shortNumber(string(n)) {
			long = append(long, string(n))
		}
		return false
	})
	if len(long) > 0 {
		return fmt.Errorf("number %s has more than %d digits", printable(slices.Min(long)), maxDigits)
	}
	return nil
}

// watchHeap cancels an evaluation when the heap has grown too much, and returns when done is closed.
func watchHeap(cancel topdown.Cancel, done <-chan struct{}) {
	before := heapBytes()
	ticks := time.NewTicker(heapPeriod)
	defer ticks.Stop()
	for {
		select {
		case <-done:
			return
		case <-ticks.C:
			if heapBytes() > before+maxHeap {
				cancel.Cancel()
				return
			}
		}
	}
}

// heapBytes is what is on the heap, dead or alive.
func heapBytes() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// checkNesting is a stage of the compilation, before types are checked. The type of [x, x] has the type of x twice, and written out, as
// an error or a comparison does, a chain of sixty of them is longer than any memory: the text must not nest its own values so.
func checkNesting(compiler *ast.Compiler) *ast.Error {
	n := nesting{rules: map[string][]*ast.Rule{}, sizes: map[string]int{}}
	for _, module := range compiler.Modules {
		for _, rule := range module.Rules {
			name := ruleName(rule.Ref())
			n.rules[name] = append(n.rules[name], rule)
		}
	}
	for name := range n.rules {
		if n.rule(name) >= maxOperands {
			return ast.NewError(ast.CompileErr, n.rules[name][0].Location, "%s nests its own values too often", name)
		}
	}
	return nil
}

// ruleName is the name of a rule of the text, from a reference such as data.agent_policy.NAME.
func ruleName(ref ast.Ref) string {
	if len(ref) < 3 || !ref[0].Equal(ast.DefaultRootDocument) {
		return ""
	}
	name, _ := ref[2].Value.(ast.String)
	return string(name)
}

// nesting has for each rule how many values its value has when it is written out, up to maxOperands.
type nesting struct {
	rules map[string][]*ast.Rule
	sizes map[string]int
}

// rule is the size of all rules of a name, or of what they use on the way if that is too large. The compiler has refused recursion before.
func (n nesting) rule(name string) int {
	if size, ok := n.sizes[name]; ok {
		return size
	}
	n.sizes[name] = maxOperands // should it come back to itself
	sum := 0
	for _, r := range n.rules[name] {
		for ; r != nil; r = r.Else {
			vars := map[ast.Var]int{}
			if n.body(r.Body, vars) >= maxOperands {
				sum = maxOperands
			}
			for _, t := range []*ast.Term{r.Head.Key, r.Head.Value} {
				if t != nil {
					sum = min(sum+n.term(t, vars), maxOperands)
				}
			}
		}
	}
	n.sizes[name] = sum
	return sum
}

// body notes the sizes of what a body gives its variables and returns the largest that it meets. Its expressions are in an order in
// which each has what it needs. What a built-in function returns has a type of one piece.
func (n nesting) body(body ast.Body, vars map[ast.Var]int) (largest int) {
	bind := func(t *ast.Term, size int) {
		largest = max(largest, size)
		ast.WalkVars(t, func(v ast.Var) bool {
			if _, bound := vars[v]; !bound {
				vars[v] = size
			}
			return false
		})
	}
	for _, e := range body {
		switch terms := e.Terms.(type) {
		case *ast.Term:
			largest = max(largest, n.term(terms, vars))
		case *ast.Every:
			size := n.term(terms.Domain, vars)
			if terms.Key != nil {
				bind(terms.Key, size)
			}
			bind(terms.Value, size)
			largest = max(largest, n.body(terms.Body, vars))
		case []*ast.Term:
			if e.IsEquality() {
				left, right := n.term(terms[1], vars), n.term(terms[2], vars)
				bind(terms[1], right)
				bind(terms[2], left)
				continue
			}
			size := 1
			if name := ruleName(e.Operator()); name != "" {
				size = n.rule(name)
			}
			for _, t := range terms[1:] {
				largest = max(largest, n.term(t, vars))
				bind(t, size)
			}
		}
	}
	return largest
}

func (n nesting) term(t *ast.Term, vars map[ast.Var]int) int {
	size := 1
	add := func(t *ast.Term) { size = min(size+n.term(t, vars), maxOperands) }
	switch v := t.Value.(type) {
	case ast.Var:
		size = max(vars[v], 1)
	case ast.Ref:
		if name := ruleName(v); name != "" {
			return n.rule(name)
		}
		add(v[0])
	case *ast.Array:
		v.Foreach(add)
	case ast.Object:
		v.Foreach(func(key, value *ast.Term) { add(key); add(value) })
	case ast.Set:
		v.Foreach(add)
	case *ast.ArrayComprehension:
		size = n.body(v.Body, vars)
		add(v.Term)
	case *ast.SetComprehension:
		size = n.body(v.Body, vars)
		add(v.Term)
	case *ast.ObjectComprehension:
		size = n.body(v.Body, vars)
		add(v.Key)
		add(v.Value)
	}
	return size
}
