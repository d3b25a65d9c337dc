package policy

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"
)

const (
	// MaxText bounds the policy's text, in bytes.
	MaxText = 1 << 20

	// evalLimit bounds one evaluation, however long the caller would wait: the text is the host's until the policy is bound to the TEE.
	evalLimit = 5 * time.Second
)

//go:embed framework.rego
var framework string

// builtins are the functions that a policy may call: pure, without clock, network, randomness, files or cryptography. The agent's
// interpreter has few more.
const builtins = `
	abs all and any array.concat array.flatten array.reverse array.slice assign base64.decode base64.encode base64.is_valid
	base64url.decode base64url.encode base64url.encode_no_pad bits.and bits.negate bits.or bits.rsh bits.xor ceil concat contains
	count div endswith eq equal floor format_int gt gte hex.decode hex.encode indexof indexof_n internal.member_2 internal.member_3
	internal.print intersection is_array is_boolean is_null is_number is_object is_set is_string json.filter json.is_valid
	json.marshal json.remove json.unmarshal lower lt lte max min minus mul neq object.filter object.get object.keys object.remove
	object.subset object.union object.union_n or plus print product regex.find_all_string_submatch_n regex.find_n regex.is_valid
	regex.match regex.replace regex.split rem replace round set_diff sort split sprintf startswith strings.any_prefix_match
	strings.any_suffix_match strings.count strings.replace_n strings.reverse substring sum to_number trim trim_left trim_prefix
	trim_right trim_space trim_suffix type_name union upper walk`

// capabilities is what the interpreter may do for a policy's text.
func capabilities() *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	allowed := strings.Fields(builtins)
	c.Builtins = slices.DeleteFunc(c.Builtins, func(b *ast.Builtin) bool { return !slices.Contains(allowed, b.Name) })
	c.AllowNet = []string{}
	return c
}

