package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Artefacts are the files that a node is made of. Every path is absolute.
type Artefacts struct {
	Containerd, Ctr, Crictl string
	// KataShim is the stock shim that ours fronts.
	KataShim string
	// Kernel and Initrd are what Kata boots as the sandbox.
	Kernel, Initrd string
	// Images are OCI tarballs; the pause image is among them.
	Images []string
	// Plugin, Shim, CSI and Sealvol are the programs under test.
	Plugin, Shim, CSI, Sealvol string
	// Kubelet plays kubelet before the CSI driver.
	Kubelet string
}

// FromTree gives the artefacts that the Makefile leaves below root, the
// folder of the checkout, and an error that names the first one missing.
// KATA_SHIM, KATA_KERNEL and KATA_INITRD put others in their places.
func FromTree(root string) (Artefacts, error) {
	instead := func(env, path string) string {
		if v := os.Getenv(env); v != "" {
			return v
		}
		return filepath.Join(root, path)
	}
	a := Artefacts{
		Containerd: filepath.Join(root, "build/tools/containerd"),
		Ctr:        filepath.Join(root, "build/tools/ctr"),
		Crictl:     filepath.Join(root, "build/tools/crictl"),
		KataShim:   instead("KATA_SHIM", "build/tools/containerd-shim-kata-v2"),
		Kernel:     instead("KATA_KERNEL", "build/kernel/vmlinux"),
		Initrd:     instead("KATA_INITRD", "build/guest/initrd.img"),
		Images: []string{
			filepath.Join(root, "build/images/busybox.tar"),
			filepath.Join(root, "build/images/pause.tar"),
		},
		Plugin:  filepath.Join(root, "bin/sealvol-nri"),
		Shim:    filepath.Join(root, "bin/containerd-shim-kata-sealvol-v2"),
		CSI:     filepath.Join(root, "bin/sealvol-csi"),
		Sealvol: filepath.Join(root, "bin/sealvol"),
		Kubelet: filepath.Join(root, "build/kubelet"),
	}
	all := append([]string{a.Containerd, a.Ctr, a.Crictl, a.KataShim, a.Kernel, a.Initrd, a.Plugin, a.Shim, a.CSI, a.Sealvol, a.Kubelet}, a.Images...)
	for _, path := range all {
		if _, err := os.Stat(path); err != nil {
			return Artefacts{}, fmt.Errorf("node: %w (make node-artefacts builds it)", err)
		}
	}
	return a, nil
}

// containerdConfig is what the node adds to the drop-ins that contrib ships:
// paths of this node, and what a VM without AppArmor, CNI and a registry needs.
func (n *Node) containerdConfig(dropIns ...string) string {
	quoted := make([]string, len(dropIns))
	for i, path := range dropIns {
		quoted[i] = "'" + path + "'"
	}
	return strings.NewReplacer("@DIR@", n.dir, "@DROPINS@", strings.Join(quoted, ", ")).Replace(`version = 4
root = '/var/lib/containerd'
state = '@DIR@/state'
temp = '@DIR@/tmp'
imports = [@DROPINS@]
disabled_plugins = [
  'io.containerd.snapshotter.v1.btrfs', 'io.containerd.snapshotter.v1.zfs',
  'io.containerd.snapshotter.v1.devmapper', 'io.containerd.snapshotter.v1.blockfile',
  'io.containerd.snapshotter.v1.erofs',
  'io.containerd.tracing.processor.v1.otlp', 'io.containerd.internal.v1.tracing',
]

[plugins.'io.containerd.server.v1.grpc']
  address = '@DIR@/containerd.sock'
[plugins.'io.containerd.server.v1.ttrpc']
  address = '@DIR@/containerd.sock.ttrpc'
[plugins.'io.containerd.shim.v1.manager']
  env = ['SEALVOL_SHIM_CONFIG=@DIR@/etc/shim.toml']
  socket_dir = '@DIR@/s'
[plugins.'io.containerd.internal.v1.opt']
  path = '@DIR@/opt'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '` + PauseImage + `'
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'kata'
[plugins.'io.containerd.nri.v1.nri']
  socket_path = '@DIR@/nri.sock'
  plugin_path = '@DIR@/nri-plugins'
  plugin_config_path = '@DIR@/nri-conf'
`)
}

// kataConfig is the stock runtime's configuration: QEMU with virtio-blk, and
// the share over 9p, since the node has no virtiofsd.
func (n *Node) kataConfig() string {
	return strings.NewReplacer("@KERNEL@", n.art.Kernel, "@INITRD@", n.art.Initrd).Replace(`[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
valid_hypervisor_paths = ["/usr/bin/qemu-system-x86_64"]
kernel = "@KERNEL@"
initrd = "@INITRD@"
enable_annotations = ["kernel_params"]
machine_type = "q35"
default_vcpus = 1
default_maxvcpus = 1
default_memory = 512
default_bridges = 1
shared_fs = "virtio-9p"
msize_9p = 8192
block_device_driver = "virtio-blk"
block_device_aio = "threads"
extra_monitor_socket = "qmp"
enable_debug = true
kernel_params = "console=hvc0 console=ttyS0 quiet pci=noearly"
disable_image_nvdimm = true
disable_selinux = true
disable_guest_selinux = true

[agent.kata]
dial_timeout = 90

[runtime]
internetworking_model = "none"
disable_new_netns = true
disable_guest_seccomp = true
enable_debug = true
sandbox_cgroup_only = true
create_container_timeout = 120
`)
}
