package gate

import (
	"slices"
	"strings"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// The paths that kubelet has masked and made read-only in every container that does not ask
// for a bare /proc. CRI without kubelet, and a hostile host, send none: then root in a
// container writes kernel/core_pattern, which names a program for the kernel to run outside
// of it.
var (
	maskedPaths = [...]string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
		"/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readOnlyPaths = [...]string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// narrow takes from a container of a sealed pod what could lead out of it, whatever the host
// asked. The container is the policy's, but its root file system can be the host's.
func narrow(spec *agent.Spec) {
	if l := spec.GetLinux(); l != nil {
		l.MaskedPaths = union(l.MaskedPaths, maskedPaths[:])
		l.ReadonlyPaths = union(l.ReadonlyPaths, readOnlyPaths[:])
	}
	for _, m := range spec.GetMounts() {
		if m.Type == "bind" {
			m.Options = noDevices(m.Options)
		}
	}
	dropMknod(spec.GetProcess())
}

// dropMknod takes the right to make device nodes from a process. CRI gives it to every
// container, and the agent's device cgroup does not hold everywhere (cgroups-rs has none for
// cgroup v2): a node of a volume's mapping reads it in plain.
func dropMknod(p *agent.Process) {
	c := p.GetCapabilities()
	if c == nil {
		return
	}
	for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Inheritable, &c.Permitted, &c.Ambient} {
		*set = slices.DeleteFunc(*set, func(name string) bool { return strings.TrimPrefix(name, "CAP_") == "MKNOD" })
	}
}

// noDevices makes the nodes that the host may have put into the share plain files: nodev is
// lost when a mount is bound again with options of its own.
func noDevices(options []string) []string { return union(options, []string{"nodev"}) }

// union adds to list what it lacks.
func union(list, more []string) []string {
	for _, s := range more {
		if !slices.Contains(list, s) {
			list = append(list, s)
		}
	}
	return list
}
