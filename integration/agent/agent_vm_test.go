//go:build vm

package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// These tests run containers for real. They need root, runc, busybox and
// cgroup v2 and change the machine's mounts, so they belong into a VM.

type guest struct {
	pb.AgentServiceService
	*testing.T
	rootfs string
}

// newGuest starts the agent, connects as Kata's shim does and makes a sandbox.
func newGuest(t *testing.T) *guest {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "agent.sock")
	l, err := listen("unix://" + sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, l, slog.New(slog.NewTextHandler(t.Output(), nil))) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("agent: %v", err)
		}
		if left := mountsBelow(t, stateDir, t.TempDir()); len(left) > 0 {
			t.Errorf("mounts left: %v", left)
		}
	})
	conn, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() { client.Close() })
	if _, err := pb.NewHealthClient(client).Check(ctx, &pb.CheckRequest{}); err != nil {
		t.Fatal(err)
	}
	g := &guest{pb.NewAgentServiceClient(client), t, makeRootfs(t)}
	_, err = g.CreateSandbox(ctx, &pb.CreateSandboxRequest{
		SandboxId: "sandbox", Hostname: "pod",
		Storages: []*pb.Storage{{Driver: "ephemeral", Source: "shm", Fstype: "tmpfs",
			MountPoint: filepath.Join(t.TempDir(), "shm"), Options: []string{"noexec", "nosuid", "nodev", "mode=1777", "size=67108864"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// makeRootfs gives busybox a mount of its own, as every container has.
func makeRootfs(t *testing.T) string {
	dir := t.TempDir()
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "mnt"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range []string{"sh", "cat", "sleep", "echo", "tty", "stty", "hostname", "touch", "stat"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func mountsBelow(t *testing.T, dirs ...string) (found []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		p := strings.Fields(line)[4]
		if slices.ContainsFunc(dirs, func(d string) bool { return strings.HasPrefix(p, d+"/") }) {
			found = append(found, p)
		}
	}
	return found
}

// request is what Kata's shim sends for a container of CRI, after its
// constrainGRPCSpec: no PID namespace, no hooks, no devices.
func (g *guest) request(id string, terminal bool, args ...string) *pb.CreateContainerRequest {
	return &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: &pb.Spec{
		Version: "1.2.0",
		Process: &pb.Process{Terminal: terminal, Args: args, Env: []string{"PATH=/bin"}, Cwd: "/", User: &pb.User{},
			Capabilities: &pb.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Effective: []string{"CAP_KILL"}, Permitted: []string{"CAP_KILL"}}},
		Root: &pb.Root{Path: g.rootfs},
		Mounts: []*pb.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &pb.Linux{
			CgroupsPath: "/test/" + id,
			Namespaces:  []*pb.LinuxNamespace{{Type: "ipc"}, {Type: "uts"}, {Type: "mount"}},
			Resources:   &pb.LinuxResources{Memory: &pb.LinuxMemory{Limit: 256 << 20}, CPU: &pb.LinuxCPU{Shares: 512}},
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
		},
	}}
}

func (g *guest) create(r *pb.CreateContainerRequest) {
	g.Helper()
	if _, err := g.CreateContainer(g.Context(), r); err != nil {
		g.Fatalf("create %s: %v", r.ContainerId, err)
	}
}

func (g *guest) run(id string, args ...string) {
	g.Helper()
	g.create(g.request(id, false, args...))
	g.start(id)
}

func (g *guest) start(id string) {
	g.Helper()
	if _, err := g.StartContainer(g.Context(), &pb.StartContainerRequest{ContainerId: id}); err != nil {
		g.Fatalf("start %s: %v", id, err)
	}
}

func (g *guest) exec(id, execID string, p *pb.Process) {
	g.Helper()
	p.Env, p.Cwd, p.User = []string{"PATH=/bin"}, "/", &pb.User{}
	if _, err := g.ExecProcess(g.Context(), &pb.ExecProcessRequest{ContainerId: id, ExecId: execID, Process: p}); err != nil {
		g.Fatalf("exec: %v", err)
	}
}

func (g *guest) wait(id, execID string) int32 {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), 30*time.Second)
	defer cancel()
	resp, err := g.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: id, ExecId: execID})
	if err != nil {
		g.Fatalf("wait for %s in %s: %v", execID, id, err)
	}
	return resp.Status
}