// Load parses and evaluates a policy. A text without sealed_pod is a policy too: its pod gets no volume.
//
// The error is errdefs.ErrInvalidArgument for a text or a value that is wrong, errdefs.ErrFailedPrecondition for one that this
// version does not support yet; it names the key.
func Load(ctx context.Context, text []byte) (*Policy, error) {
	if len(text) > MaxText {
		return nil, fmt.Errorf("policy: text of %d bytes is longer than %d: %w", len(text), MaxText, errdefs.ErrInvalidArgument)
	}
	if err := fewWords(string(text)); err != nil {
		return nil, fmt.Errorf("policy: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, evalLimit)
	defer cancel()
	module, author, err := compile(ctx, string(text))
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(text)
	p := &Policy{text: slices.Clone(text), digest: hex.EncodeToString(digest[:]), document: ast.NullTerm(), rules: map[string]bool{}}
	for _, rule := range module.Rules {
		p.rules[string(rule.Head.Ref()[0].Value.(ast.Var))] = true
	}
	// Not there is one thing, there but undefined another: the second would open a pod that its author meant to seal.
	if p.rules[podRule] {
		value, err := author.pod(ctx)
		if err != nil {
			return nil, err
		}
		pod, err := parsePod(value)
		if err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
		p.pod = &pod
		document, err := ast.InterfaceToValue(pod)
		if err != nil {
			return nil, fmt.Errorf("policy: sealed_pod: %w", err)
		}
		p.document = ast.NewTerm(document)
	}
	if p.rules[denyRule] {
		p.author = author
	}
	if p.framework, err = prepared(); err != nil {
		return nil, err
	}
	return p, nil
}

// compile parses and compiles a text. Neither can be cancelled: one that ctx ends before goes on for a while, and nobody waits for it.
func compile(ctx context.Context, text string) (*ast.Module, *author, error) {
	type answer struct {
		module *ast.Module
		author *author
		err    error
	}
	answers := make(chan answer, 1)
	go func() { // ends with the text
		module, err := parseModule(text)
		if err != nil {
			answers <- answer{err: err}
			return
		}
		author, err := newAuthor(module)
		answers <- answer{module, author, err}
	}()
	select {
	case got := <-answers:
		return got.module, got.author, got.err
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("policy: reading the text: %w: %w", ctx.Err(), errdefs.ErrInvalidArgument)
	}
}

func parseModule(text string) (*ast.Module, error) {
	module, err := ast.ParseModuleWithOpts("policy.rego", text, ast.ParserOptions{
		Capabilities: capabilities(),
		RegoVersion:  ast.RegoV1,
	})
	if err != nil {
		return nil, fmt.Errorf("policy: %s: %w", OneLine(err.Error()), errdefs.ErrInvalidArgument)
	}
	if module.Package.Path.String() != "data.agent_policy" {
		return nil, fmt.Errorf("policy: package must be agent_policy: %w", errdefs.ErrInvalidArgument)
	}
	return module, nil
}

// judges is the framework, ready to judge. It does not change and may be used by several goroutines at once.
type judges struct {
	compiler *ast.Compiler
	verdict  ast.Body // the query for it
	store    storage.Store
	unjudged map[string]bool // the methods that pass whatever they say
}

// prepared is the framework, compiled once for all policies.
var prepared = sync.OnceValues(prepare)

func prepare() (j judges, err error) {
	j.compiler, err = ast.CompileModulesWithOpt(map[string]string{"framework.rego": framework}, ast.CompileOpts{
		ParserOptions: ast.ParserOptions{Capabilities: capabilities(), RegoVersion: ast.RegoV1},
	})
	if err != nil {
		return j, fmt.Errorf("policy: framework: %w", err)
	}
	j.store = inmem.New()
	if j.verdict, err = valueOf(j.compiler, "sealvol", "verdict"); err != nil {
		return j, fmt.Errorf("policy: framework: %w", err)
	}
	query, err := valueOf(j.compiler, "sealvol", "unjudged")
	if err != nil {
		return j, fmt.Errorf("policy: framework: %w", err)
	}
	value, err := j.eval(context.Background(), query, nil)
	if err != nil {
		return j, fmt.Errorf("policy: framework: %w", err)
	}
	var methods []string
	if err := decode(value, &methods); err != nil {
		return j, fmt.Errorf("policy: framework: %w", err)
	}
	j.unjudged = map[string]bool{}
	for _, method := range methods {
		j.unjudged[method] = true
	}
	return j, nil
}

// valueOf is a query for the value of a rule, which it binds to the variable answer.
func valueOf(compiler *ast.Compiler, pkg, rule string) (ast.Body, error) {
	return compiler.QueryCompiler().Compile(ast.NewBody(ast.Equality.Expr(
		ast.VarTerm("answer"), ast.RefTerm(ast.DefaultRootDocument, ast.StringTerm(pkg), ast.StringTerm(rule)),
	)))
}

// eval returns the answer to a query, nil if there is none. It ends with ctx.
func (j judges) eval(ctx context.Context, query ast.Body, input *ast.Term) (ast.Value, error) {
	txn, err := j.store.NewTransaction(ctx)
	if err != nil {
		return nil, err
	}
	defer j.store.Abort(ctx, txn)
	cancel := topdown.NewCancel()
	defer context.AfterFunc(ctx, cancel.Cancel)()
	results, err := topdown.NewQuery(query).
		WithCompiler(j.compiler).
		WithStore(j.store).
		WithTransaction(txn).
		WithStrictBuiltinErrors(true).
		WithCancel(cancel).
		WithInput(input).
		Run(ctx)
	if err != nil || len(results) == 0 {
		return nil, err
	}
	return results[0][ast.Var("answer")].Value, nil
}

// Default is the policy of a pod that brings none: any container, no volume, no block storage.
func Default() *Policy {
	p, err := Load(context.Background(), []byte("package agent_policy\n"))
	if err != nil {
		panic(err) // of our own text and the embedded framework
	}
	return p
}

// OneLine makes a text with foreign pieces in it, such as an error of a parser's, fit for a message of one line, which the host sees:
// printable, each white space a single blank, and cut where it is long.
func OneLine(text string) string {
	s := strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) && !unicode.IsSpace(r) {
			return '?'
		}
		return r
	}, text)
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "..."
	}
	return s
}
