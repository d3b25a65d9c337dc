package gate

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sealvol/sealvol/guest/frame"
)

func TestSetPolicyCountsOnceTheAgentTookIt(t *testing.T) {
	t.Parallel()
	h := start(t)
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "mine"})
	must(t, err)
	if got := h.agent.last("SetPolicy").(*agent.SetPolicyRequest).Policy; got != "for the agent: mine" {
		t.Errorf("the agent got %q", got)
	}
	p, warnings := h.gate.Describe()
	if p.Digest != "digest of mine" || p.Source != "set-policy" || len(warnings) != 3 {
		t.Errorf("in force: %v, %q", p, warnings)
	}
}

// Reading a text may take long and cannot be stopped, so that a host could keep the guest busy with one after the other.
func TestHostThatSendsOneBadPolicyAfterTheOther(t *testing.T) {
	t.Parallel()
	h := start(t)
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "bad"})
	wants(t, err, codes.InvalidArgument, "bad text")
	_, err = h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "mine"})
	wants(t, err, codes.PermissionDenied, "second")
	_, err = h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.FailedPrecondition, "not taken")
	h.wantJournal()
}

func TestSecondSetPolicyIsRefused(t *testing.T) {
	t.Parallel()
	h := start(t)
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "mine"})
	must(t, err)
	other, _ := h.connect()
	_, err = other.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "theirs"})
	wants(t, err, codes.PermissionDenied, "second")
	h.wantJournal("agent SetPolicy")
	if p, _ := h.gate.Describe(); p.Digest != "digest of mine" {
		t.Errorf("in force: %v", p)
	}
}

func TestPolicyThatTheAgentRefusedIsNotInForceNorIsAnother(t *testing.T) {
	t.Parallel()
	h := start(t)
	h.agent.refuse("SetPolicy", status.Error(codes.InvalidArgument, "no"))
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "mine"})
	wants(t, err, codes.InvalidArgument)
	_, err = h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "another"})
	wants(t, err, codes.PermissionDenied)
	if p, _ := h.gate.Describe(); p.Digest != "digest of default" || p.Source != "image" {
		t.Errorf("in force: %v", p)
	}
}

func TestSetPolicyAfterCreateSandboxIsRefused(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.forget()
	_, err := h.host.SetPolicy(soon(t), &agent.SetPolicyRequest{Policy: "mine"})
	wants(t, err, codes.FailedPrecondition, "CreateSandbox")
	h.wantJournal()
}

func TestSecondCreateSandboxIsRefusedOnAnyConnection(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	other, _ := h.connect()
	_, err := other.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "other"})
	wants(t, err, codes.FailedPrecondition, "second CreateSandbox")
	h.wantJournal("agent CreateSandbox")
}

func TestSandboxThatTheAgentRefusedCanOnlyBeDestroyed(t *testing.T) {
	t.Parallel()
	h := start(t)
	h.agent.refuse("CreateSandbox", status.Error(codes.Internal, "no"))
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.Internal, "no")
	wants(t, h.create("c1", "app"), codes.FailedPrecondition, "only be removed")
	_, err = h.host.DestroySandbox(soon(t), &agent.DestroySandboxRequest{})
	must(t, err)
	h.wantJournal("agent CreateSandbox", "agent DestroySandbox", "destroy")
}

func TestPolicyJudgesTheSandbox(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config) {
		c.Default = fakePolicy{deny: map[string]error{"CreateSandbox": fmt.Errorf("no hooks: %w", errdefs.ErrPermissionDenied)}}
	})
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s", GuestHookPath: "/x"})
	wants(t, err, codes.PermissionDenied, "no hooks")
	h.wantJournal()
}

func TestSandboxIdIsChecked(t *testing.T) {
	t.Parallel()
	h := start(t)
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "../x"})
	wants(t, err, codes.InvalidArgument, "sandbox_id")
	h.wantJournal()
}