func (g *guest) remove(id string) {
	g.Helper()
	if _, err := g.RemoveContainer(g.Context(), &pb.RemoveContainerRequest{ContainerId: id}); err != nil {
		g.Fatalf("remove %s: %v", id, err)
	}
}

// output copies a stream as Kata's shim does: until any error.
func (g *guest) output(id, execID string, read func(context.Context, *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error)) string {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	for {
		resp, err := read(ctx, &pb.ReadStreamRequest{ContainerId: id, ExecId: execID, Len: 32 << 10})
		if err != nil {
			if ctx.Err() != nil {
				g.Fatalf("stream of %s does not end; so far %q", execID, out.String())
			}
			return out.String()
		}
		out.Write(resp.Data)
	}
}

func (g *guest) stdin(id, execID, text string) {
	g.Helper()
	if _, err := g.WriteStdin(g.Context(), &pb.WriteStreamRequest{ContainerId: id, ExecId: execID, Data: []byte(text)}); err != nil {
		g.Fatal(err)
	}
}

func TestContainerRunsWithOutputInputAndExitCode(t *testing.T) {
	g := newGuest(t)
	g.run("c1", "sh", "-c", "read line; echo got $line; echo bad >&2; hostname; exit 7")
	g.stdin("c1", "c1", "hello\n")
	if got := g.output("c1", "c1", g.ReadStdout); got != "got hello\npod\n" {
		t.Errorf("stdout %q", got)
	}
	if got := g.output("c1", "c1", g.ReadStderr); got != "bad\n" {
		t.Errorf("stderr %q", got)
	}
	for range 2 { // Kata's shim waits twice: for the exit code and before RemoveContainer
		if got := g.wait("c1", "c1"); got != 7 {
			t.Errorf("exit code %d", got)
		}
	}
	g.remove("c1")
	_, err := g.StartContainer(t.Context(), &pb.StartContainerRequest{ContainerId: "c1"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("start after removal: %v", err)
	}
}

func TestStdinClosedByTheShimEndsTheReader(t *testing.T) {
	g := newGuest(t)
	g.run("c1", "cat")
	big := strings.Repeat("0123456789abcdef", 64<<10/16) // as much as a pipe holds
	g.stdin("c1", "c1", big)
	if _, err := g.CloseStdin(t.Context(), &pb.CloseStdinRequest{ContainerId: "c1", ExecId: "c1"}); err != nil {
		t.Fatal(err)
	}
	if got := g.output("c1", "c1", g.ReadStdout); got != big {
		t.Errorf("%d bytes came back of %d", len(got), len(big))
	}
	if got := g.wait("c1", "c1"); got != 0 {
		t.Errorf("exit code %d", got)
	}
}

func TestExec(t *testing.T) {
	g := newGuest(t)
	g.run("c1", "sleep", "1000")

	g.exec("c1", "e1", &pb.Process{Args: []string{"sh", "-c", "cat; exit 3"}})
	g.stdin("c1", "e1", "abc")
	g.CloseStdin(t.Context(), &pb.CloseStdinRequest{ContainerId: "c1", ExecId: "e1"})
	if got := g.output("c1", "e1", g.ReadStdout); got != "abc" {
		t.Errorf("stdout %q", got)
	}
	if got := g.wait("c1", "e1"); got != 3 {
		t.Errorf("exit code %d", got)
	}

	g.exec("c1", "e2", &pb.Process{Args: []string{"sleep", "1000"}})
	if _, err := g.SignalProcess(t.Context(), &pb.SignalProcessRequest{ContainerId: "c1", ExecId: "e2", Signal: uint32(unix.SIGTERM)}); err != nil {
		t.Fatal(err)
	}
	if got := g.wait("c1", "e2"); got != 128+15 {
		t.Errorf("exit code %d after SIGTERM", got)
	}

	_, err := g.ExecProcess(t.Context(), &pb.ExecProcessRequest{ContainerId: "c1", ExecId: "e3",
		Process: &pb.Process{Args: []string{"nothing-here"}, Env: []string{"PATH=/bin"}, Cwd: "/", User: &pb.User{}}})
	if err == nil || !strings.Contains(err.Error(), "nothing-here") {
		t.Errorf("exec of a missing program: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	g := newGuest(t)
	g.run("c1", "sleep", "1000")
	g.exec("c1", "e1", &pb.Process{Terminal: true, Args: []string{"sh", "-c", "tty; read x; stty size; sleep 1000 & exit 4"},
		ConsoleSize: &pb.Box{Height: 10, Width: 20}})
	if _, err := g.TtyWinResize(t.Context(), &pb.TtyWinResizeRequest{ContainerId: "c1", ExecId: "e1", Row: 33, Column: 99}); err != nil {
		t.Fatal(err)
	}
	g.stdin("c1", "e1", "x\n")
	got := g.output("c1", "e1", g.ReadStdout) // ends although a child keeps the terminal
	if !strings.Contains(got, "/dev/pts/") || !strings.Contains(got, "33 99") {
		t.Errorf("terminal said %q", got)
	}
	if got := g.output("c1", "e1", g.ReadStderr); got != "" {
		t.Errorf("stderr of a terminal: %q", got)
	}
	if got := g.wait("c1", "e1"); got != 4 {
		t.Errorf("exit code %d", got)
	}

	g.create(g.request("c2", true, "tty"))
	g.start("c2")
	if got := g.output("c2", "c2", g.ReadStdout); !strings.Contains(got, "/dev/pts/") {
		t.Errorf("terminal of the container said %q", got)
	}
}

func TestSignals(t *testing.T) {
	for name, tc := range map[string]struct {
		args   []string
		signal unix.Signal
		execID string
		want   int32
	}{
		"kill":                        {[]string{"sleep", "1000"}, unix.SIGKILL, "c1", 137},
		"term without a handler":      {[]string{"sleep", "1000"}, unix.SIGTERM, "c1", 137},
		"term with a handler":         {[]string{"sh", "-c", "trap 'exit 5' TERM; echo; while :; do sleep 0.1; done"}, unix.SIGTERM, "c1", 5},
		"kill every process together": {[]string{"sh", "-c", "sleep 1000 & sleep 1000"}, unix.SIGKILL, "", 137},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			g.run("c1", tc.args...)
			untilRuns(t, "c1", tc.args[0])
			if strings.HasPrefix(name, "term with ") {
				g.ReadStdout(t.Context(), &pb.ReadStreamRequest{ContainerId: "c1", ExecId: "c1", Len: 1}) // the handler is in place
			}
			if _, err := g.SignalProcess(t.Context(), &pb.SignalProcessRequest{ContainerId: "c1", ExecId: tc.execID, Signal: uint32(tc.signal)}); err != nil {
				t.Fatal(err)
			}
			if got := g.wait("c1", "c1"); got != tc.want {
				t.Errorf("exit code %d, want %d", got, tc.want)
			}
			_, err := g.SignalProcess(t.Context(), &pb.SignalProcessRequest{ContainerId: "c1", ExecId: "c1", Signal: uint32(unix.SIGKILL)})
			if err == nil || !strings.Contains(err.Error(), "ESRCH: No such process") {
				t.Errorf("signal after the end: %v", err)
			}
			g.remove("c1")
		})
	}
}

func TestTwoContainersShareWhatTheSandboxShares(t *testing.T) {
	g := newGuest(t)
	g.run("c1", "sleep", "1000")
	g.run("c2", "sleep", "1000")
	if _, err := g.CreateContainer(t.Context(), g.request("c2", false, "sleep", "1")); status.Code(err) != codes.AlreadyExists {
		t.Errorf("same id twice: %v", err)
	}
	link := func(id, ns string) string {
		c := pidOf(t, id)
		s, err := os.Readlink("/proc/" + c + "/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for ns, shared := range map[string]bool{"ipc": true, "uts": true, "net": true, "mnt": false, "pid": false} {
		if got := link("c1", ns) == link("c2", ns); got != shared {
			t.Errorf("%s namespace shared: %v", ns, got)
		}
	}
	g.remove("c1")
	g.exec("c2", "e", &pb.Process{Args: []string{"hostname"}})
	if got := g.output("c2", "e", g.ReadStdout); got != "pod\n" {
		t.Errorf("second container after the first is gone: %q", got)
	}
}

func TestPodSharesPIDs(t *testing.T) {
	g := newGuest(t)
	g.run("sandbox", "sleep", "1000")
	r := g.request("c1", false, "sh", "-c", "cat /proc/1/cmdline; sleep 1000 & sleep 1000")
	r.SandboxPidns = true
	g.create(r)
	g.start("c1")
	resp, err := g.ReadStdout(t.Context(), &pb.ReadStreamRequest{ContainerId: "c1", ExecId: "c1", Len: 100})
	if err != nil || !strings.HasPrefix(string(resp.Data), "sleep\x00") {
		t.Errorf("PID 1 is %q, %v", resp, err)
	}
	g.remove("c1") // all of it, although PID 1 lives on
	if _, err := os.Stat("/sys/fs/cgroup/test/c1"); !os.IsNotExist(err) {
		t.Errorf("cgroup after the removal: %v", err)
	}
}

// untilRuns waits until the container's init is its program. runc start returns a moment before: what is sent
// until then meets the handlers of runc's own init and is forgotten.
func untilRuns(t *testing.T, id, program string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for cmdline := "/proc/" + pidOf(t, id) + "/cmdline"; ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(cmdline)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(string(b), program+"\x00") {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s runs %q, not %s", id, b, program)
		}
	}
}

// pidOf finds the container's init by its cgroup, as sealvol's gate does.
func pidOf(t *testing.T, id string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/fs/cgroup/test/" + id + "/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(string(b))
	if len(pids) == 0 {
		t.Fatalf("no process in the cgroup of %s", id)
	}
	return pids[0]
}

// The gate looks at the mounts of a container that is created but not started.
func TestMountsOfACreatedContainerAreItsOwn(t *testing.T) {
	g := newGuest(t)
	src := t.TempDir()
	if err := unix.Mount("volume", src, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	r := g.request("c1", false, "sleep", "1000")
	r.OCI.Mounts = append(r.OCI.Mounts, &pb.Mount{Destination: "/mnt", Type: "bind", Source: src, Options: []string{"rbind", "rw"}})
	g.create(r)
	// As the gate does when the agent has answered.
	if err := unix.Unmount(src, 0); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/" + pidOf(t, "c1") + "/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for line := range strings.Lines(string(b)) {
		seen[strings.Fields(line)[4]]++
	}
	for _, p := range []string{"/", "/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/mnt"} {
		if seen[p] != 1 {
			t.Errorf("%s is mounted %d times", p, seen[p])
		}
	}
	for p := range seen {
		if strings.HasPrefix(p, stateDir) || strings.HasPrefix(p, "/newroot") || p == src {
			t.Errorf("mount of the guest visible: %s", p)
		}
	}
	if t.Failed() {
		t.Logf("%s", b)
	}
	g.start("c1")
	g.exec("c1", "e", &pb.Process{Args: []string{"touch", "/mnt/file"}})
	if got := g.wait("c1", "e"); got != 0 {
		t.Errorf("write to the volume: exit code %d", got)
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	g := newGuest(t)
	before := len(mountsBelow(t, "/"))
	r := g.request("c1", false, "sleep", "1000")
	r.Storages = []*pb.Storage{{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: filepath.Join(t.TempDir(), "e"), Options: []string{"fsgid=5"}}}
	r.OCI.Mounts = append(r.OCI.Mounts, &pb.Mount{Destination: "/mnt", Type: "bind", Source: "/nowhere", Options: []string{"rbind"}})
	if _, err := g.CreateContainer(t.Context(), r); err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Fatalf("create with a missing mount source: %v", err)
	}
	if after := len(mountsBelow(t, "/")); after != before {
		t.Errorf("%d mounts before, %d after", before, after)
	}
	r.OCI.Mounts = r.OCI.Mounts[:len(r.OCI.Mounts)-1]
	g.create(r) // the id is free again
	g.remove("c1")
	if after := len(mountsBelow(t, "/")); after != before {
		t.Errorf("%d mounts before, %d after removal", before, after)
	}
}

// Without the gate in front a block storage is mounted and a block device
// handed out as the host says, as the real agent does.
func TestDiskAtPCIPath(t *testing.T) {
	g := newGuest(t)
	node, major, minor, err := waitBlockDevice(t.Context(), "02/01")
	if err != nil {
		t.Fatalf("run this in a machine with a disk: %v", err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", node).CombinedOutput(); err != nil {
		t.Fatalf("mkfs: %v: %s", err, out)
	}
	mountPoint := filepath.Join(t.TempDir(), "storage")
	r := g.request("c1", false, "sh", "-c", "touch /mnt/file; stat -c %t:%T /dev/raw")
	r.Storages = []*pb.Storage{{Driver: "blk", Source: "02/01", Fstype: "ext4", MountPoint: mountPoint, Options: []string{"nosuid"}}}
	r.OCI.Mounts = append(r.OCI.Mounts, &pb.Mount{Destination: "/mnt", Type: "bind", Source: mountPoint, Options: []string{"rbind", "rw"}})
	r.Devices = []*pb.Device{{Type: "blk", Id: "02/01", ContainerPath: "/dev/raw"}}
	r.OCI.Linux.Devices = []*pb.LinuxDevice{{Path: "/dev/raw", Type: "b", Major: 7, Minor: 99}}
	g.create(r)
	g.start("c1")
	if got, want := g.output("c1", "c1", g.ReadStdout), fmt.Sprintf("%x:%x\n", major, minor); got != want {
		t.Errorf("device number %q in the container, want %q", got, want)
	}
	if _, err := os.Stat(filepath.Join(mountPoint, "file")); err != nil {
		t.Error(err)
	}
	stats, err := g.GetVolumeStats(t.Context(), &pb.VolumeStatsRequest{VolumeGuestPath: mountPoint})
	if err != nil || stats.Usage[0].Total == 0 {
		t.Errorf("volume stats %v %v", stats, err)
	}
	g.remove("c1")
	if left := mountsBelow(t, filepath.Dir(mountPoint)); slices.Contains(left, mountPoint) {
		t.Errorf("mounts left: %v", left)
	}
}

func TestStatsUpdatePauseResume(t *testing.T) {
	g := newGuest(t)
	g.run("c1", "sleep", "1000")
	st, err := g.StatsContainer(t.Context(), &pb.StatsContainerRequest{ContainerId: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	if st.CgroupStats.MemoryStats.Usage.Usage == 0 || st.CgroupStats.MemoryStats.Usage.Limit != 256<<20 || st.CgroupStats.CpuStats.CpuUsage.TotalUsage == 0 {
		t.Errorf("stats %v", st)
	}
	if _, err := g.UpdateContainer(t.Context(), &pb.UpdateContainerRequest{ContainerId: "c1",
		Resources: &pb.LinuxResources{Memory: &pb.LinuxMemory{Limit: 128 << 20}}}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile("/sys/fs/cgroup/test/c1/memory.max"); strings.TrimSpace(string(b)) != "134217728" {
		t.Errorf("memory.max %s after the update", b)
	}
	if _, err := g.PauseContainer(t.Context(), &pb.PauseContainerRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile("/sys/fs/cgroup/test/c1/cgroup.freeze"); strings.TrimSpace(string(b)) != "1" {
		t.Errorf("cgroup.freeze %s", b)
	}
	if _, err := g.ResumeContainer(t.Context(), &pb.ResumeContainerRequest{ContainerId: "c1"}); err != nil {
		t.Fatal(err)
	}
}

func TestDestroySandboxEndsTheAgentWithContainersRunning(t *testing.T) {
	g := newGuest(t)
	g.run("c1", "sleep", "1000")
	oom := make(chan error, 1)
	go func() {
		_, err := g.GetOOMEvent(t.Context(), &pb.GetOOMEventRequest{})
		oom <- err
	}()
	if _, err := g.DestroySandbox(t.Context(), &pb.DestroySandboxRequest{}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-oom:
		if err == nil {
			t.Error("an event out of nothing")
		}
	case <-time.After(10 * time.Second):
		t.Error("GetOOMEvent still blocks")
	}
	if out, err := exec.Command("runc", "--root", stateDir+"/runc", "list", "-q").Output(); err != nil || len(out) > 0 {
		t.Errorf("containers left: %q %v", out, err)
	}
}
