// Package boot is a small init for initrd images: it does what the Kata agent does only when
// it is process 1 itself, and then keeps the guest service as its one child.
//
// The service is a process of its own so that reaping orphans, which takes the exit status
// of whatever process ends, never takes one that the service waits for.
package boot

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const modulesFile = "/etc/sealvol/modules"

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

// baseMounts are what every program in the guest expects, in order.
func baseMounts() []mount {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	return []mount{
		{"proc", "/proc", "proc", safe, ""},
		{"sysfs", "/sys", "sysfs", safe, ""},
		{"dev", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", safe, ""},
	}
}

// links are those that a device manager would make.
func links() map[string]string {
	return map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
		"/dev/ptmx": "pts/ptmx",
	}
}

// Run prepares the guest, runs "serve" of our own binary and reaps orphans until it ends.
// Then it powers the machine off; it returns only if that failed.
func Run() error {
	err := prepare()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err == nil {
		err = supervise(log)
	}
	log.Error("the guest ends", "cause", err)
	unix.Sync()
	return errors.Join(err, unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

func prepare() error {
	for _, m := range baseMounts() {
		if err := m.mount(); err != nil {
			return err
		}
		if m.fstype == "devtmpfs" {
			if err := console(); err != nil {
				return err
			}
		}
	}
	for name, target := range links() {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("replace %s: %w", name, err)
		}
		if err := os.Symlink(target, name); err != nil {
			return fmt.Errorf("link %s: %w", name, err)
		}
	}
	if err := delegate("/sys/fs/cgroup"); err != nil {
		return err
	}
	if err := loadModules(modulesFile); err != nil {
		return err
	}
	if err := configfs("/sys/kernel/config"); err != nil {
		return err
	}
	return loopbackUp()
}

// configfs mounts the file system by which the kernel's TEE is asked, if the kernel has it: then there is a folder for it.
func configfs(target string) error {
	if _, err := os.Stat(target); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("configfs: %w", err)
	}
	return mount{"configfs", target, "configfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""}.mount()
}

// mount mounts m unless the kernel has done so (devtmpfs).
func (m mount) mount() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("mount point %s: %w", m.target, err)
	}
	if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s at %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// console makes the console our standard streams: an initrd without /dev/console starts its
// init with none.
func console() error {
	f, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	for fd := range 3 {
		if int(f.Fd()) == fd {
			return nil
		}
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("console: %w", err)
		}
	}
	return f.Close()
}

// delegate gives every controller of the root cgroup to its children.
func delegate(root string) error {
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("cgroup controllers: %w", err)
	}
	for _, c := range strings.Fields(string(controllers)) {
		// One at a time: one that cannot be delegated must not keep back the rest.
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return fmt.Errorf("enable cgroup controller %s: %w", c, err)
		}
	}
	return nil
}

// loadModules loads the kernel modules that file names, one absolute path a line, in order.
// No file means that the kernel needs none.
func loadModules(file string) error {
	list, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("kernel modules: %w", err)
	}
	for path := range strings.Lines(string(list)) {
		if path = strings.TrimSpace(path); path == "" {
			continue
		}
		if err := loadModule(path); err != nil {
			return fmt.Errorf("kernel module %s: %w", path, err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.ENODEV): // a cipher for instructions that this processor lacks
		slog.Info("kernel module not for this machine", "module", path)
		return nil
	}
	return err
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

// supervise runs the service and reaps every process until the service has ended. SIGTERM
// is passed on.
func supervise(log *slog.Logger) error {
	service, err := os.StartProcess("/proc/self/exe", []string{"sealvol-guest", "serve"}, &os.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return fmt.Errorf("start the service: %w", err)
	}
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM, syscall.SIGINT)
	go func() { // lives as long as the machine
		for range terminate {
			log.Info("asked to end")
			if err := unix.Kill(service.Pid, unix.SIGTERM); err != nil {
				log.Error("pass the signal on", "error", err)
			}
		}
	}()
	return reap(service.Pid)
}

// reap takes the exit status of all children, own and orphaned, until the one with the
// given pid ends.
func reap(service int) error {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for children: %w", err)
		case pid == service && status.Exited() && status.ExitStatus() == 0:
			return nil
		case pid == service && status.Signaled():
			return fmt.Errorf("the service was killed by %v", status.Signal())
		case pid == service && status.Exited():
			return fmt.Errorf("the service ended with status %d", status.ExitStatus())
		}
	}
}
