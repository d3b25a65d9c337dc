package gate

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sealvol/sealvol/guest/internal/device"
	"github.com/sealvol/sealvol/guest/internal/mountns"
)

func valueOf(s string) protoreflect.Value { return protoreflect.ValueOfString(s) }

func TestLifeOfAContainerWithAVolume(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	if !h.volumes.holds("c1") || h.volumes.attached() {
		t.Error("after its creation the container holds the volume, and nobody sees it")
	}
	must(t, h.begin("c1"))
	if d := cmp.Diff([]mountns.Mount{
		{Path: "/data", Major: 253, Minor: 7, Options: []string{"nosuid", "nodev", "rw"}},
		{Path: "/more", Major: 253, Minor: 7, Options: []string{"nosuid", "nodev", "ro"}},
	}, slices.SortedFunc(slices.Values(h.ns.want), func(a, b mountns.Mount) int {
		if a.Path < b.Path {
			return -1
		}
		return 1
	})); d != "" {
		t.Error(d)
	}
	_, err := h.host.ExecProcess(soon(t), &agent.ExecProcessRequest{ContainerId: "c1", ExecId: "e1"})
	must(t, err)
	must(t, h.remove("c1"))
	h.wantJournal("agent CreateSandbox", "acquire data", "attach data", "agent CreateContainer", "detach data",
		"agent StartContainer", "agent ExecProcess", "agent RemoveContainer", "release c1")
	h.forget()
	must(t, h.remove("c1")) // the host asks again
	h.wantJournal()
}

func TestTheAgentGetsOurMountAndNoStorage(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01", "02/02"))
	got := h.agent.last("CreateContainer").(*agent.CreateContainerRequest)
	if len(got.Storages) != 0 {
		t.Errorf("storages: %v", got.Storages)
	}
	for i, want := range []*agent.Mount{
		{Destination: "/data", Type: "bind", Source: "/run/sealvol/volumes/data", Options: []string{"rbind", "nosuid", "nodev", "rw"}},
		{Destination: "/more", Type: "bind", Source: "/run/sealvol/volumes/more", Options: []string{"rbind", "nosuid", "nodev", "ro"}},
	} {
		if !proto.Equal(got.OCI.Mounts[i], want) {
			t.Errorf("mount %v, want %v", got.OCI.Mounts[i], want)
		}
	}
}

func TestContainerIdIsNeverUsedTwice(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app"))
	wants(t, h.create("c1", "other"), codes.AlreadyExists, "c1")
	must(t, h.remove("c1"))
	wants(t, h.create("c1", "app"), codes.AlreadyExists, "c1")
	must(t, h.create("c2", "app"))
}

func TestContainerThatIsNamedForAFolderOfTheAgentIsRefused(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, os.MkdirAll(filepath.Join(h.run, "sandbox/shm"), 0o700))
	wants(t, h.create("sandbox", "app"), codes.InvalidArgument, "agent's own")
	if h.count("agent CreateContainer") != 0 {
		t.Error("it reached the agent")
	}
}

func TestOneNameIsOneLiveContainer(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app"))
	wants(t, h.create("c2", "app"), codes.PermissionDenied, "app", "c1")
	must(t, h.create("c3", "other"))
}

func TestCreateContainerNeedsASandbox(t *testing.T) {
	t.Parallel()
	h := start(t)
	wants(t, h.create("c1", "app"), codes.FailedPrecondition, "CreateSandbox comes first")
	h.wantJournal()
}

func TestExecIdOfTheFirstProcessIsTheContainers(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	req := request("c1", "app")
	req.ExecId = "c2"
	_, err := h.host.CreateContainer(soon(t), req)
	wants(t, err, codes.InvalidArgument)
	must(t, h.create("c1", "app"))
	must(t, h.begin("c1"))
	for _, id := range []string{"", "c1"} {
		_, err = h.host.ExecProcess(soon(t), &agent.ExecProcessRequest{ContainerId: "c1", ExecId: id})
		wants(t, err, codes.InvalidArgument, "exec_id")
	}
}

