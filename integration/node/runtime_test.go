//go:build node

package node

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// playedPolicy is that of a pod in which the host takes the runtime's place. One volume is open and its container runs; another container
// may have it too; two more volumes are never lent until the end.
const playedPolicy = `package agent_policy

sealed_pod := {
	"version": 1,
	"containers": {
		"my-container": {"args": ["sleep", "infinity"], "exec": [["sh", "..."], ["cat", "..."], ["dd", "..."]], "rootfs": "host"},
		"second": {"args": ["sleep", "infinity"], "rootfs": "host"},
		"third": {"args": ["sleep", "infinity"], "exec": [["cat", "..."], ["sh", "..."]], "rootfs": "host"},
	},
	"volumes": {
		"encrypted": {"mode": "ephemeral", "size": {"max": 1073741824}, "mounts": [
			{"container": "my-container", "path": "/mnt/encrypted"},
			{"container": "second", "path": "/mnt/encrypted"},
		]},
		"other": {"mode": "ephemeral", "size": {"max": 1073741824}, "mounts": [{"container": "third", "path": "/mnt/other"}]},
		"more": {"mode": "ephemeral", "size": {"max": 1073741824}, "mounts": [{"container": "third", "path": "/mnt/more", "read_only": true}]},
	},
}
`

// player is a host that takes the runtime's place in a pod: it sends the gate what it likes, by the vsock port that Kata uses, and does
// what it likes to the folder that the guest has as its share.
type player struct {
	*scene
	sandbox   string
	container string // my-container, which Kata has started
	share     string
	agent     kata.AgentServiceService
	recorded  string // a CreateContainer of Kata's, as JSON
	requests  *int
}

const secret = "what nobody else may read"

// TestHostThatTakesTheRuntimesPlace plays everything in one pod, which then must be as if nothing had been: its volume holds what it held, and Kata
// starts the container that was asked for in so many wrong ways.
func TestHostThatTakesTheRuntimesPlace(t *testing.T) {
	s := newScene(t)
	_, device := s.disk(64 * mib)
	_, other := s.disk(16 * mib)
	_, more := s.disk(16 * mib)
	pod := Pod{Name: "played", Policy: playedPolicy}
	id := s.pod(pod)
	running := s.start(id, pod, Container{
		Name: "my-container", Args: []string{"sleep", "infinity"}, Mounts: []Mount{{HostPath: s.directVolume(device), ContainerPath: "/mnt/encrypted"}},
	})
	s.exec(running, "sh", "-c", "echo "+secret+" > /mnt/encrypted/f && sync")
	recorded, err := os.ReadFile("../../policy/testdata/recorded/create-container.json")
	if err != nil {
		t.Fatal(err)
	}
	p := &player{
		scene: s, sandbox: id, container: running, share: s.share(id),
		agent: s.dialGate(id), recorded: string(recorded), requests: new(int),
	}

	before := p.sealed()
	p.Run("mutated requests", p.mutatedRequests)
	p.Run("damaged frames", p.damagedFrames)
	p.Run("rules that only a runtime meets", p.rulesForRuntimes)
	p.Run("other requests", p.otherRequests)
	p.Run("links in the share", p.linksInTheShare)
	p.Run("containers that come again", p.recreatedContainers)
	p.Run("device nodes in the share", p.nodesInTheShare)
	p.Run("renamed folders", p.renamedFolders)

	if diff := cmp.Diff(before, p.sealed()); diff != "" {
		t.Errorf("what is sealed must be what it was: %s", diff)
	}
	if got := s.exec(running, "sh", "-c", "cd /mnt/encrypted && find . -type f -size +0 && cat f"); got != "./f\n"+secret {
		t.Errorf("the volume must hold what it held, and mount points at most besides, got %q", got)
	}
	third := s.start(id, pod, Container{Name: "third", Args: []string{"sleep", "infinity"}, Mounts: []Mount{
		{HostPath: s.directVolume(other), ContainerPath: "/mnt/other"}, {HostPath: s.directVolume(more), ContainerPath: "/mnt/more", Readonly: true},
	}})
	if got := s.exec(third, "sh", "-c", "echo fine > /mnt/other/f && cat /mnt/other/f"); got != "fine" {
		t.Errorf("the container that the policy declares must work, got %q", got)
	}
}

// share is the folder that a sandbox's guest has as its share, in the mount namespace of its QEMU, which has the containers' root file systems.
func (s *scene) share(sandbox string) string {
	s.Helper()
	all, err := Processes()
	if err != nil {
		s.Fatal(err)
	}
	for _, p := range all {
		folder := filepath.Join("/proc", strconv.Itoa(p.PID), "root/run/kata-containers/shared/sandboxes", sandbox, "mounts")
		if _, err := os.Stat(folder); err == nil && p.Program == "qemu-system-x86_64" {
			return folder
		}
	}
	s.Fatal("there is no QEMU that has the sandbox's share")
	return ""
}

