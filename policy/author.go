package policy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// The rules of the author's text that the guest evaluates.
const (
	podRule  = "sealed_pod"
	denyRule = "sealed_pod_deny"
)

// author is the author's text, compiled. Its evaluation is bounded in time and memory, and there is at most one at a time.
type author struct {
	compiler *ast.Compiler
	builtins map[string]*topdown.Builtin
	queries  map[string]ast.Body // by rule
	store    storage.Store
	turn     chan struct{}
}

// newAuthor compiles a text that has been parsed.
func newAuthor(module *ast.Module) (*author, error) {
	if err := shortNumbers(module); err != nil {
		return nil, fmt.Errorf("policy: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, rule := range module.Rules {
		if rule.Head.Ref()[0].Value.Compare(ast.Var(denyRule)) == 0 && (rule.Head.RuleKind() != ast.MultiValue || len(rule.Head.Ref()) != 1) {
			return nil, fmt.Errorf("policy: %s must be rules of the form %s contains reason if { … }: %w", denyRule, denyRule, errdefs.ErrInvalidArgument)
		}
	}
	a := &author{
		compiler: ast.NewCompiler().WithCapabilities(capabilities()).WithStageAfterID(ast.StageCheckRecursion, ast.CompilerStageDefinition{
			Name: "CheckNesting", MetricName: "compile_stage_check_nesting", Stage: checkNesting,
		}),
		queries: map[string]ast.Body{},
		store:   inmem.New(),
		turn:    make(chan struct{}, 1),
	}
	if a.compiler.Compile(map[string]*ast.Module{"policy.rego": module}); a.compiler.Failed() {
		return nil, fmt.Errorf("policy: %s: %w", OneLine(a.compiler.Errors.Error()), errdefs.ErrInvalidArgument)
	}
	a.builtins = bindBuiltins(a.compiler.Modules)
	for _, rule := range []string{podRule, denyRule} {
		query, err := valueOf(a.compiler, "agent_policy", rule)
		if err != nil {
			return nil, fmt.Errorf("policy: %s: %s: %w", rule, OneLine(err.Error()), errdefs.ErrInvalidArgument)
		}
		a.queries[rule] = query
	}
	return a, nil
}

// eval returns the value of a rule, nil if it has none. It does not return later than ctx ends; what it has begun may go on for a while
// if it is in the middle of one expression, and keeps everybody else from beginning.
func (a *author) eval(ctx context.Context, rule string, input *ast.Term) (ast.Value, error) {
	select {
	case a.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("an earlier evaluation does not end: %w", ctx.Err())
	}
	type answer struct {
		value ast.Value
		err   error
	}
	answers := make(chan answer, 1)
	// It ends by the cancellation, or with the expression that it is in.
	go func() {
		defer func() { <-a.turn }()
		value, err := a.run(ctx, rule, input)
		answers <- answer{value, err}
	}()
	select {
	case got := <-answers:
		return got.value, got.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (a *author) run(ctx context.Context, rule string, input *ast.Term) (_ ast.Value, err error) {
	txn, err := a.store.NewTransaction(ctx)
	if err != nil {
		return nil, err
	}
	defer a.store.Abort(ctx, txn)
	cancel := topdown.NewCancel()
	defer context.AfterFunc(ctx, cancel.Cancel)()
	done := make(chan struct{})
	defer close(done)
	go watchHeap(cancel, done) // until done
	results, err := topdown.NewQuery(a.queries[rule]).
		WithCompiler(a.compiler).
		WithStore(a.store).
		WithTransaction(txn).
		WithBuiltins(a.builtins).
		WithStrictBuiltinErrors(true).
		WithCancel(cancel).
		WithInput(input).
		Run(ctx)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case topdown.IsCancel(err):
		return nil, fmt.Errorf("it takes more than %d MiB of memory", maxHeap>>20)
	case err != nil:
		return nil, err
	case len(results) == 0:
		return nil, nil
	}
	value := results[0][ast.Var("answer")].Value
	if _, err := measure(value, maxOperands); err != nil {
		return nil, err
	}
	return value, nil
}

// pod evaluates sealed_pod.
func (a *author) pod(ctx context.Context) (any, error) {
	value, err := a.eval(ctx, podRule, nil)
	if err != nil {
		return nil, fmt.Errorf("policy: evaluating sealed_pod: %s: %w", OneLine(err.Error()), errdefs.ErrInvalidArgument)
	}
	if value == nil {
		return nil, fmt.Errorf("policy: sealed_pod is there but has no value; it must not depend on anything: %w", errdefs.ErrInvalidArgument)
	}
	// As JSON a set is a list in an order that nobody wrote, and the order of suites matters.
	if set := findSet(value); set != nil {
		return nil, fmt.Errorf("policy: sealed_pod has the set %s; write an array: %w", printable(set.String()), errdefs.ErrInvalidArgument)
	}
	pod, err := ast.JSON(value)
	if err != nil {
		return nil, fmt.Errorf("policy: sealed_pod: %s: %w", OneLine(err.Error()), errdefs.ErrInvalidArgument)
	}
	return pod, nil
}

// findSet returns the first set in a value.
func findSet(v ast.Value) (set ast.Set) {
	ast.WalkTerms(v, func(t *ast.Term) bool {
		if s, ok := t.Value.(ast.Set); ok && set == nil {
			set = s
		}
		return set != nil
	})
	return set
}

// denials evaluates sealed_pod_deny: what the author has against a request, sorted.
func (a *author) denials(ctx context.Context, input *ast.Term) ([]string, error) {
	value, err := a.eval(ctx, denyRule, input)
	if err != nil {
		return nil, err
	}
	set, ok := value.(ast.Set)
	if !ok {
		return nil, errors.New("it has no value")
	}
	reasons := make([]string, 0, set.Len())
	for _, t := range set.Slice() {
		reason, ok := t.Value.(ast.String)
		if !ok {
			return nil, errors.New("a reason is not text")
		}
		reasons = append(reasons, string(reason))
	}
	slices.Sort(reasons)
	return reasons, nil
}
