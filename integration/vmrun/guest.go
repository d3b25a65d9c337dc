package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// baseModules are there from the start; any other is loaded by the kernel or modprobe when it is needed.
func baseModules() []string {
	return []string{
		"virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "virtio_blk",
		"dm_mod", "dm_crypt", "dm_integrity", "loop", "ext4",
		// As a guest image has them: who has the plain ones already gets no others by the algorithm's name.
		"aesni_intel", "sha256_ssse3", "aegis128_aesni",
		"authenc", "xts", "aegis128", "hmac", "sha256_generic",
	}
}

func scsiModules() []string { return []string{"virtio_scsi", "sd_mod"} }

func mmioModules() []string { return []string{"virtio_mmio"} }

func nestedModules() []string {
	return []string{"kvm_amd", "kvm_intel", "vhost_vsock", "vhost_net", "tun", "vsock_loopback", "vsock_diag", "veth", "bridge", "fuse"}
}

// guestMain is process 1 of the machine.
func guestMain() {
	fmt.Fprintln(os.Stderr, "vmrun: in the machine:", guest())
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// guest runs the command; it returns only if it cannot tell the host how that went.
func guest() error {
	if err := mountAll([]mount{
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"devtmpfs", "/dev", "devtmpfs", 0, ""},
	}); err != nil {
		return err
	}
	if err := loadModules("base"); err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	status, err := serve(port)
	if err != nil {
		if err := writeFrame(port, kindError, []byte(err.Error())); err != nil {
			return err
		}
	} else if err := writeFrame(port, kindExit, []byte{byte(status)}); err != nil {
		return err
	}
	select {} // the host ends the machine
}

func serve(port *os.File) (int, error) {
	var r request
	if err := json.NewDecoder(port).Decode(&r); err != nil {
		return 0, err
	}
	for _, list := range r.Drivers {
		if err := loadModules(list); err != nil {
			return 0, err
		}
	}
	if r.Nested {
		if err := loadModules("nested"); err != nil {
			return 0, err
		}
		if err := holdKVM(); err != nil {
			return 0, err
		}
	}
	if err := enterHostRoot(); err != nil {
		return 0, err
	}
	if err := settle(r); err != nil {
		return 0, err
	}
	return runCommand(port, r)
}

// loadModules loads a list of modules, without those that are for other processors.
func loadModules(list string) error {
	paths, err := os.ReadFile("/modules/" + list)
	if err != nil {
		return err
	}
	for _, path := range strings.Fields(string(paths)) {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("module %s: %w", path, err)
		}
	}
	return nil
}

// openPort opens our virtio-serial port and names all ports as udev would.
func openPort() (*os.File, error) {
	const ports = "/dev/virtio-ports"
	if err := os.Mkdir(ports, 0o755); err != nil {
		return nil, err
	}
	for range 100 { // the host announces them one by one
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				return nil, err
			}
			link := filepath.Join(ports, strings.TrimSpace(string(text)))
			if err := os.Symlink("../"+filepath.Base(filepath.Dir(name)), link); err != nil && !errors.Is(err, os.ErrExist) {
				return nil, err
			}
		}
		if len(names) == 2 {
			return os.OpenFile(filepath.Join(ports, portName), os.O_RDWR, 0)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, errors.New("no virtio-serial ports")
}

type mount struct {
	source, target, fstype string
	flags                  uintptr
	options                string
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.source, m.target, err)
		}
	}
	return nil
}

// enterHostRoot makes the host's files, under a layer in memory, the root of this process.
func enterHostRoot() error {
	if err := mountAll([]mount{
		{"root", "/lower", "9p", unix.MS_RDONLY, "trans=virtio,version=9p2000.L,msize=512000,cache=loose"},
		{"tmpfs", "/layer", "tmpfs", 0, "mode=0755"},
	}); err != nil {
		return err
	}
	for _, dir := range []string{"/layer/upper", "/layer/work"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := mountAll([]mount{
		{"overlay", "/root", "overlay", 0, "lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work"},
		{"/proc", "/root/proc", "", unix.MS_MOVE, ""},
		{"/sys", "/root/sys", "", unix.MS_MOVE, ""},
		{"/dev", "/root/dev", "", unix.MS_MOVE, ""},
	}); err != nil {
		return err
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	// The first root cannot be unmounted; moving over it is what switch_root does.
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// settle makes what a booted system has.
func settle(r request) error {
	mounts := []mount{
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "/var/lib", "tmpfs", 0, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", 0, "ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"},
		{"mqueue", "/dev/mqueue", "mqueue", 0, ""},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""},
		{"debugfs", "/sys/kernel/debug", "debugfs", 0, ""},
		{"tracefs", "/sys/kernel/tracing", "tracefs", 0, ""},
		{r.Modules, "/lib/modules", "", unix.MS_BIND, ""}, // for modprobe
	}
	for _, s := range r.Shares {
		// No cache: the host's side may change the files, and must see ours at once.
		mounts = append(mounts, mount{s.Tag, s.Path, "9p", 0, "trans=virtio,version=9p2000.L,msize=512000,cache=none"})
	}
	if err := mountAll(mounts); err != nil {
		return err
	}
	for name, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		if err := os.Symlink("/proc/self/fd"+target, "/dev/"+name); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/run/lock", "/run/tmp"} {
		if err := os.Mkdir(dir, 0o777); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("vmrun")); err != nil {
		return err
	}
	return loopbackUp()
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}

// runCommand runs the command to its end and sends what it writes.
func runCommand(port *os.File, r request) (int, error) {
	for _, variable := range r.Env {
		if path, ok := strings.CutPrefix(variable, "PATH="); ok {
			os.Setenv("PATH", path)
		}
	}
	if err := os.Chdir(r.Dir); err != nil {
		return 0, err
	}
	program, err := exec.LookPath(r.Args[0])
	if err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	files := []*os.File{null}
	var sending sync.Mutex
	var pumps sync.WaitGroup
	for _, k := range []kind{kindStdout, kindStderr} {
		out, in, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		files = append(files, in)
		pumps.Go(func() { pump(port, &sending, k, out) })
	}
	process, err := os.StartProcess(program, r.Args, &os.ProcAttr{Env: r.Env, Files: files, Sys: nil})
	for _, file := range files {
		file.Close()
	}
	if err != nil {
		return 0, err
	}
	status, err := reap(process.Pid)
	if err != nil {
		return 0, err
	}
	// What the command left running may hold its pipes open for ever.
	drained := make(chan struct{})
	go func() {
		pumps.Wait()
		close(drained)
	}()
	select {
	case <-drained:
	case <-time.After(time.Second):
	}
	sending.Lock() // no frame after the last
	return status, nil
}

func pump(port io.Writer, sending *sync.Mutex, k kind, out io.Reader) {
	buf := make([]byte, maxPayload)
	for {
		n, err := out.Read(buf)
		if n > 0 {
			sending.Lock()
			sendErr := writeFrame(port, k, buf[:n])
			sending.Unlock()
			err = errors.Join(err, sendErr)
		}
		if err != nil {
			return
		}
	}
}

// reap waits for all processes, as process 1 has to, until the given one ends.
func reap(pid int) (int, error) {
	for {
		var status unix.WaitStatus
		ended, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case ended != pid:
		case status.Signaled():
			return statusSignal + int(status.Signal()), nil
		default:
			return status.ExitStatus(), nil
		}
	}
}
