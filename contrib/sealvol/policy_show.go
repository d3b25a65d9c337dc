package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/sealvol/sealvol/policy"
	"github.com/sealvol/sealvol/policy/author"
)

const showHelp = `Usage: sealvol policy show [--rego] FILE

Says in words what policies allow. FILE is a manifest with policy annotations,
the value of one (base64), or Rego; - is standard input.

Examples:
  sealvol policy show my-app.yaml
  sealvol policy show --rego my-app.yaml            # the policy's own text
  kubectl get pod my-app -o yaml | sealvol policy show -

Flags:
`

const lintHelp = `Usage: sealvol policy lint [--strict] FILE

Warns of what policies leave open: arguments and images that are not pinned,
shells that may be executed, sizes without bounds, weaker ciphers and options.
FILE is a manifest with policy annotations, the value of one (base64), or Rego;
- is standard input. A note is about what cannot be otherwise yet.

Examples:
  sealvol policy lint my-app.yaml
  sealvol policy lint --strict my-app.yaml          # status 1 after a warning

Flags:
`

const checkHelp = `Usage: sealvol policy check -f REQUEST [-p FILE] [flags]

Says whether the guest would allow a request of the host, and if not, why. The
exit status is 0 if it would, 1 if not. REQUEST is the request's message as
protobuf JSON, as the agent's protocol defines it. Nothing is sent anywhere.

Examples:
  sealvol policy check -f create.json -p my-app.yaml
  sealvol policy check -f create.json -p policy.rego
  sealvol policy check -f exec.json -p my-app.yaml --rpc ExecProcess --live 3f2a=my-container

Flags:
`

func (p policyTool) show(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("policy show", flag.ContinueOnError)
	rego := flags.Bool("rego", false, "print the text of the policies")
	if done, err := parseFlags(flags, showHelp, args, stdout); done {
		return err
	}
	pods, err := p.policies(flags)
	if err != nil {
		return err
	}
	for i, pod := range pods {
		if i > 0 {
			fmt.Fprintln(stdout)
		}
		if *rego {
			fmt.Fprintf(stdout, "# %s\n%s", pod.Name, pod.Policy)
			continue
		}
		loaded, err := policy.Load(ctx, pod.Policy)
		if err != nil {
			return fmt.Errorf("%s: %w", pod.Name, err)
		}
		fmt.Fprintf(stdout, "%s\n%s", pod.Name, author.Explain(loaded))
	}
	return nil
}

func (p policyTool) lint(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("policy lint", flag.ContinueOnError)
	strict := flags.Bool("strict", false, "fail if there is a warning")
	if done, err := parseFlags(flags, lintHelp, args, stdout); done {
		return err
	}
	pods, err := p.policies(flags)
	if err != nil {
		return err
	}
	warnings := 0
	for _, pod := range pods {
		loaded, err := policy.Load(ctx, pod.Policy)
		if err != nil {
			return fmt.Errorf("%s: %w", pod.Name, err)
		}
		for _, f := range author.Lint(loaded) {
			level := "note"
			if !f.Note {
				level = "warning"
				warnings++
			}
			fmt.Fprintf(stdout, "%s: %s: %s: %s (%s)\n", level, pod.Name, f.Subject, f.Text, f.Rule)
		}
	}
	if *strict && warnings > 0 {
		return fmt.Errorf("%d warnings", warnings)
	}
	return nil
}

func (p policyTool) check(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("policy check", flag.ContinueOnError)
	file := flags.String("f", "", "request to judge, `FILE` or - for standard input")
	from := flags.String("p", "", "`FILE` with the policy: a manifest, base64 or Rego (default: that of a pod that brings none)")
	name := flags.String("pod", "", "which pod of the manifest, `KIND/NAME`")
	rpc := flags.String("rpc", "CreateContainer", "`METHOD` of the agent's service that the request is for")
	live := map[string]string{}
	flags.Func("live", "`ID=NAME` of a container that runs already, may be repeated; the sandbox container has no NAME", func(s string) error {
		id, container, found := strings.Cut(s, "=")
		if !found || id == "" {
			return errors.New("want ID=NAME")
		}
		live[id] = container
		return nil
	})
	if done, err := parseFlags(flags, checkHelp, args, stdout); done {
		return err
	}
	switch {
	case *file == "":
		return fmt.Errorf("%w: which request? give it with -f", errUsage)
	case flags.NArg() > 0:
		return fmt.Errorf("%w: unexpected argument %q", errUsage, flags.Arg(0))
	}
	request, err := p.read(*file)
	if err != nil {
		return err
	}
	loaded := policy.Default()
	if *from != "" {
		text, err := p.read(*from)
		if err != nil {
			return err
		}
		pod, err := choose(text, *name)
		if err != nil {
			return fmt.Errorf("%s: %w", *from, err)
		}
		if loaded, err = policy.Load(ctx, pod.Policy); err != nil {
			return fmt.Errorf("%s: %w", *from, err)
		}
	}
	decision, err := author.Check(ctx, loaded, *rpc, request, policy.State{Containers: live})
	if err != nil {
		return err
	}
	what := *rpc
	switch {
	case decision.Sandbox:
		what += " of the sandbox container"
	case decision.Container != "":
		what += " of container " + decision.Container
	}
	fmt.Fprintln(stdout, "allowed:", what)
	for _, a := range decision.Attachments {
		access := "read and write"
		if a.ReadOnly {
			access = "read only"
		}
		fmt.Fprintf(stdout, "  mount %d is volume %s, of storage %d, %s\n", a.Mount, a.Volume, a.Storage, access)
	}
	return nil
}

// choose finds the one policy in a text that is meant.
func choose(text []byte, name string) (author.Pod, error) {
	pods, err := author.Policies(text)
	if err != nil {
		return author.Pod{}, err
	}
	found := map[string]author.Pod{}
	for _, pod := range pods {
		if name == "" || pod.Name == name {
			found[pod.Name] = pod
		}
	}
	if len(found) == 1 && (name != "" || len(pods) == 1) {
		return slices.Collect(maps.Values(found))[0], nil
	}
	var names []string
	for _, pod := range pods {
		names = append(names, pod.Name)
	}
	return author.Pod{}, fmt.Errorf("which pod? name one with --pod: %s", strings.Join(names, ", "))
}

// policies reads those of the one file that is named.
func (p policyTool) policies(flags *flag.FlagSet) ([]author.Pod, error) {
	if flags.NArg() != 1 {
		return nil, fmt.Errorf("%w: which file? name one", errUsage)
	}
	text, err := p.read(flags.Arg(0))
	if err != nil {
		return nil, err
	}
	pods, err := author.Policies(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flags.Arg(0), err)
	}
	return pods, nil
}
