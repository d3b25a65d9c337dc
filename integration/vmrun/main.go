// Vmrun boots a throw-away virtual machine, runs one command in it as root and exits with its status:
//
//	vmrun [flags] COMMAND [ARGUMENT...]
//	go test -exec '/path/to/build/vmrun -memory 1024' ./some/package
//
// The machine sees this machine's files at the same paths, read-only, with a layer in its memory that
// takes what it writes; so the command has the same working directory, tools and arguments, and what it
// changes is gone with the machine, except below the folders given with -share. It has no network. What it
// reaches of QEMU, for the tests that play the host: a monitor at /dev/virtio-ports/qmp (package
// integration/qmp), which knows the disks' files by the folder that VMRUN_DISKS names.
//
// Vmrun reads Debian's kernel from build/kernel, where `make` puts it, and uses hardware virtualisation
// only if a machine really boots with it. It exits with 124 when the time is up, 125 when the machine
// fails, 128+N when signal N ends it, and leaves nothing behind: QEMU dies with it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	statusTimeout = 124
	statusFailure = 125
	statusSignal  = 128
)

// timeout is the cause of a context whose time is up.
type timeout time.Duration

func (t timeout) Error() string { return fmt.Sprintf("the time limit of %s is over", time.Duration(t)) }

// interrupted is the cause of a context that a signal to vmrun has ended.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string { return fmt.Sprintf("ended by signal %q", i.signal) }

func main() {
	if os.Getpid() == 1 {
		guestMain() // inside the machine; does not return
	}
	// QEMU's parent-death signal is tied to the thread that started it, so that thread must stay.
	runtime.LockOSThread()
	status, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmrun:", err)
	}
	os.Exit(status)
}

func run() (int, error) {
	self, err := os.Executable()
	if err != nil {
		return statusFailure, err
	}
	var (
		m     = machine{memory: 2048, cpus: 2}
		env   = environment(os.Environ())
		build = flag.String("build", filepath.Dir(self), "`folder` with kernel/, and for what vmrun keeps")
		tries = flag.Int("tries", 1, "start an emulated machine that dies anew, with the command from its beginning, up to this `number` of machines")
		limit = flag.Duration("timeout", 15*time.Minute, "time `limit` for all of it; VMRUN_TIMEOUT is its default")
	)
	flag.IntVar(&m.memory, "memory", m.memory, "memory in `MiB`")
	flag.IntVar(&m.cpus, "cpus", m.cpus, "number of processors")
	flag.BoolVar(&m.nested, "nested", false, "virtual machines inside: KVM and vhost-vsock")
	flag.StringVar(&m.console, "console", "", "`file` for the kernel's messages")
	flag.Func("disk", "add a scratch disk of this `size` (64M, 1G), at PCI path 02/01 and on, 31 at 02, then at 03 and on; its file is /run/vmrun/disks/0 and on.\n"+
		"64M@port is one at PCI path 1c/00/01 and on, 64M@scsi at SCSI address 0:0 and on, 64M@mmio on virtio-mmio, where no other can be", func(s string) error {
		d, err := parseDisk(s)
		m.disks = append(m.disks, d)
		return err
	})
	flag.Func("share", "share this `folder` read-write; may be repeated", func(s string) error {
		dir, err := filepath.Abs(s)
		m.shares = append(m.shares, share{Tag: fmt.Sprintf("share%d", len(m.shares)), Path: dir})
		return err
	})
	flag.Func("env", "pass a variable on, `NAME` or NAME=VALUE; SEALVOL_*, KATA_* and VMRUN_* are always", func(s string) error {
		if !strings.Contains(s, "=") {
			s += "=" + os.Getenv(s)
		}
		env = append(env, s)
		return nil
	})
	if s := os.Getenv("VMRUN_TIMEOUT"); s != "" {
		if err := flag.Set("timeout", s); err != nil {
			return statusFailure, fmt.Errorf("VMRUN_TIMEOUT: %w", err)
		}
	}
	flag.Parse()
	if n := m.count(onMMIO); n > 0 && n < len(m.disks) {
		return statusFailure, errors.New("disks on virtio-mmio and elsewhere in one machine")
	}
	if flag.NArg() == 0 {
		flag.Usage()
		return statusFailure, errors.New("no command")
	}
	dir, err := os.Getwd()
	if err != nil {
		return statusFailure, err
	}
	if m.build, err = filepath.Abs(*build); err != nil {
		return statusFailure, err
	}

	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM)
	go func() {
		cancel(interrupted{(<-signals).(syscall.Signal)})
	}()

	if m.kvm, err = hasKVM(ctx, m); err != nil {
		return failure(err), err
	}
	ctx, stop := context.WithTimeoutCause(ctx, *limit, timeout(*limit))
	defer stop()
	var status int
	for try := 1; ; try++ {
		status, err = m.run(ctx, request{Args: flag.Args(), Dir: dir, Env: env}, os.Stdout, os.Stderr)
		// With KVM a machine that dies has a reason; what the command says always stands.
		if !errors.Is(err, errDied) || m.kvm || try >= *tries || ctx.Err() != nil {
			break
		}
		fmt.Fprintf(os.Stderr, "vmrun: %v\nvmrun: the emulated machine failed, not the command: starting machine %d of %d at most\n", err, try+1, *tries)
	}
	if err != nil {
		return failure(err), fmt.Errorf("%s: %w", flag.Arg(0), err)
	}
	return status, nil
}

// failure is the exit status for what ended vmrun instead of the command.
func failure(err error) int {
	if end, ok := errors.AsType[interrupted](err); ok {
		return statusSignal + int(end.signal)
	}
	if _, ok := errors.AsType[timeout](err); ok {
		return statusTimeout
	}
	return statusFailure
}

// environment is the command's: what belongs to the machine, and those variables of ours that are for tests.
func environment(ours []string) []string {
	env := []string{
		"HOME=/root",
		"LANG=C.UTF-8",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:" + os.Getenv("PATH"),
		"TMPDIR=/run/tmp",
		"DM_DISABLE_UDEV=1", // nobody answers libdevmapper's cookies
	}
	for _, variable := range ours {
		for _, prefix := range []string{"SEALVOL_", "KATA_", "VMRUN_"} {
			if strings.HasPrefix(variable, prefix) {
				env = append(env, variable)
			}
		}
	}
	return env
}