func TestNothingIsAcceptedAfterDestroySandbox(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	_, err := h.host.DestroySandbox(soon(t), &agent.DestroySandboxRequest{})
	must(t, err)
	if h.count("destroy") != 1 {
		t.Error("the volumes were not destroyed")
	}
	h.forget()
	other, _ := h.connect()
	w := h.wire()
	stream := uint32(1)
	for _, m := range methods() {
		if m.verdict == never {
			continue
		}
		req := m.in.New()
		for _, name := range []string{"container_id", "sandbox_id"} {
			if fd := req.Descriptor().Fields().ByTextName(name); fd != nil {
				req.Set(fd, req.NewField(fd))
				req.Set(fd, valueOf("c1"))
			}
		}
		p, err := proto.Marshal(req.Interface())
		must(t, err)
		w.request(stream, m.service, m.name, p)
		wants(t, w.response(stream), codes.FailedPrecondition, "ended")
		stream += 2
	}
	_, err = other.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s"})
	wants(t, err, codes.FailedPrecondition, "ended")
	h.wantJournal()
}

func TestVolumesAreDestroyedEvenIfTheAgentFails(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.agent.refuse("DestroySandbox", status.Error(codes.Internal, "busy"))
	_, err := h.host.DestroySandbox(soon(t), &agent.DestroySandboxRequest{})
	wants(t, err, codes.Internal, "busy")
	if h.count("destroy") != 1 {
		t.Error("the volumes were not destroyed")
	}
}

// A create that is sealing is cut short and undone before the sandbox goes.
func TestDestroySandboxUndoesACreateUnderWay(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	entered := make(chan struct{})
	h.volumes.acquire = func(ctx context.Context) error { close(entered); <-ctx.Done(); return ctx.Err() }
	created := make(chan error, 1)
	go func() { created <- h.create("c1", "app", "02/01") }()
	<-entered
	_, err := h.host.DestroySandbox(soon(t), &agent.DestroySandboxRequest{})
	must(t, err)
	if err := <-created; err == nil {
		t.Error("the container was created")
	}
	h.wantJournal("agent CreateSandbox", "acquire data", "release c1", "agent DestroySandbox", "destroy")
}

// The host's file system does not answer, and so neither does what looks into it.
func TestRequestThatHangsDoesNotKeepTheKeysAlive(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.gate.settle = 50 * time.Millisecond
	must(t, h.create("c1", "app", "02/01"))
	entered, release := make(chan struct{}), make(chan struct{})
	h.ns.hang(func() { close(entered); <-release })
	started := make(chan error, 1)
	go func() { started <- h.begin("c1") }()
	<-entered
	_, err := h.host.DestroySandbox(soon(t), &agent.DestroySandboxRequest{})
	must(t, err)
	if h.count("destroy") != 1 {
		t.Error("the volumes were not destroyed")
	}
	close(release)
	if err := <-started; err == nil {
		t.Error("the container was started after the end")
	}
	if h.count("agent StartContainer") != 0 {
		t.Error("StartContainer reached the agent after the end")
	}
}

// The answers fill the connection up, and the host lets it be.
func TestHostThatReadsNoAnswersHoldsNothingUp(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	w := h.wire()
	p, err := proto.Marshal(&agent.RemoveContainerRequest{ContainerId: "never-was"})
	must(t, err)
	request, err := proto.Marshal(&ttrpc.Request{Service: agentService, Method: "RemoveContainer", Payload: p})
	must(t, err)
	go func() { // until the connection is closed
		for stream := uint32(1); frame.Write(w, frame.Frame{Stream: stream, Type: frame.Request, Payload: request}) == nil; stream += 2 {
		}
	}()
	time.Sleep(200 * time.Millisecond)
	_, err = h.host.DestroySandbox(soon(t), &agent.DestroySandboxRequest{})
	must(t, err)
	w.Close()
}

func TestJudgedRequestsAreBoundedAcrossConnections(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	entered, release := make(chan struct{}), make(chan struct{})
	h.agent.on("CreateContainer", func(context.Context, proto.Message) (proto.Message, error) {
		close(entered)
		<-release
		return nil, nil
	})
	created := make(chan error, 1)
	go func() { created <- h.create("c1", "app") }()
	<-entered
	p, err := proto.Marshal(&agent.StartContainerRequest{ContainerId: "c1"})
	must(t, err)
	for _, n := range []int{maxJudged / 2, maxJudged/2 - 1} { // and the create
		w := h.wire()
		for i := range n {
			w.request(uint32(2*i+1), agentService, "StartContainer", p)
		}
		w.request(uint32(2*n+1), healthService, "Check", nil)
		must(t, w.response(uint32(2*n+1)))
		w.Close()
	}
	wants(t, h.begin("c1"), codes.ResourceExhausted)
	close(release)
	must(t, <-created)
}