func TestContainerThatThePolicyDeniesReachesNobody(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config) {
		c.Default = fakePolicy{deny: map[string]error{
			"CreateContainer": fmt.Errorf("container x: not declared: %w", errdefs.ErrPermissionDenied),
		}}
	}).sandbox()
	h.forget()
	wants(t, h.create("c1", "app", "02/01"), codes.PermissionDenied, "not declared")
	h.wantJournal()
}

func TestExecThatThePolicyDeniesReachesNobody(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config) {
		c.Default = fakePolicy{deny: map[string]error{"ExecProcess": fmt.Errorf("sh is not listed: %w", errdefs.ErrPermissionDenied)}}
	}).sandbox()
	must(t, h.create("c1", "app"))
	must(t, h.begin("c1"))
	h.forget()
	_, err := h.host.ExecProcess(soon(t), &agent.ExecProcessRequest{ContainerId: "c1", ExecId: "e"})
	wants(t, err, codes.PermissionDenied, "sh is not listed")
	h.wantJournal()
}

func TestStorageThatIsNoDiskIsRefused(t *testing.T) {
	t.Parallel()
	for _, address := range [][2]string{{"blk", "/dev/vda"}, {"scsi", "02/01"}, {"mmioblk", "0:1"}, {"nvdimm", "/dev/pmem0"}, {"", ""}} {
		h := start(t).sandbox()
		h.forget()
		req := request("c1", "app", address[1])
		req.Storages[0].Driver = address[0]
		_, err := h.host.CreateContainer(soon(t), req)
		wants(t, err, codes.InvalidArgument, "volume data")
		h.wantJournal()
	}
}

func TestVolumesComeOnDisksOfEachDriver(t *testing.T) {
	t.Parallel()
	for driver, source := range map[string]string{"blk": "1c/00/01", "scsi": "0:1", "mmioblk": "/dev/vdb"} {
		h := start(t).sandbox()
		req := request("c1", "app", source)
		req.Storages[0].Driver = driver
		_, err := h.host.CreateContainer(soon(t), req)
		must(t, err)
		want, err := device.Parse(driver, source)
		must(t, err)
		if got := h.volumes.Disks()["data"]; got != want {
			t.Errorf("volume data is on %v, want %v", got, want)
		}
	}
}

// What happens when each step fails: nothing of the earlier ones is left.
func TestFailedCreateIsUndone(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fail func(h *harness)
		code codes.Code
		want []string // in any order up to the first "attach"
	}{
		"sealing": {
			func(h *harness) {
				h.volumes.failing("acquire more", fmt.Errorf("too small: %w", errdefs.ErrFailedPrecondition))
			},
			codes.FailedPrecondition, []string{"acquire data", "acquire more", "release c1"},
		},
		"first attach": {
			func(h *harness) { h.volumes.failing("attach data", errBroken) },
			codes.Internal, []string{"acquire data", "acquire more", "attach data", "release c1"},
		},
		"second attach": {
			func(h *harness) { h.volumes.failing("attach more", errBroken) },
			codes.Internal, []string{"acquire data", "acquire more", "attach data", "attach more", "detach data", "release c1"},
		},
		"agent refuses": {
			func(h *harness) { h.agent.refuse("CreateContainer", status.Error(codes.NotFound, "no rootfs")) },
			codes.NotFound, []string{"acquire data", "acquire more", "attach data", "attach more", "agent CreateContainer", "detach more", "detach data", "release c1"},
		},
		"agent refuses but left a process": {
			func(h *harness) {
				h.agent.refuse("CreateContainer", status.Error(codes.NotFound, "no rootfs"))
				h.ns.set(true, nil)
			},
			codes.NotFound, []string{"acquire data", "acquire more", "attach data", "attach more", "agent CreateContainer", "detach more", "detach data", "agent RemoveContainer", "release c1"},
		},
		"agent is cut short": {
			func(h *harness) { h.agent.refuse("CreateContainer", status.Error(codes.DeadlineExceeded, "late")) },
			codes.DeadlineExceeded, []string{"acquire data", "acquire more", "attach data", "attach more", "agent CreateContainer", "detach more", "detach data", "agent RemoveContainer", "release c1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t).sandbox()
			h.forget()
			c.fail(h)
			wants(t, h.create("c1", "app", "02/01", "02/02"), c.code)
			got := h.all()
			if len(got) >= 2 {
				slices.Sort(got[:2]) // both volumes are sealed at once
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
			if h.volumes.holds("c1") || h.volumes.attached() {
				t.Error("something is left")
			}
			// Name and volumes are free again, the id is not.
			h.volumes.fail = map[string]error{}
			h.agent.on("CreateContainer", nil)
			must(t, h.create("c2", "app", "02/01", "02/02"))
			wants(t, h.create("c1", "other"), codes.AlreadyExists)
		})
	}
}

