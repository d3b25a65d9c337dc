//go:build node

package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// lay puts into the share what a request names there: a root file system with busybox in it, and the files that CRI binds.
func (p *player) lay(req *kata.CreateContainerRequest) (root string) {
	p.Helper()
	root = filepath.Join(p.share, req.ContainerId, "rootfs")
	p.plant(root)
	p.Cleanup(func() { p.must(os.RemoveAll(filepath.Dir(root))) })
	p.must(os.Remove(filepath.Join(root, "mnt/encrypted/f")))
	for _, m := range req.OCI.Mounts {
		name, found := strings.CutPrefix(m.Source, guestShare)
		if !found {
			continue
		}
		p.must(os.WriteFile(filepath.Join(root, m.Destination), nil, 0o644))
		p.put(name, func(path string) error { return os.WriteFile(path, []byte(mark+"\n"), 0o644) })
	}
	return root
}

// run creates and starts a container as Kata does, and removes it after the test.
func (p *player) run(req *kata.CreateContainerRequest) error {
	p.Helper()
	id := req.ContainerId
	p.Cleanup(func() { p.must(p.remove(id)) })
	if err := p.create(req); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	ctx, cancel := context.WithTimeout(p.ctx, answerLimit)
	defer cancel()
	_, err := p.agent.StartContainer(ctx, &kata.StartContainerRequest{ContainerId: id})
	return err
}

// remove removes a container; one that never was is no error.
func (p *player) remove(id string) error {
	ctx, cancel := context.WithTimeout(p.ctx, answerLimit)
	defer cancel()
	_, err := p.agent.RemoveContainer(ctx, &kata.RemoveContainerRequest{ContainerId: id})
	if status.Code(err) == codes.NotFound {
		return nil
	}
	return err
}

// A folder that CRI binds, from the share, and a file.
const (
	boundFolder = "/var/run/secrets/kubernetes.io/serviceaccount"
	boundFile   = "/etc/hosts"
)

// The agent follows links where it looks for what a request names, and the host serves the share in which they lie. None leads to a
// container that runs: not to the volume, which is attached while the agent looks, not to the guest's files, and not to a place where the
// volume is not seen.
func (p *player) linksInTheShare(t *testing.T) {
	p = p.in(t)
	sealed := p.status().Volumes[0]
	mapping := "/dev/mapper/" + sealed.Mappings[0].Name
	p.Run("none", func(t *testing.T) {
		p := p.in(t)
		req := p.request("second", lent{"/mnt/encrypted", sealed.PciPath})
		p.lay(req)
		if err := p.run(req); err != nil {
			t.Fatalf("without a link the container must run, or the others show nothing: %v", err)
		}
	})
	const leadsOut = "leads out of the container"
	tests := map[string]struct{ root, folder, file, mountPoint, reason string }{
		"the root file system is the volume":         {root: "/run/sealvol/volumes/encrypted"},
		"a folder is the volume":                     {folder: "/run/sealvol/volumes/encrypted", reason: leadsOut},
		"a folder is where volumes are":              {folder: "/run/sealvol/volumes", reason: leadsOut},
		"a folder is the service's root":             {folder: "/proc/1/root"},
		"a folder has the guest's devices":           {folder: "/dev", reason: leadsOut},
		"a file is the agent's socket":               {file: "/run/sealvol/agent/agent.sock", reason: leadsOut},
		"a file is the agent's configuration":        {file: "/etc/sealvol/agent.toml", reason: leadsOut},
		"a file is the volume's mapping":             {file: mapping, reason: leadsOut},
		"a file is a setting of the kernel":          {file: "/proc/sys/kernel/core_pattern", reason: leadsOut},
		"the volume's mount point is somewhere else": {mountPoint: "/etc", reason: "nothing is mounted at /mnt/encrypted"},
	}
	for name, test := range tests {
		p.Run(name, func(t *testing.T) {
			p := p.in(t)
			req := p.request("second", lent{"/mnt/encrypted", sealed.PciPath})
			root := p.lay(req)
			source := req.ContainerId + "-folder"
			if test.folder != "" {
				req.OCI.Mounts = append(req.OCI.Mounts, &kata.Mount{Destination: boundFolder, Source: guestShare + source, Type: "bind", Options: []string{"rbind", "rprivate", "ro"}})
				p.put(source, linkTo(test.folder))
			}
			for _, m := range req.OCI.Mounts {
				if m.Destination == boundFile && test.file != "" {
					p.put(strings.TrimPrefix(m.Source, guestShare), linkTo(test.file))
				}
			}
			if test.root != "" {
				p.put(req.ContainerId+"/rootfs", linkTo(test.root))
			}
			if test.mountPoint != "" {
				p.must(os.Remove(filepath.Join(root, "mnt/encrypted")))
				p.must(os.Symlink(test.mountPoint, filepath.Join(root, "mnt/encrypted")))
			}
			p.wantRefusal(p.run(req), test.reason)
		})
	}
}