func TestUpdateEphemeralMountsIsThePolicys(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config) {
		c.Default = fakePolicy{deny: map[string]error{"UpdateEphemeralMounts": fmt.Errorf("no: %w", errdefs.ErrPermissionDenied)}}
	})
	_, err := h.host.UpdateEphemeralMounts(soon(t), &agent.UpdateEphemeralMountsRequest{})
	wants(t, err, codes.FailedPrecondition, "CreateSandbox comes first")
	h.sandbox()
	h.forget()
	_, err = h.host.UpdateEphemeralMounts(soon(t), &agent.UpdateEphemeralMountsRequest{})
	wants(t, err, codes.PermissionDenied)
	h.wantJournal()
}

func TestVolumeStatsAreAnsweredForOurPathsAlone(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	h.forget()
	resp, err := h.host.GetVolumeStats(soon(t), &agent.VolumeStatsRequest{VolumeGuestPath: "/run/kata-containers/sandbox/storage/0"})
	must(t, err)
	if len(resp.Usage) != 2 || resp.Usage[0].Total != 10 || resp.Usage[0].Unit != agent.VolumeUsage_BYTES || resp.Usage[1].Available != 2 {
		t.Errorf("got %v", resp)
	}
	_, err = h.host.GetVolumeStats(soon(t), &agent.VolumeStatsRequest{VolumeGuestPath: "/etc"})
	wants(t, err, codes.PermissionDenied, "/etc")
	h.wantJournal()
}

// Containers share a volume, and Kata knows it by one mount point: what the last of them that came says is no more than the others' word.
func TestVolumeStatsOfASharedVolumeOutliveAContainer(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config) { c.Namespaces.(*fakeNamespaces).blind = map[string]bool{"c3": true} }).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	stats := func() error {
		_, err := h.host.GetVolumeStats(soon(t), &agent.VolumeStatsRequest{VolumeGuestPath: "/run/kata-containers/sandbox/storage/0"})
		return err
	}
	must(t, h.create("c2", "beside", "02/01"))
	must(t, h.remove("c2"))
	must(t, stats())
	must(t, h.create("c3", "beside", "02/01")) // all its processes have ended
	must(t, stats())
	must(t, h.remove("c1"))
	wants(t, stats(), codes.NotFound, "data")
}

func copyTo(path string, mode uint32) *agent.CopyFileRequest {
	req := &agent.CopyFileRequest{Path: path, FileMode: mode | 0o644}
	if mode == unix.S_IFLNK {
		req.Data = []byte("..data/key")
	}
	return req
}

// A link that leads elsewhere would redirect what the agent or a container opens later.
func TestCopyFileMakesNoLinkThatLeavesItsFolderAndNoSpecialFile(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.forget()
	for _, target := range []string{"", "..", "../x", "/etc/passwd", "a/../../x", "a//b", "./a"} {
		req := copyTo(filepath.Join(h.run, shareDir, "link"), unix.S_IFLNK)
		req.Data = []byte(target)
		_, err := h.host.CopyFile(soon(t), req)
		wants(t, err, codes.PermissionDenied, "the link leads out of its folder")
	}
	for _, mode := range []uint32{0, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK} {
		_, err := h.host.CopyFile(soon(t), copyTo(filepath.Join(h.run, shareDir, "x"), mode))
		wants(t, err, codes.PermissionDenied, "no file, folder or link")
	}
	h.wantJournal()
}