func TestPassedDeadlineIsUndoneBeforeTheAnswer(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.forget()
	h.volumes.acquire = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Second)
	defer cancel()
	_, err := h.host.CreateContainer(ctx, request("c1", "app", "02/01"))
	// The answer comes within the host's own time, and everything is undone by then.
	wants(t, err, codes.DeadlineExceeded, "volume data")
	h.wantJournal("acquire data", "release c1")
}

func TestAgentThatIsLateLosesTheContainerWithinTheDeadline(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.forget()
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	h.agent.on("CreateContainer", func(context.Context, proto.Message) (proto.Message, error) { <-release; return nil, nil })
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Second)
	defer cancel()
	_, err := h.host.CreateContainer(ctx, request("c1", "app", "02/01"))
	wants(t, err, codes.DeadlineExceeded)
	h.wantJournal("acquire data", "attach data", "agent CreateContainer", "detach data", "agent RemoveContainer", "release c1")
}

func TestSandboxIsPoisonedWhenNobodyKnowsWhetherAContainerLives(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c0", "other"))
	h.agent.refuse("CreateContainer", status.Error(codes.Unavailable, "gone"))
	h.agent.refuse("RemoveContainer", status.Error(codes.Internal, "no such container"))
	wants(t, h.create("c1", "app", "02/01"), codes.Unavailable)
	if !h.volumes.holds("c1") {
		t.Error("a volume was released although its container may live")
	}
	wants(t, h.create("c2", "app2"), codes.FailedPrecondition, "only be removed", "c1")
	wants(t, h.begin("c0"), codes.FailedPrecondition, "only be removed")
	_, err := h.host.SignalProcess(soon(t), &agent.SignalProcessRequest{ContainerId: "c0", Signal: 9}) // or the pod never ends
	must(t, err)
	h.agent.on("RemoveContainer", nil)
	must(t, h.remove("c0"))
	must(t, h.remove("c1"))
	if h.volumes.holds("c1") {
		t.Error("the volume was not released after the container was")
	}
	_, err = h.host.DestroySandbox(soon(t), &agent.DestroySandboxRequest{})
	must(t, err)
}

func TestVolumeThatStaysAttachedPoisonsTheSandbox(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	h.volumes.failing("detach data", errBroken)
	h.forget()
	wants(t, h.create("c1", "app", "02/01"), codes.Internal)
	h.wantJournal("acquire data", "attach data", "agent CreateContainer", "detach data", "agent RemoveContainer", "release c1")
	wants(t, h.create("c2", "app"), codes.FailedPrecondition, "stayed attached")
}

func TestContainerWithWrongMountsIsRemovedBeforeItsStart(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	h.forget()
	h.ns.set(true, fmt.Errorf("nothing is mounted at /data: %w", errdefs.ErrPermissionDenied))
	wants(t, h.begin("c1"), codes.PermissionDenied, "app", "/data")
	h.wantJournal("agent RemoveContainer", "release c1")
	wants(t, h.begin("c1"), codes.FailedPrecondition, "removed")
	must(t, h.remove("c1")) // as Kata does next
	h.wantJournal("agent RemoveContainer", "release c1")
}

