package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestProcessStatus(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		script string
		want   int32
	}{
		"exit code": {"exit 9", 9},
		"killed":    {"kill -KILL $$", 137},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			io, child, err := newPipes()
			if err != nil {
				t.Fatal(err)
			}
			defer io.Close()
			cmd := exec.Command("sh", "-c", "cat; echo problem >&2; "+tc.script)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = child.in, child.out, child.err
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			child.Close()
			p, err := watch(cmd.Process.Pid, io)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.write(t.Context(), []byte("in")); err != nil {
				t.Fatal(err)
			}
			if err := io.closeStdin(); err != nil {
				t.Fatal(err)
			}
			if got := drain(t, io.stdout()); got != "in" {
				t.Errorf("stdout %q", got)
			}
			if got := drain(t, io.stderr()); got != "problem\n" {
				t.Errorf("stderr %q", got)
			}
			got, err := p.wait(t.Context())
			if err != nil || got != tc.want {
				t.Errorf("status %d, %v; want %d", got, err, tc.want)
			}
			if err := p.signal(9, true); !errors.Is(err, errNoProcess) {
				t.Errorf("signal after the end: %v", err)
			}
			if err := io.resize(1, 1); !errdefs.IsInvalidArgument(err) {
				t.Errorf("resize without a terminal: %v", err)
			}
		})
	}
}

func drain(t *testing.T, f *os.File) string {
	t.Helper()
	var out bytes.Buffer
	for {
		b, err := read(f, 3)
		if err != nil {
			if !errors.Is(err, errEOF) {
				t.Error(err)
			}
			return out.String()
		}
		out.Write(b)
	}
}

func TestWriteGivesUpAtTheDeadline(t *testing.T) {
	t.Parallel()
	io, child, err := newPipes()
	if err != nil {
		t.Fatal(err)
	}
	defer io.Close()
	defer child.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := io.write(ctx, make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write to a process that does not read: %v", err)
	}
}

