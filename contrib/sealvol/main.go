// Command sealvol is the tool of operators and pod authors. On a node it shows
// what is sealed, and what it shows came through the host. Where manifests are
// written it makes and explains policies.
//
// It may import the guest's public packages (guest/api), contrib/internal/guest, package policy and what is
// below it, and nothing else of the project.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// command is one subcommand. Its run writes the result to stdout; errUsage
// among its errors makes the exit status 2.
type command struct {
	name, short string
	run         func(ctx context.Context, args []string, stdout io.Writer) error
}

var errUsage = errors.New("usage")

const about = `sealvol writes policies for Kata pods with sealed volumes, and looks at such pods.

Usage: sealvol COMMAND [arguments]

Commands:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	commands := []command{
		{"policy", policyShort, policyTool{os.Stdin, os.Stderr}.run},
		{"inspect", inspectShort, (&inspector{newGuests()}).run},
		{"receipt", receiptShort, (&receiver{newGuests()}).run},
	}
	os.Exit(run(ctx, os.Args[1:], commands, os.Stdout, os.Stderr))
}

// run returns the exit status: 0, 1 after an error, 2 after wrong usage.
func run(ctx context.Context, args []string, commands []command, stdout, stderr io.Writer) int {
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	for _, c := range commands {
		if c.name != name {
			continue
		}
		switch err := c.run(ctx, args[1:], stdout); {
		case err == nil:
			return 0
		case errors.Is(err, errUsage):
			fmt.Fprintf(stderr, "sealvol %s: %v; see sealvol %s --help\n", c.name, err, c.name)
			return 2
		default:
			for line := range strings.Lines(err.Error()) { // one for each thing that is wrong
				fmt.Fprintf(stderr, "sealvol %s: %s\n", c.name, strings.TrimSuffix(line, "\n"))
			}
			return 1
		}
	}
	switch name {
	case "help", "-h", "-help", "--help":
		help(stdout, commands)
		return 0
	case "":
		help(stderr, commands)
	default:
		fmt.Fprintf(stderr, "sealvol: no command %q; see sealvol help\n", name)
	}
	return 2
}

func help(w io.Writer, commands []command) {
	fmt.Fprint(w, about)
	for _, c := range commands {
		fmt.Fprintf(w, "  %-10s %s\n", c.name, c.short)
	}
	fmt.Fprint(w, "\nsealvol COMMAND --help explains a command, with examples.\n")
}
