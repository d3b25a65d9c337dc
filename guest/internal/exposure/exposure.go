// Package exposure finds what would open the guest beside the gate: kernel parameters meant
// for the agent, other listeners on vsock ports, swap. What can be closed from inside, the
// service's own memory, it closes.
package exposure

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// opening are the agent's kernel parameters that open a console, a port, another address or
// another configuration. The gate's agent reads none of them, as it has a configuration
// file; who sets one believes otherwise, and must hear of it.
var opening = []string{
	"agent.config_file", "agent.debug_console", "agent.debug_console_vport", "agent.devmode",
	"agent.log_vport", "agent.passfd_listener_port", "agent.server_addr",
}

// KernelCommandLine refuses, with errdefs.ErrFailedPrecondition, a command line that holds
// one of these parameters. file is /proc/cmdline.
func KernelCommandLine(file string) error {
	line, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("kernel command line: %w", err)
	}
	for _, word := range strings.Fields(strings.ReplaceAll(string(line), `"`, " ")) {
		key, _, _ := strings.Cut(word, "=")
		if slices.Contains(opening, strings.ReplaceAll(key, "-", "_")) {
			return fmt.Errorf("the kernel command line has %s, remove it from Kata's kernel_params or turn its debug console off: %w",
				key, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// Listeners refuses, with errdefs.ErrFailedPrecondition, vsock ports that are not among the
// declared.
func Listeners(ports, declared []uint32) error {
	for _, p := range ports {
		if !slices.Contains(declared, p) {
			return fmt.Errorf("something in the guest listens on vsock port %d, stop it or declare the port in guest.toml: %w",
				p, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// Swap refuses, with errdefs.ErrFailedPrecondition, a guest that swaps: memory that holds
// keys and tags must not reach a disk. file is /proc/swaps; it is absent from kernels that
// cannot swap.
func Swap(file string) error {
	swaps, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("swap areas: %w", err)
	}
	// The first line is the table's head.
	if lines := strings.Split(strings.TrimSpace(string(swaps)), "\n"); len(lines) > 1 {
		return fmt.Errorf("the guest has swap, turn it off in its image: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// ForbidDumps keeps this process's memory, where keys are, out of core dumps and from other
// processes.
func ForbidDumps() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid memory dumps: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core files: %w", err)
	}
	return nil
}