func TestWrongContainerThatCannotBeRemovedPoisonsTheSandbox(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	h.ns.set(true, fmt.Errorf("wrong: %w", errdefs.ErrPermissionDenied))
	h.agent.refuse("RemoveContainer", status.Error(codes.Internal, "busy"))
	wants(t, h.begin("c1"), codes.PermissionDenied)
	if !h.volumes.holds("c1") || h.count("agent StartContainer") != 0 {
		t.Error("released or started")
	}
	wants(t, h.create("c2", "x"), codes.FailedPrecondition)
}

func TestStatesOfAContainer(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	wants(t, h.begin("c1"), codes.NotFound)
	wants(t, h.remove("c1"), codes.NotFound)
	must(t, h.create("c1", "app"))
	exec := &agent.ExecProcessRequest{ContainerId: "c1", ExecId: "e"}
	_, err := h.host.ExecProcess(soon(t), exec)
	wants(t, err, codes.FailedPrecondition, "created")
	must(t, h.begin("c1"))
	wants(t, h.begin("c1"), codes.FailedPrecondition, "started")
	must(t, h.remove("c1"))
	_, err = h.host.ExecProcess(soon(t), exec)
	wants(t, err, codes.FailedPrecondition, "removed")
	_, err = h.host.UpdateContainer(soon(t), &agent.UpdateContainerRequest{ContainerId: "c1"})
	wants(t, err, codes.FailedPrecondition, "removed")
}

// The host must not be able to make the gate let go of a volume while its container lives.
func TestUnconfirmedRemoveKeepsTheVolumes(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	must(t, h.begin("c1"))
	for _, err := range []error{status.Error(codes.NotFound, "invalid container id"), status.Error(codes.DeadlineExceeded, "slow")} {
		h.agent.refuse("RemoveContainer", err)
		wants(t, h.remove("c1"), status.Code(err))
		if !h.volumes.holds("c1") {
			t.Fatal("released")
		}
	}
	h.agent.on("RemoveContainer", nil)
	must(t, h.remove("c1"))
	if h.volumes.holds("c1") {
		t.Error("not released")
	}
}

func TestRemoveIsNotLeftToTheHostsTimeout(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	entered, confirm := make(chan struct{}), make(chan struct{})
	h.agent.on("RemoveContainer", func(ctx context.Context, req proto.Message) (proto.Message, error) {
		if req.(*agent.RemoveContainerRequest).Timeout != 0 {
			t.Error("the host's timeout was passed on")
		}
		close(entered)
		<-confirm
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := h.host.RemoveContainer(ctx, &agent.RemoveContainerRequest{ContainerId: "c1", Timeout: 1}); err == nil {
		t.Error("removed")
	}
	<-entered
	if !h.volumes.holds("c1") {
		t.Error("released before the agent confirmed")
	}
	close(confirm)
	for start := time.Now(); h.volumes.holds("c1"); time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatal("not released although the agent confirmed")
		}
	}
}

func TestFailedCloseOfAVolumeIsTold(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app", "02/01"))
	h.volumes.failing("release c1", fmt.Errorf("volume data: flush failed: %w", errdefs.ErrDataLoss))
	wants(t, h.remove("c1"), codes.DataLoss, "volume data")
	must(t, h.create("c2", "app"))
}

// A dropped connection does not cut a create in half.
func TestHostThatDropsTheConnectionMidCreateFindsTheContainerWhole(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	entered, release := make(chan struct{}), make(chan struct{})
	h.agent.on("CreateContainer", func(ctx context.Context, _ proto.Message) (proto.Message, error) {
		close(entered)
		<-release
		return nil, ctx.Err()
	})
	host, client := h.connect()
	done := make(chan struct{})
	go func() {
		defer close(done)
		host.CreateContainer(soon(t), request("c1", "app", "02/01"))
	}()
	<-entered
	client.Close()
	<-done
	close(release)
	must(t, h.begin("c1")) // on another connection
	must(t, h.remove("c1"))
}