func TestCopyFile(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		path string // below the share, or absolute
		mode uint32
		ok   bool
	}{
		"new file":                     {"new", unix.S_IFREG, true},
		"new file in new folder":       {"a/b/c", unix.S_IFREG, true},
		"over a file":                  {"file", unix.S_IFREG, true},
		"folder there":                 {"dir", unix.S_IFDIR, true},
		"new link":                     {"dir/link2", unix.S_IFLNK, true},
		"link over link":               {"dir/link", unix.S_IFLNK, true},
		"through a link":               {"out/x", unix.S_IFREG, false},
		"through a link to the share":  {"in/x", unix.S_IFREG, false},
		"onto a link":                  {"dir/link", unix.S_IFREG, false},
		"folder onto a link":           {"out", unix.S_IFDIR, false},
		"temporary name is a link":     {"trap.txt", unix.S_IFREG, false},
		"temporary name, no extension": {"trap", unix.S_IFREG, false},
		"temporary name of a dot file": {".trap", unix.S_IFREG, false},
		"file over folder":             {"dir", unix.S_IFREG, false},
		"below a file":                 {"file/x", unix.S_IFREG, false},
		"outside":                      {"/etc/passwd", unix.S_IFREG, false},
		"the share itself":             {".", unix.S_IFDIR, false},
		"dots":                         {"dir/../../../x", unix.S_IFREG, false},
		"double slash":                 {"dir//x", unix.S_IFREG, false},
		"nul":                          {"dir/x\x00y", unix.S_IFREG, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t).sandbox()
			share := filepath.Join(h.run, shareDir)
			must(t, os.MkdirAll(filepath.Join(share, "dir"), 0o755))
			must(t, os.WriteFile(filepath.Join(share, "file"), nil, 0o644))
			for link, target := range map[string]string{"dir/link": "x", "out": "/etc", "in": "dir", "trap.tmp": "/etc/passwd", ".trap.tmp": "/etc/passwd"} {
				must(t, os.Symlink(target, filepath.Join(share, link)))
			}
			h.forget()
			path := c.path
			if !strings.HasPrefix(path, "/") {
				path = share + "/" + path
			}
			_, err := h.host.CopyFile(soon(t), copyTo(path, c.mode))
			if c.ok {
				must(t, err)
				h.wantJournal("agent CopyFile")
				return
			}
			wants(t, err, codes.PermissionDenied)
			h.wantJournal()
		})
	}
}

// What runs there could swap a link in after any check.
func TestCopyFileIntoTheFolderOfALiveContainerIsRefused(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	into := func(name string) error {
		_, err := h.host.CopyFile(soon(t), copyTo(filepath.Join(h.run, shareDir, name), unix.S_IFREG))
		return err
	}
	must(t, into("c1/rootfs/bin/sh")) // before it is created, as Kata does
	must(t, h.create("c1", "other"))
	for _, name := range []string{"c1/rootfs/x", "passthrough/c1/rootfs/x", "c1/x", "c1"} {
		wants(t, into(name), codes.PermissionDenied, "container c1 lives there")
	}
	must(t, into("c1-1f2e-resolv.conf"))
	must(t, h.remove("c1"))
	must(t, into("c1/rootfs/x"))
}

func TestCopyFileBeforeThereIsAShareDirectory(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	_, err := h.host.CopyFile(soon(t), copyTo(filepath.Join(h.run, shareDir, "a"), unix.S_IFREG))
	must(t, err)
}

func TestCopyFileOffsets(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	for _, c := range []struct{ offset, size int64 }{{-1, 0}, {0, -1}, {2, 1}} {
		req := copyTo(filepath.Join(h.run, shareDir, "a"), unix.S_IFREG)
		req.Offset, req.FileSize = c.offset, c.size
		_, err := h.host.CopyFile(soon(t), req)
		wants(t, err, codes.InvalidArgument, "offset")
	}
}

// The host serves the share and could swap a link in after any check.
func TestCopyFileIsRefusedWhereTheHostServesTheShare(t *testing.T) {
	t.Parallel()
	h := start(t)
	_, err := h.host.CreateSandbox(soon(t), &agent.CreateSandboxRequest{SandboxId: "s", Storages: []*agent.Storage{
		{Driver: "9p", Source: "kataShared", Fstype: "9p", MountPoint: "/run/kata-containers/shared/containers/"},
	}})
	must(t, err)
	h.forget()
	_, err = h.host.CopyFile(soon(t), copyTo(filepath.Join(h.run, shareDir, "a"), unix.S_IFREG))
	wants(t, err, codes.PermissionDenied, "shared file system")
	h.wantJournal()
}

func TestDeadlinesOfTheHostBoundJudgedRequestsToo(t *testing.T) {
	t.Parallel()
	h := start(t)
	h.agent.on("CreateSandbox", func(ctx context.Context, _ proto.Message) (proto.Message, error) { <-ctx.Done(); return nil, ctx.Err() })
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	_, err := h.host.CreateSandbox(ctx, &agent.CreateSandboxRequest{SandboxId: "s"})
	if err == nil {
		t.Error("created")
	}
	wants(t, h.create("c", "app"), codes.FailedPrecondition)
}
