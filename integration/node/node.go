// Package node runs a Kubernetes node's part of sealvol for real: containerd,
// the NRI plugin, our shim before the stock Kata shim, QEMU, and crictl as the
// person at the keyboard. It expects to be root in a VM of its own
// (integration/vmrun with -nested), which it treats as its property.
package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Node is a running node. Its methods may be called concurrently.
type Node struct {
	art   Artefacts
	dir   string
	files atomic.Int64

	syslog, containerd, plugin, csi *process
}

// Dir is where a node keeps its sockets, logs and configuration.
const Dir = "/run/sealvol-node"

// Bounds for a VM without KVM: the start of a daemon, and the removal of a
// pod whose shim may just have died.
const (
	startLimit  = time.Minute
	removeLimit = time.Minute
)

// Start brings a node up: containerd answers, the images are there, and the
// plugin is registered. root is the folder of the checkout. progress gets a
// line for each long step.
func Start(ctx context.Context, root string, progress func(string)) (_ *Node, err error) {
	art, err := FromTree(root)
	if err != nil {
		return nil, err
	}
	n := &Node{art: art, dir: Dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Stop())
		}
	}()
	for _, sub := range []string{"etc", "logs", "opt", "nri-plugins", "nri-conf", "disks", "s"} {
		if err := os.MkdirAll(filepath.Join(n.dir, sub), 0o711); err != nil {
			return nil, err
		}
	}
	if err := n.writeConfig(root); err != nil {
		return nil, err
	}
	// Kata's shim refuses to start without a syslog socket. What the sandbox
	// prints on its console ends there too.
	if n.syslog, err = start(n.dir, "syslog", "busybox", "syslogd", "-n", "-S", "-O", filepath.Join(n.dir, "syslog.txt")); err != nil {
		return nil, err
	}
	progress("starting containerd")
	if err := n.StartContainerd(ctx); err != nil {
		return nil, err
	}
	progress("starting the NRI plugin")
	if err := n.StartPlugin(ctx); err != nil {
		return nil, err
	}
	progress("loading images")
	for _, image := range art.Images {
		if err := n.Import(ctx, image); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// Import gives containerd the images of an archive.
func (n *Node) Import(ctx context.Context, archive string) error {
	_, err := n.run(ctx, n.art.Ctr, "-a", n.Socket(), "-n", "k8s.io", "images", "import", "--local", "--snapshotter", "overlayfs", archive)
	return err
}

// Stop ends what Start started. Pods are not its business: remove them first.
func (n *Node) Stop() error {
	return errors.Join(n.csi.stop(syscall.SIGTERM), n.plugin.stop(syscall.SIGTERM), n.containerd.stop(syscall.SIGTERM), n.syslog.stop(syscall.SIGTERM))
}

// Socket is where containerd serves the CRI.
func (n *Node) Socket() string { return filepath.Join(n.dir, "containerd.sock") }

// NRI is where containerd serves NRI.
func (n *Node) NRI() string { return filepath.Join(n.dir, "nri.sock") }

func (n *Node) writeConfig(root string) error {
	runtime, err := os.ReadFile(filepath.Join(root, "contrib/containerd/sealvol.toml"))
	if err != nil {
		return err
	}
	driver, err := os.ReadFile(filepath.Join(root, "contrib/csi/csi.toml"))
	if err != nil {
		return err
	}
	// The samples name the paths of an installed node.
	runtime = bytes.ReplaceAll(runtime, []byte("/opt/sealvol/bin/containerd-shim-kata-sealvol-v2"), []byte(n.art.Shim))
	runtime = bytes.ReplaceAll(runtime, []byte("/etc/kata-containers/configuration.toml"), []byte(filepath.Join(n.dir, "etc/kata.toml")))
	driver = bytes.ReplaceAll(driver, []byte("/run/containerd/"), []byte(filepath.Join(n.dir, "state")+"/"))
	dropIn := filepath.Join(n.dir, "etc/sealvol.toml")
	files := map[string]string{
		dropIn: string(runtime),
		filepath.Join(n.dir, "etc/containerd.toml"): n.containerdConfig(dropIn),
		filepath.Join(n.dir, "etc/kata.toml"):       n.kataConfig(),
		filepath.Join(n.dir, "etc/csi.toml"):        string(driver),
		filepath.Join(n.dir, "etc/shim.toml"):       fmt.Sprintf("stock_shim = %q\n", n.art.KataShim),
		filepath.Join(n.dir, "etc/crictl.yaml"):     fmt.Sprintf("runtime-endpoint: unix://%[1]s\nimage-endpoint: unix://%[1]s\ntimeout: 150\n", n.Socket()),
	}
	for path, text := range files {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// StartContainerd starts containerd and waits until it answers.
func (n *Node) StartContainerd(ctx context.Context) (err error) {
	n.containerd, err = start(n.dir, "containerd", n.art.Containerd, "-c", filepath.Join(n.dir, "etc/containerd.toml"), "-l", "debug")
	if err != nil {
		return err
	}
	return poll(ctx, "containerd to answer", func() bool {
		_, err := n.run(ctx, n.art.Ctr, "-a", n.Socket(), "version")
		return err == nil && n.containerd.alive()
	}, startLimit)
}

// KillContainerd ends containerd at once, as a crash would.
func (n *Node) KillContainerd() error { return n.containerd.stop(syscall.SIGKILL) }

// StartPlugin starts the NRI plugin and waits until containerd knows it.
func (n *Node) StartPlugin(ctx context.Context) (err error) {
	n.plugin, err = start(n.dir, "plugin", n.art.Plugin, "-socket", n.NRI())
	if err != nil {
		return err
	}
	return n.AwaitPlugin(ctx)
}

// AwaitPlugin waits until the containerd that runs now knows the plugin.
func (n *Node) AwaitPlugin(ctx context.Context) error {
	return poll(ctx, "the plugin to register", func() bool {
		log, err := os.ReadFile(filepath.Join(n.dir, "containerd.log"))
		if err != nil {
			return false
		}
		connected := bytes.LastIndex(log, []byte(`10-sealvol\" connected and synchronized`))
		closed := bytes.LastIndex(log, []byte(`10-sealvol\" closed`))
		restarted := bytes.LastIndex(log, []byte(`"starting containerd"`))
		return n.plugin.alive() && connected > max(closed, restarted)
	}, startLimit)
}

// KillPlugin ends the plugin at once, as a crash would.
func (n *Node) KillPlugin() error { return n.plugin.stop(syscall.SIGKILL) }

// RunPod runs a pod's sandbox and gives its id.
func (n *Node) RunPod(ctx context.Context, p Pod) (id string, err error) {
	file, err := n.writePod(p)
	if err != nil {
		return "", err
	}
	runtime := p.Runtime
	if runtime == "" {
		runtime = "kata"
	}
	return n.Crictl(ctx, "runp", "--runtime", runtime, file)
}

// RunContainer creates and starts a container in a pod that runs, and gives
// its id. What the runtime and the guest do at creation is part of the start:
// CRI's own creation is only containerd's bookkeeping.
func (n *Node) RunContainer(ctx context.Context, pod string, p Pod, c Container) (id string, err error) {
	podFile, err := n.writePod(p)
	if err != nil {
		return "", err
	}
	attempt := n.files.Add(1)
	spec, err := p.containerJSON(c, attempt)
	if err != nil {
		return "", err
	}
	file := filepath.Join(n.dir, fmt.Sprintf("container-%d.json", attempt))
	if err := os.WriteFile(file, spec, 0o600); err != nil {
		return "", err
	}
	id, err = n.Crictl(ctx, "create", pod, file, podFile)
	if err != nil {
		return "", err
	}
	_, err = n.Crictl(ctx, "start", id)
	return id, err
}

func (n *Node) writePod(p Pod) (string, error) {
	spec, err := p.sandboxJSON()
	if err != nil {
		return "", err
	}
	file := filepath.Join(n.dir, fmt.Sprintf("pod-%d.json", n.files.Add(1)))
	return file, os.WriteFile(file, spec, 0o600)
}

// Crictl runs crictl and gives what it printed on standard output, trimmed.
// The error holds what it printed on standard error.
func (n *Node) Crictl(ctx context.Context, args ...string) (string, error) {
	args = append([]string{"--config", filepath.Join(n.dir, "etc/crictl.yaml")}, args...)
	out, err := n.run(ctx, n.art.Crictl, args...)
	// crictl gives containerd 5 s to greet it, which an emulated machine that is short of processors may need longer for. Nothing was asked yet.
	for range 3 {
		if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "validate service connection") || !strings.Contains(err.Error(), "error reading server preface") {
			break
		}
		out, err = n.run(ctx, n.art.Crictl, args...)
	}
	return out, err
}

// Exec runs a command in a container and gives its standard output.
func (n *Node) Exec(ctx context.Context, container string, args ...string) (string, error) {
	return n.Crictl(ctx, append([]string{"exec", container}, args...)...)
}

// Inspect runs the operator's tool against a sandbox.
func (n *Node) Inspect(ctx context.Context, sandbox string, args ...string) (string, error) {
	return n.run(ctx, n.art.Sealvol, append(append([]string{"inspect"}, args...), sandbox)...)
}

// Receipt gets the receipt of a sandbox by the operator's tool.
func (n *Node) Receipt(ctx context.Context, sandbox string, args ...string) (string, error) {
	return n.run(ctx, n.art.Sealvol, append(append([]string{"receipt"}, args...), sandbox)...)
}

// RemovePod stops and removes a pod with all its containers. It tries again
// as kubelet does: containerd refuses while it cleans up after a dead shim.
func (n *Node) RemovePod(ctx context.Context, id string) error {
	var last error
	if err := poll(ctx, "the pod to be removed", func() bool {
		_, stop := n.Crictl(ctx, "stopp", id)
		_, remove := n.Crictl(ctx, "rmp", "-f", id)
		last = errors.Join(stop, remove)
		return last == nil
	}, removeLimit); err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// Disk makes a block device of size bytes and gives the backing file, which
// is the host's view of it, and the device. undo gives both back.
func (n *Node) Disk(ctx context.Context, name string, size int64) (file, device string, undo func() error, err error) {
	file = filepath.Join(n.dir, "disks", name)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return "", "", nil, err
	}
	if err := os.Truncate(file, size); err != nil {
		return "", "", nil, errors.Join(err, os.Remove(file))
	}
	device, err = n.run(ctx, "losetup", "--find", "--show", file)
	if err != nil {
		return "", "", nil, errors.Join(err, os.Remove(file))
	}
	return file, device, func() error {
		_, err := n.run(context.WithoutCancel(ctx), "losetup", "--detach", device)
		return errors.Join(err, os.Remove(file))
	}, nil
}

// Logs gives the end of each log of the node, for a test that failed.
func (n *Node) Logs(lines int) string {
	var b strings.Builder
	for _, name := range []string{"containerd.log", "plugin.log", "csi.log", "syslog.txt"} {
		text, err := os.ReadFile(filepath.Join(n.dir, name))
		if err != nil {
			fmt.Fprintf(&b, "== %s: %v\n", name, err)
			continue
		}
		all := strings.Split(strings.TrimSpace(string(text)), "\n")
		fmt.Fprintf(&b, "== %s, last %d of %d lines\n%s\n", name, min(lines, len(all)), len(all), strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
	return b.String()
}

// ConsoleLog is what the sandboxes printed on their consoles so far.
func (n *Node) ConsoleLog() string {
	text, err := os.ReadFile(filepath.Join(n.dir, "syslog.txt"))
	if err != nil {
		return ""
	}
	var b strings.Builder
	for line := range strings.Lines(string(text)) {
		if _, console, ok := strings.Cut(line, "vmconsole="); ok {
			b.WriteString(console)
		}
	}
	return b.String()
}

func (n *Node) run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return strings.TrimSpace(stdout.String()), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// process is a daemon of the node. Its zero pointer is one that never ran.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// start runs a daemon whose output goes to dir/name.log.
func start(dir, name, path string, args ...string) (*process, error) {
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("node: %s: %w", name, err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		_ = cmd.Wait() // How it ended is in its log.
	}()
	return p, nil
}

func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// stop ends the process and waits for it. One that ended by itself is fine.
func (p *process) stop(sig syscall.Signal) error {
	if p == nil {
		return nil
	}
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(20 * time.Second):
		return errors.Join(fmt.Errorf("node: %s did not end on %v", p.cmd.Path, sig), p.cmd.Process.Kill())
	}
}

// poll waits until ok, until the context ends or until limit is over.
func poll(ctx context.Context, what string, ok func() bool, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("node: waiting for %s: %w", what, ctx.Err())
		case <-ticker.C:
		}
	}
	return nil
}
