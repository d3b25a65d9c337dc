package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/integration/image"
)

// scratchDir is where the machine sees its scratch folder; disks/N there is the file behind disk N.
const scratchDir = "/run/vmrun"

// disksVariable tells the command where the host has the folder of these files: what it asks of QEMU needs the host's name.
const disksVariable = "VMRUN_DISKS"

// A machine is one virtual machine, made for one command.
type machine struct {
	build   string // folder with kernel/, and vm/ for what is kept between runs
	memory  int    // MiB
	cpus    int
	disks   []disk
	shares  []share
	nested  bool
	kvm     bool
	console string // file for the kernel's messages; empty: a temporary one
}

// run boots the machine, runs the command and returns its exit status. The error is the cause of ctx's
// end if that came first, else what went wrong with the machine.
func (m machine) run(ctx context.Context, r request, stdout, stderr io.Writer) (_ int, err error) {
	kernel := filepath.Join(m.build, "kernel")
	initrd, err := m.initrd(kernel)
	if err != nil {
		return 0, err
	}
	scratch, err := os.MkdirTemp("", "vmrun-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(scratch)
	if m.console == "" {
		m.console = filepath.Join(scratch, "console")
	}
	disks := filepath.Join(scratch, "disks")
	if err := os.Mkdir(disks, 0o700); err != nil {
		return 0, err
	}
	for i, d := range m.disks {
		if err := createSparse(filepath.Join(disks, fmt.Sprint(i)), d.bytes); err != nil {
			return 0, err
		}
	}

	args, err := m.arguments(kernel, initrd, scratch)
	if err != nil {
		return 0, err
	}

	port, qemuPort, err := socketPair()
	if err != nil {
		return 0, err
	}
	defer port.Close()
	// The monitor goes straight to a second port: a test may unplug and plug the disks of its own machine.
	monitor, monitorPort, err := socketPair()
	if err != nil {
		qemuPort.Close()
		return 0, err
	}
	var said bytes.Buffer
	qemu := exec.Command("qemu-system-x86_64", args...)
	qemu.Stdout, qemu.Stderr = &said, &said
	qemu.ExtraFiles = []*os.File{qemuPort, monitor, monitorPort} // 3, 4, 5
	// Its own process group, for a ^C is ours to handle first.
	qemu.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	err = qemu.Start()
	for _, file := range qemu.ExtraFiles {
		file.Close()
	}
	if err != nil {
		return 0, fmt.Errorf("%w (make prerequisites)", err)
	}
	defer func() {
		qemu.Process.Kill()
		qemu.Wait()
		if err != nil {
			err = m.explain(err, said.String())
		}
	}()
	stop := context.AfterFunc(ctx, func() { qemu.Process.Kill() }) // ends the port too
	defer stop()
	if !m.kvm {
		watched, unwatch := context.WithCancel(ctx)
		defer unwatch()
		go endFrozen(watched, qemu.Process, frozenTime)
	}

	r.Shares = append(m.shares, share{Tag: "scratch", Path: scratchDir})
	r.Modules = filepath.Join(kernel, "lib/modules")
	r.Nested = m.nested
	r.Drivers = m.drivers()
	r.Env = append(r.Env, disksVariable+"="+disks)
	status, err := converse(port, r, stdout, stderr)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return status, err
}

// errDied says that the machine went before the command: the kernel panicked, or QEMU ended.
var errDied = errors.New("the machine ended before the command")

// converse sends the request and passes on what the guest sends, up to the command's exit status.
func converse(port io.ReadWriter, r request, stdout, stderr io.Writer) (int, error) {
	if err := json.NewEncoder(port).Encode(r); err != nil {
		return 0, err
	}
	for {
		kind, payload, err := readFrame(port)
		switch {
		case err != nil:
			return 0, fmt.Errorf("%w: %w", errDied, err)
		case kind == kindStdout:
			_, err = stdout.Write(payload)
		case kind == kindStderr:
			_, err = stderr.Write(payload)
		case kind == kindExit && len(payload) == 1:
			return int(payload[0]), nil
		case kind == kindError:
			return 0, errors.New(string(payload))
		default:
			return 0, fmt.Errorf("frame of kind %d with %d bytes", kind, len(payload))
		}
		if err != nil {
			return 0, err
		}
	}
}

// explain adds the end of what QEMU and the kernel said.
func (m machine) explain(err error, qemu string) error {
	console, _ := os.ReadFile(m.console)
	lines := strings.Split(strings.TrimSpace(qemu+string(console)), "\n")
	lines = lines[max(0, len(lines)-25):]
	return fmt.Errorf("%w\n  | %s", err, strings.ReplaceAll(strings.Join(lines, "\n  | "), "\r", ""))
}

func (m machine) arguments(kernel, initrd, scratch string) ([]string, error) {
	cpu, accel := "max", "tcg,thread=multi"
	if m.nested {
		cpu = "max,+svm,+npt"
	}
	if m.kvm {
		cpu, accel = "host", "kvm"
	}
	// A kernel bug ends the machine at once.
	board, kernelArgs := "q35", "console=ttyS0 quiet panic=-1 oops=panic no_timer_check tsc=reliable pci=noearly,lastbus=0"
	if m.count(onMMIO) > 0 {
		var err error
		if board, kernelArgs, err = m.microvm(); err != nil {
			return nil, err
		}
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", board, "-accel", accel, "-cpu", cpu,
		"-smp", fmt.Sprint(m.cpus), "-m", fmt.Sprint(m.memory),
		"-kernel", filepath.Join(kernel, "vmlinux"), "-initrd", initrd,
		"-append", kernelArgs,
		"-chardev", "file,id=console,path=" + m.console, "-serial", "chardev:console",
		"-device", "virtio-serial-pci,addr=10",
		"-chardev", "socket,id=port,fd=3", "-device", "virtserialport,chardev=port,name=" + portName,
		"-chardev", "socket,id=monitor,fd=4", "-mon", "chardev=monitor,mode=control",
		"-chardev", "socket,id=qmp,fd=5", "-device", "virtserialport,chardev=qmp,name=qmp",
		"-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
		"-device", "virtio-9p-pci,fsdev=root,mount_tag=root,addr=11",
	}
	args = append(args, m.busArguments()...)
	for i, s := range append(m.shares, share{Tag: "scratch", Path: scratch}) {
		args = append(args,
			"-fsdev", fmt.Sprintf("local,id=%s,path=%s,security_model=none,multidevs=remap", s.Tag, s.Path),
			"-device", fmt.Sprintf("virtio-9p-pci,fsdev=%s,mount_tag=%s,addr=12.%x,multifunction=on", s.Tag, s.Tag, i))
	}
	return append(args, m.diskArguments(scratch)...), nil
}

// initrd returns the machine's initial RAM disk, this program and the modules, made when it is not there yet.
func (m machine) initrd(kernel string) (string, error) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	info, err := os.Stat(filepath.Join(kernel, "vmlinux"))
	if err != nil {
		return "", fmt.Errorf("%w (make build/kernel/vmlinux)", err)
	}
	key := sha256.New()
	fmt.Fprintln(key, info.Size(), info.ModTime().UnixNano())
	key.Write(self)
	file := filepath.Join(m.build, "vm", fmt.Sprintf("initrd-%x", key.Sum(nil)[:8]))
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}

	var tree image.Tree
	for _, dir := range []string{"/proc", "/sys", "/dev", "/root"} {
		tree.Dir(dir)
	}
	tree.File("/init", 0o755, self)
	for name, modules := range map[string][]string{"base": baseModules(), string(onSCSI): scsiModules(), string(onMMIO): mmioModules(), "nested": nestedModules()} {
		paths, err := tree.Modules(kernel, "/modules", modules...)
		if err != nil {
			return "", err
		}
		tree.File("/modules/"+name, 0o644, []byte(strings.Join(paths, "\n")))
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return "", err
	}
	return file, writeAtomically(file, tree.WriteCPIO)
}