func TestSpecFollowsTheAgent(t *testing.T) {
	t.Parallel()
	s := &sandbox{namespaces: map[string]string{"ipc": "/ns/ipc", "uts": "/ns/uts"}}
	got, err := s.spec(t.Context(), &pb.CreateContainerRequest{ContainerId: "c", OCI: &pb.Spec{
		Process: &pb.Process{Args: []string{"sh"}, ApparmorProfile: "cri-containerd.apparmor.d", User: &pb.User{UID: 7, AdditionalGids: []uint32{8}}},
		Root:    &pb.Root{Path: "/r", Readonly: true},
		Mounts:  []*pb.Mount{{Destination: "/mnt", Source: "/s", Type: "bind", Options: []string{"rbind"}}},
		Linux: &pb.Linux{
			CgroupsPath: "kubepods.slice:cri:c",
			Namespaces:  []*pb.LinuxNamespace{{Type: "ipc"}, {Type: "uts", Path: "/proc/1/ns/uts"}, {Type: "mount"}},
			Devices:     []*pb.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3}},
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if got.Process.User.UID != 7 || !slices.Equal(got.Process.User.AdditionalGids, []uint32{8}) || got.Process.ApparmorProfile != "" {
		t.Errorf("process %+v", got.Process)
	}
	if *got.Root != (specs.Root{Path: "/r", Readonly: true}) || got.Mounts[0].Source != "/s" {
		t.Errorf("root %+v, mounts %+v", got.Root, got.Mounts)
	}
	if got.Linux.CgroupsPath != "/kubepods.slice/cri/c" {
		t.Errorf("cgroup %s", got.Linux.CgroupsPath)
	}
	want := []specs.LinuxNamespace{{Type: "ipc", Path: "/ns/ipc"}, {Type: "uts", Path: "/ns/uts"}, {Type: "mount"}, {Type: "pid"}}
	if !slices.Equal(got.Linux.Namespaces, want) {
		t.Errorf("namespaces %v", got.Linux.Namespaces)
	}
	if d := got.Linux.Devices[0]; d.Path != "/dev/x" || d.Major != 1 || len(got.Linux.Resources.Devices) != 1 {
		t.Errorf("devices %+v, rules %+v", got.Linux.Devices, got.Linux.Resources.Devices)
	}
}

func TestHostNameNeedsANamespace(t *testing.T) {
	t.Parallel()
	for want, namespaces := range map[string][]*pb.LinuxNamespace{"": nil, "pod": {{Type: "uts"}}} {
		got, err := (&sandbox{}).spec(t.Context(), &pb.CreateContainerRequest{OCI: &pb.Spec{
			Hostname: "pod", Process: &pb.Process{}, Root: &pb.Root{}, Linux: &pb.Linux{Namespaces: namespaces},
		}})
		if err != nil || got.Hostname != want {
			t.Errorf("host name %q with namespaces %v: %v", got.Hostname, namespaces, err)
		}
	}
}

func TestRequestsThatTheStandInCannotServeAreErrors(t *testing.T) {
	t.Parallel()
	full := func() *pb.CreateContainerRequest {
		return &pb.CreateContainerRequest{OCI: &pb.Spec{Process: &pb.Process{}, Root: &pb.Root{}, Linux: &pb.Linux{}}}
	}
	for name, tc := range map[string]struct {
		change func(*pb.CreateContainerRequest)
		is     func(error) bool
	}{
		"no specification": {func(r *pb.CreateContainerRequest) { r.OCI = nil }, errdefs.IsInvalidArgument},
		"no process":       {func(r *pb.CreateContainerRequest) { r.OCI.Process = nil }, errdefs.IsInvalidArgument},
		"seccomp":          {func(r *pb.CreateContainerRequest) { r.OCI.Linux.Seccomp = &pb.LinuxSeccomp{} }, errdefs.IsNotImplemented},
		"hooks":            {func(r *pb.CreateContainerRequest) { r.OCI.Hooks = &pb.Hooks{} }, errdefs.IsNotImplemented},
		"shared PIDs":      {func(r *pb.CreateContainerRequest) { r.SandboxPidns = true }, errdefs.IsFailedPrecondition},
		"scsi device": {func(r *pb.CreateContainerRequest) {
			r.OCI.Linux.Devices = []*pb.LinuxDevice{{Path: "/dev/x"}}
			r.Devices = []*pb.Device{{ContainerPath: "/dev/x", Type: "scsi"}}
		}, errdefs.IsNotImplemented},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := full()
			tc.change(r)
			if _, err := (&sandbox{}).spec(t.Context(), r); !tc.is(err) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestFindBlockDevice(t *testing.T) {
	t.Parallel()
	sysfs := t.TempDir()
	bridge := filepath.Join(sysfs, "devices/pci0000:00/0000:00:02.0")
	disk := filepath.Join(bridge, "0000:01:1f.0/virtio3/block/null") // /dev/null is there everywhere
	for _, d := range []string{filepath.Join(bridge, "pci_bus/0000:01"), disk} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(disk, "dev"), []byte("254:16\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	node, major, minor, err := findBlockDevice(sysfs, "02/1f")
	if err != nil || node != "/dev/null" || major != 254 || minor != 16 {
		t.Errorf("got %s %d:%d %v", node, major, minor, err)
	}
	for path, want := range map[string]error{
		"02/02": fs.ErrNotExist, "03/01": fs.ErrNotExist,
		"": errdefs.ErrInvalidArgument, "../01": errdefs.ErrInvalidArgument, "02//": errdefs.ErrInvalidArgument, "02/20": errdefs.ErrInvalidArgument,
	} {
		if _, _, _, err := findBlockDevice(sysfs, path); !errors.Is(err, want) {
			t.Errorf("path %q: %v, want %v", path, err, want)
		}
	}
}

func TestLocalStorageGetsModeAndGroup(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a/b")
	gid := fmt.Sprintf("fsgid=%d", os.Getgid())
	if err := mountStorage(t.Context(), &pb.Storage{Driver: "local", MountPoint: dir, Options: []string{"mode=0777", gid}}); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(dir)
	if err != nil || fi.Mode().Perm() != 0o777 || fi.Mode()&fs.ModeSetgid == 0 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	for name, st := range map[string]*pb.Storage{
		"unknown driver": {Driver: "nvdimm", MountPoint: dir},
		"bad group":      {Driver: "local", MountPoint: dir, Options: []string{"fsgid=-1"}},
	} {
		if err := mountStorage(t.Context(), st); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestRuncMessageIsTheLastOfItsLog(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "log")
	for text, want := range map[string]string{
		`{"level":"warning","msg":"first"}` + "\n" + `{"level":"error","msg":"last"}` + "\n": "last",
		"plain text\n": "plain text",
		"":             "",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lastMessage(file); got != want {
			t.Errorf("%q gives %q", text, got)
		}
	}
}

func TestConfigIgnoresKeysOfTheRealAgent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "agent.toml")
	if err := os.WriteFile(file, []byte("log_level = \"debug\"\nserver_addr = \"tcp://0.0.0.0:1\"\n[endpoints]\nallowed = []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := run(t.Context(), file, nil)
	if err == nil || !strings.Contains(err.Error(), "tcp://0.0.0.0:1") {
		t.Errorf("address that is not supported: %v", err)
	}
}
