//go:build node

package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/sealvol/sealvol/integration/qmp"
)

// upstreamPolicy is that of a pod with one emptyDir, which two containers mount.
const upstreamPolicy = `package agent_policy

sealed_pod := {
	"version": 1,
	"containers": {
		"writer": {"args": ["sh", "-c", "` + writer + `"], "rootfs": "host"},
		"reader": {"args": ["sh", "-c", "` + reader + `"], "rootfs": "host"},
	},
	"volumes": {"scratch": {
		"mode": "ephemeral", "size": {"min": 33554432, "max": 33554432}, "fs_group": {"gid": 2000, "change_policy": "Always"},
		"mounts": [{"container": "writer", "path": "/mnt/encrypted"}, {"container": "reader", "path": "/mnt/encrypted", "read_only": true}],
	}},
}
`

const (
	written = "neither plugin nor shim had a part in it"
	writer  = "echo " + written + " > /mnt/encrypted/f && sync && grep -w /mnt/encrypted /proc/self/mounts; sleep infinity"
	reader  = "cat /mnt/encrypted/f; touch /mnt/encrypted/g || echo refused; sleep infinity"
)

// TestUpstreamsOwnRequestIsSealed does what Kata 4.1 does for an emptyDir with emptydir_mode = "block-encrypted" and virtio-blk (handleBlkOCIMounts and
// handleDeviceBlockVolume in virtcontainers/kata_agent.go), which the Kata of this node cannot do: it makes the file, plugs it in and asks
// for it to be formatted and encrypted. Gate, agent, QEMU and guest are those of any pod; plugin and shim know nothing of the volume.
func TestUpstreamsOwnRequestIsSealed(t *testing.T) {
	s := newScene(t)
	file, _ := s.disk(32 * mib)
	id := s.pod(Pod{Name: "upstream", Policy: upstreamPolicy})
	recorded, err := os.ReadFile("../../policy/testdata/recorded/create-container.json")
	if err != nil {
		t.Fatal(err)
	}
	p := &player{scene: s, sandbox: id, share: s.share(id), agent: s.dialGate(id), recorded: string(recorded), requests: new(int)}
	const at = "02/1e"
	p.plug(file, at)

	create := func(name, command string) *kata.CreateContainerRequest {
		req := p.request(name, lent{"/mnt/encrypted", at})
		req.OCI.Process.Args = []string{"sh", "-c", command}
		req.Storages[0] = &kata.Storage{
			Driver: "blk", Source: at, DriverOptions: []string{"encryption_key=ephemeral", "create_filesystem"},
			Fstype: "ext4", MountPoint: storagePath(at), FsGroup: &kata.FSGroup{GroupId: 2000},
		}
		req.Storages[0].ProtoReflect().SetUnknown([]byte("\x40\x01")) // shared: true, a field that came after this node's Kata
		p.lay(req)
		return req
	}
	first := create("writer", writer)
	if err := p.run(first); err != nil {
		t.Fatalf("upstream's request must be sealed and run: %v", err)
	}
	if got := p.line(first.ContainerId); !strings.HasPrefix(got, "/dev/mapper/encrypted_disk_") || !strings.Contains(got, " ext4 rw,nosuid,nodev") {
		t.Errorf("the container must have the sealed mapping with the policy's options, it has %q", got)
	}
	second := create("reader", reader)
	if err := p.run(second); err != nil {
		t.Fatalf("the second container of the emptyDir must run: %v", err)
	}
	for _, want := range []string{written, "refused"} {
		if got := p.line(second.ContainerId); got != want {
			t.Errorf("the second container must read what the first one wrote, and write nothing: want %q, got %q", want, got)
		}
	}
	s.wantSparseCiphertext(file, 32*mib, written)
	for _, v := range p.status().Volumes {
		if v.Name != "scratch" || v.PciPath != at || v.State != "open" {
			t.Errorf("one volume must be open, at upstream's disk, and the service says %v", v)
		}
	}
}

// plug puts a file into the sandbox as a disk, behind Kata's back, and takes it out when the containers are gone.
func (p *player) plug(file, at string) {
	p.Helper()
	m, err := qmp.Dial(filepath.Join("/run/vc/vm", p.sandbox, "extra-monitor.sock"))
	p.must(err)
	p.Cleanup(func() { p.must(m.Close()) })
	p.must(m.Execute("blockdev-add", map[string]any{"driver": "raw", "node-name": "upstream", "file": map[string]any{"driver": "file", "filename": file}}))
	_, slot, _ := strings.Cut(at, "/")
	p.must(m.Execute("device_add", map[string]any{"driver": "virtio-blk-pci", "id": "upstream", "drive": "upstream", "bus": "pci-bridge-0", "addr": "0x" + slot}))
	p.Cleanup(func() { p.must(m.Delete("upstream")) })
}

// line reads the next line that a container prints.
func (p *player) line(container string) string {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, answerLimit)
	defer cancel()
	var line []byte
	for {
		resp, err := p.agent.ReadStdout(ctx, &kata.ReadStreamRequest{ContainerId: container, ExecId: container, Len: 1})
		if err != nil {
			p.Fatalf("after %q: %v", line, err)
		}
		if string(resp.Data) == "\n" {
			return string(line)
		}
		line = append(line, resp.Data...)
	}
}
