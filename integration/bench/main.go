// Command bench measures what sealvol costs (make bench). Its times are those of an emulated machine where KVM does not run: compare
// the rows of one run, not runs.
//
//	bench node FOLDER-OF-THE-CHECKOUT GO-BENCHMARKS.txt OUTPUT.json
//	bench sealing TESTBED OUTPUT.json
//	bench policy OUTPUT.json
//	bench csi GO-BENCHMARKS.txt OUTPUT.json
//	bench merge OUTPUT.json INPUT.json...
//
// node, in a machine with virtual machines inside, measures what a sealed volume adds to the start of a container, and the memory of
// each of our processes, and joins that with the gate's Go benchmarks, which ran before. sealing, in a plain machine with three disks,
// compares our volumes with the bare disk and with what others make of it. policy, on any machine, measures the evaluator, and csi is the
// CSI driver's Go benchmarks. Each writes a JSON list and prints a table for people; merge makes one list of several.
package main

import (
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 4 && args[0] == "node":
		return benchNode(args[1], args[2], args[3])
	case len(args) == 3 && args[0] == "sealing":
		return benchSealing(args[1], args[2])
	case len(args) == 2 && args[0] == "policy":
		return benchPolicy(args[1])
	case len(args) == 3 && args[0] == "csi":
		return benchCSI(args[1], args[2])
	case len(args) > 2 && args[0] == "merge":
		return merge(args[1], args[2:]...)
	}
	return fmt.Errorf("no such use: %q; the package's comment says what there is", args)
}

// progress says on standard error what is happening.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}
