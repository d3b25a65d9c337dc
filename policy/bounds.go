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
		// Each byte of the text may become one of the replacements, which no operand says better than all operands together.
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