// Rule 7: while a volume is attached no other request touches a path or a container, and
// reading ones go on.
func TestNothingElseTouchesPathsWhileAVolumeIsAttached(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c0", "other"))
	must(t, h.begin("c0"))
	entered, release := make(chan struct{}), make(chan struct{})
	h.agent.on("CreateContainer", func(_ context.Context, req proto.Message) (proto.Message, error) {
		if req.(*agent.CreateContainerRequest).ContainerId == "c1" {
			close(entered)
			<-release
		}
		return nil, nil
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := h.create("c1", "app", "02/01"); err != nil {
			t.Error(err)
		}
	})
	<-entered
	h.forget()
	for _, f := range []func() error{
		func() error { return h.create("c2", "third") },
		func() error { return h.remove("c0") },
		func() error {
			_, err := h.host.ExecProcess(soon(t), &agent.ExecProcessRequest{ContainerId: "c0", ExecId: "e"})
			return ignoreRace(err)
		},
		func() error {
			_, err := h.host.UpdateEphemeralMounts(soon(t), &agent.UpdateEphemeralMountsRequest{})
			return err
		},
		func() error {
			_, err := h.host.RemoveStaleVirtiofsShareMounts(soon(t), &agent.RemoveStaleVirtiofsShareMountsRequest{})
			return err
		},
	} {
		wg.Go(func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		})
	}
	_, err := h.host.GetMetrics(soon(t), &agent.GetMetricsRequest{})
	must(t, err)
	time.Sleep(100 * time.Millisecond)
	h.wantJournal("agent GetMetrics")
	close(release)
	wg.Wait()
}

// ignoreRace forgives that the container was removed first.
func ignoreRace(err error) error {
	if status.Code(err) == codes.FailedPrecondition {
		return nil
	}
	return err
}

// Sealing is slow and outside of the lock.
func TestSealingHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	entered, release := make(chan struct{}), make(chan struct{})
	h.volumes.acquire = func(context.Context) error { close(entered); <-release; return nil }
	done := make(chan error, 1)
	go func() { done <- h.create("c1", "app", "02/01") }()
	<-entered
	must(t, h.create("c2", "other"))
	must(t, h.begin("c2"))
	must(t, h.remove("c2"))
	close(release)
	must(t, <-done)
}

func TestTwoVolumesAreSealedAtOnce(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	var both sync.WaitGroup
	both.Add(2)
	h.volumes.acquire = func(context.Context) error { both.Done(); both.Wait(); return nil }
	must(t, h.create("c1", "app", "02/01", "02/02"))
}

func TestUpdateContainerCarriesNoDeviceRules(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	must(t, h.create("c1", "app"))
	_, err := h.host.UpdateContainer(soon(t), &agent.UpdateContainerRequest{ContainerId: "c1", Resources: &agent.LinuxResources{
		Devices: []*agent.LinuxDeviceCgroup{{Allow: true, Type: "b", Access: "rwm"}}, Memory: &agent.LinuxMemory{Limit: 7},
	}})
	must(t, err)
	got := h.agent.last("UpdateContainer").(*agent.UpdateContainerRequest)
	if len(got.Resources.Devices) != 0 || got.Resources.Memory.Limit != 7 {
		t.Errorf("the agent got %v", got)
	}
}

func TestManyContainersAtOnce(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			id := fmt.Sprintf("c%d", i)
			for _, err := range []error{h.create(id, id, "02/01"), h.begin(id), h.remove(id)} {
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if h.volumes.attached() {
		t.Error("something is attached")
	}
}

// Kata names the place by the disk's slot: /run/kata-containers/sandbox/storage/ and the path in base64.
func TestASlotThatAnotherVolumeHadMayBeUsedAgain(t *testing.T) {
	t.Parallel()
	h := start(t).sandbox()
	const place = "/run/kata-containers/sandbox/storage/0"
	volume := func() string {
		h.gate.mu.Lock()
		defer h.gate.mu.Unlock()
		return h.gate.stateLocked().Paths[place]
	}
	must(t, h.create("c1", "app", "02/01"))
	if got := volume(); got != "data" {
		t.Errorf("while its container lives, %s is of %q, not data", place, got)
	}
	must(t, h.remove("c1"))
	if got := volume(); got != "" {
		t.Errorf("without a container, %s is still of %q", place, got)
	}
}