// in is the player for a subtest.
func (p *player) in(t *testing.T) *player {
	q := *p
	q.scene = &scene{T: t, ctx: p.ctx, node: p.node}
	return &q
}

// status is what the guest's control service says.
func (p *player) status() *sealvolv1.StatusResponse {
	p.Helper()
	text, err := p.node.Inspect(p.ctx, p.sandbox, "-o", "json")
	if err != nil {
		p.Fatalf("the guest must live and answer: %v", err)
	}
	var report struct {
		Status json.RawMessage `json:"status"`
	}
	if err := json.Unmarshal([]byte(text), &report); err != nil {
		p.Fatal(err)
	}
	status := &sealvolv1.StatusResponse{}
	if err := protojson.Unmarshal(report.Status, status); err != nil {
		p.Fatal(err)
	}
	return status
}

// sealed says in lines what is open, on which device and by which mappings, and what lives.
func (p *player) sealed() (lines []string) {
	p.Helper()
	status := p.status()
	for _, v := range status.Volumes {
		line := strings.Join([]string{"volume", v.Name, v.State, v.PciPath, v.Device, strconv.FormatInt(v.Created, 10), strconv.FormatInt(v.Opened, 10)}, " ")
		for _, m := range v.Mappings {
			line += " " + m.Name + " " + m.Number
		}
		lines = append(lines, line)
	}
	for _, c := range status.Policy.Containers {
		lines = append(lines, "container "+c.Name+" "+c.Id+" "+c.State)
	}
	return append(lines, status.Warnings...)
}

// lent is a disk at a PCI path that stands for the volume at a path of a container.
type lent struct{ path, pci string }

// The disks of third, which the host has not plugged in.
var absent = [...]lent{{"/mnt/other", "02/02"}, {"/mnt/more", "02/03"}}

// request is what Kata sends for a container of the policy, with an id that was never used.
func (p *player) request(name string, disks ...lent) *kata.CreateContainerRequest {
	p.Helper()
	*p.requests++
	text := strings.NewReplacer(
		strings.Repeat("1", 64), p.sandbox, strings.Repeat("2", 64), fmt.Sprintf("%064x", *p.requests),
		`"my-container"`, strconv.Quote(name), "docker.io/library/busybox:latest", BusyboxImage,
	).Replace(p.recorded)
	req := &kata.CreateContainerRequest{}
	if err := protojson.Unmarshal([]byte(text), req); err != nil {
		p.Fatal(err)
	}
	at := slices.IndexFunc(req.OCI.Mounts, func(m *kata.Mount) bool { return m.Destination == "/mnt/encrypted" })
	storage, mount := req.Storages[0], req.OCI.Mounts[at]
	req.Storages, req.OCI.Mounts = nil, slices.Delete(req.OCI.Mounts, at, at+1)
	for _, d := range disks {
		s, m := proto.CloneOf(storage), proto.CloneOf(mount)
		s.Source, s.MountPoint = d.pci, storagePath(d.pci)
		m.Source, m.Destination = s.MountPoint, d.path
		req.Storages, req.OCI.Mounts = append(req.Storages, s), slices.Insert(req.OCI.Mounts, at, m)
	}
	return req
}

// storagePath is where Kata wants the disk at a PCI path mounted.
func storagePath(pci string) string {
	return "/run/kata-containers/sandbox/storage/" + base64.URLEncoding.EncodeToString([]byte(pci))
}

// refusal is what the gate says to a request that it must refuse. How long it may think is bounded, so on a machine that has other work it is asked
// again; what it cannot judge at all it still cannot then.
func (p *player) refusal(req *kata.CreateContainerRequest) (err error) {
	for range 4 {
		if err = p.create(req); status.Code(err) != codes.Internal && status.Code(err) != codes.DeadlineExceeded {
			break
		}
	}
	return err
}

// create asks for a container as Kata does.
func (p *player) create(req *kata.CreateContainerRequest) error {
	ctx, cancel := context.WithTimeout(p.ctx, answerLimit)
	defer cancel()
	_, err := p.agent.CreateContainer(ctx, req)
	return err
}

// guestShare is where the guest has the folder player.share.
const guestShare = "/run/kata-containers/shared/containers/"

// put makes something in the share, in place of what has its name.
func (p *player) put(name string, make func(path string) error) {
	p.Helper()
	path := filepath.Join(p.share, name)
	p.must(os.RemoveAll(path))
	p.must(make(path))
	p.Cleanup(func() { p.must(os.RemoveAll(path)) })
}

func (p *player) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func linkTo(target string) func(path string) error {
	return func(path string) error { return os.Symlink(target, path) }
}