// A host that serves a container's root file system can exchange it while it runs: then the container's programs are the host's (SECURITY.md,
// "rootfs: host"). With 9p, as Kata mounts it, the volume stays where it is mounted: what is read there is its data, and what is written
// there goes into it and not to the host.
func (p *player) renamedFolders(t *testing.T) {
	p = p.in(t)
	root := filepath.Join(p.share, p.container, "rootfs")
	tests := map[string]struct{ folder, sees string }{
		"the container's folder":   {filepath.Dir(root), secret + "\n" + mark},
		"the volume's mount point": {filepath.Join(root, "mnt/encrypted"), secret},
	}
	for name, test := range tests {
		p.Run(name, func(t *testing.T) {
			p := p.in(t)
			look := func() (string, error) {
				return p.node.Exec(p.ctx, p.container, "sh", "-c", "cat /mnt/encrypted/f; echo leak > /mnt/encrypted/g; cat /mark 2>/dev/null; true")
			}
			p.must(os.Rename(test.folder, test.folder+"-away"))
			if out, err := look(); err == nil && out != secret {
				t.Errorf("with the folder away the container must see its volume or nothing, and sees %q", out)
			}
			p.plant(root)
			out, err := look()
			if err != nil || out != test.sees {
				t.Errorf("with another folder there the container sees %q, %v; want %q", out, err, test.sees)
			}
			if found, err := os.ReadDir(filepath.Join(root, "mnt/encrypted")); err != nil || len(found) != 1 || found[0].Name() != "f" {
				t.Errorf("what the container wrote into its volume must not be the host's: %v, %v", found, err)
			}
			p.must(os.RemoveAll(test.folder))
			p.must(os.Rename(test.folder+"-away", test.folder))
			if out := p.exec(p.container, "sh", "-c", "cat /mnt/encrypted/f /mnt/encrypted/g && rm /mnt/encrypted/g"); out != secret+"\nleak" {
				t.Errorf("afterwards the volume must hold what was written, and holds %q", out)
			}
		})
	}
}

// mark is what the host has in a root file system of its own.
const mark = "the host's"

// plant makes the host's own root file system: folders, programs, a mark, and a file where the volume's is.
func (p *player) plant(root string) {
	p.Helper()
	for _, dir := range []string{"bin", "dev", "etc", "mnt/encrypted", "proc", "sys", boundFolder} {
		p.must(os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	p.must(os.WriteFile(filepath.Join(root, "mnt/encrypted/f"), []byte("planted\n"), 0o644))
	if _, err := os.Lstat(filepath.Join(root, "bin/sh")); err == nil {
		return // that of the image, of which only a part is exchanged
	}
	p.must(os.WriteFile(filepath.Join(root, "mark"), []byte(mark+"\n"), 0o644))
	busybox, err := os.ReadFile("/bin/busybox")
	p.must(err)
	p.must(os.WriteFile(filepath.Join(root, "bin/busybox"), busybox, 0o755))
	for _, applet := range []string{"cat", "rm", "sh", "sleep"} {
		p.must(os.Symlink("busybox", filepath.Join(root, "bin", applet)))
	}
}

// A node of the volume's mapping that the host makes in the container's root file system opens nothing.
func (p *player) nodesInTheShare(t *testing.T) {
	p = p.in(t)
	for _, m := range p.status().Volumes[0].Mappings {
		var major, minor uint32
		_, err := fmt.Sscanf(m.Number, "%d:%d", &major, &minor)
		p.must(err)
		node := filepath.Join(p.share, p.container, "rootfs/node")
		p.must(unix.Mknod(node, unix.S_IFBLK|0o666, int(unix.Mkdev(major, minor))))
		_, err = p.node.Exec(p.ctx, p.container, "dd", "if=/node", "of=/dev/null", "bs=4096", "count=1")
		p.must(os.Remove(node))
		p.wantRefusal(err, "Permission denied")
	}
}

// A container that was removed comes back only as the policy has it, and under another id.
func (p *player) recreatedContainers(t *testing.T) {
	p = p.in(t)
	at := p.status().Volumes[0]
	var major, minor int64
	if _, err := fmt.Sscanf(at.Mappings[0].Number, "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	disk := lent{"/mnt/encrypted", at.PciPath}
	used := p.request("second", disk)
	p.lay(used)
	if err := p.run(used); err != nil {
		t.Fatalf("the container that the policy declares must run: %v", err)
	}
	p.wantDenial(p.refusal(p.request("second", disk)), "container_live", `container "second"`, "running already", "remove it first")
	p.must(p.remove(used.ContainerId))
	tests := map[string]struct {
		change  func(*kata.CreateContainerRequest)
		reasons []string
	}{
		"with the id of one that was removed": {func(r *kata.CreateContainerRequest) { proto.Reset(r); proto.Merge(r, used) }, []string{"an id is never used twice"}},
		"with other arguments":                {func(r *kata.CreateContainerRequest) { r.OCI.Process.Args = []string{"cat", "/mnt/encrypted/f"} }, []string{"(rule args)", "cat /mnt/encrypted/f"}},
		"with a node of the mapping": {func(r *kata.CreateContainerRequest) {
			r.OCI.Linux.Devices = []*kata.LinuxDevice{{Path: "/dev/x", Type: "b", Major: major, Minor: minor}}
		}, []string{"(rule device_nodes)", "/dev/x"}},
		"without a mount namespace": {func(r *kata.CreateContainerRequest) {
			r.OCI.Linux.Namespaces = slices.DeleteFunc(r.OCI.Linux.Namespaces, func(n *kata.LinuxNamespace) bool { return n.Type == "mount" })
		}, []string{"(rule namespaces)"}},
		"with the sandbox's processes": {func(r *kata.CreateContainerRequest) { r.SandboxPidns = true }, []string{"(rule pid_namespace)"}},
		"by a name that the policy lacks, with the sandbox's processes": {func(r *kata.CreateContainerRequest) {
			r.SandboxPidns, r.OCI.Annotations["io.kubernetes.cri.container-name"] = true, "stranger"
		}, []string{"(rule container_declared)", "stranger"}},
	}
	for name, test := range tests {
		p.Run(name, func(t *testing.T) {
			p := p.in(t)
			req := p.request("second", disk)
			test.change(req)
			p.wantRefusal(p.refusal(req), test.reasons...)
		})
	}
}