// hasKVM tells whether a machine really boots with hardware virtualisation: a /dev/kvm that opens proves
// nothing. The answer is kept until the next boot of this machine.
func hasKVM(ctx context.Context, m machine) (bool, error) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false, nil
	}
	kvm.Close()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false, err
	}
	file := filepath.Join(m.build, "vm", fmt.Sprintf("kvm-nested=%t-%s", m.nested, bytes.TrimSpace(boot)))
	if verdict, err := os.ReadFile(file); err == nil {
		return string(verdict) == "yes", nil
	}

	if _, err := m.initrd(filepath.Join(m.build, "kernel")); err != nil {
		return false, err // says nothing about KVM
	}
	if m.nested {
		plain := m
		plain.nested = false
		if ok, err := hasKVM(ctx, plain); !ok || err != nil {
			return false, err
		}
	}
	probe := machine{build: m.build, memory: 512, cpus: 1, nested: m.nested, kvm: true}
	command := []string{"true"}
	if m.nested {
		command = []string{"test", "-w", "/dev/kvm"}
	}
	fmt.Fprintln(os.Stderr, "vmrun: trying hardware virtualisation (10 s at most, once)")
	limited, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	status, err := probe.run(limited, request{Args: command, Dir: "/", Env: environment(nil)}, io.Discard, io.Discard)
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	verdict := "no"
	if err == nil && status == 0 {
		verdict = "yes"
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return false, err
	}
	return verdict == "yes", writeAtomically(file, func(w io.Writer) error {
		_, err := io.WriteString(w, verdict)
		return err
	})
}

func createSparse(file string, size int64) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

func writeAtomically(file string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once renamed
	if err := errors.Join(write(f), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

func socketPair() (*os.File, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "port"), os.NewFile(uintptr(fds[1]), "port"), nil
}
