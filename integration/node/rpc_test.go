//go:build node

package node

import (
	"context"
	"testing"

	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Rules that no pod at crictl and no NRI plugin meets, since containerd or Kata's runtime would have to be another: their denials are lines for
// the person who operates the node.
func (p *player) rulesForRuntimes(t *testing.T) {
	p = p.in(t)
	at := p.status().Volumes[0].PciPath
	tests := map[string]struct {
		change  func(*kata.CreateContainerRequest)
		culprit string
		step    string
	}{
		"container_type": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Annotations["io.katacontainers.pkg.oci.container_type"] = "pod_sandbox"
			},
			culprit: "type annotations", step: "use containerd's CRI and Kata",
		},
		"core_dumps": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Process.Rlimits = []*kata.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: 1, Soft: 1}}
			},
			culprit: "RLIMIT_CORE", step: "leave it out",
		},
		"device_bound": {
			change:  func(r *kata.CreateContainerRequest) { r.Storages[0].Source = at },
			culprit: at, step: "plug each volume's own device in again",
		},
		"device_cgroup": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Linux.Resources.Devices = []*kata.LinuxDeviceCgroup{{Allow: true, Type: "b", Major: 253, Access: "rw"}}
			},
			culprit: "access to devices", step: "do not run it privileged",
		},
		// Where the machine's own controllers are, in one slot.
		"device_kind": {
			change:  func(r *kata.CreateContainerRequest) { r.Storages[0].Source = "1f" },
			culprit: "1f", step: "see that plugin and shim run",
		},
		"device_twice": {
			change:  func(r *kata.CreateContainerRequest) { r.Storages[0].Source = r.Storages[1].Source },
			culprit: absent[1].pci, step: "give each volume a device of its own",
		},
		"devices": {
			change: func(r *kata.CreateContainerRequest) {
				r.Devices = []*kata.Device{{Id: at, Type: "blk", VmPath: at, ContainerPath: "/dev/raw"}}
			},
			culprit: "/dev/raw", step: "name a volume of the policy for it",
		},
		"hooks": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Hooks = &kata.Hooks{Prestart: []*kata.Hook{{Path: "/bin/sh"}}}
			},
			culprit: "hooks", step: "remove them",
		},
		"id_mappings": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Linux.UIDMappings = []*kata.LinuxIDMapping{{HostID: 0, ContainerID: 0, Size: 1}}
			},
			culprit: "user namespaces", step: "remove hostUsers: false",
		},
		"labels": {
			change:  func(r *kata.CreateContainerRequest) { r.OCI.Process.SelinuxLabel = "system_u:system_r:spc_t:s0" },
			culprit: "spc_t", step: "disable_guest_selinux",
		},
		"masked_paths": {
			change:  func(r *kata.CreateContainerRequest) { r.OCI.Linux.MaskedPaths = []string{"/mnt"} },
			culprit: "/mnt", step: "must not change these lists",
		},
		"mount_paths": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Mounts = append(r.OCI.Mounts, &kata.Mount{Destination: "/tmp/../mnt/other", Type: "tmpfs", Source: "tmpfs"})
			},
			culprit: "/tmp/../mnt/other", step: "write paths without",
		},
		"mounts_missing": {
			change:  func(r *kata.CreateContainerRequest) { r.OCI.Mounts = r.OCI.Mounts[1:] },
			culprit: "/proc", step: "must not leave it out",
		},
		"namespaces": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Linux.Namespaces = append(r.OCI.Linux.Namespaces, &kata.LinuxNamespace{Type: "pid", Path: "/proc/1/ns/pid"})
			},
			culprit: "join none of the guest's", step: "must not change them",
		},
		"propagation": {
			change:  func(r *kata.CreateContainerRequest) { r.OCI.Linux.RootfsPropagation = "shared" },
			culprit: "propagate", step: "use private mount propagation",
		},
		"resources": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Linux.Resources.HugepageLimits = []*kata.LinuxHugepageLimit{{Pagesize: "../../x", Limit: 1}}
			},
			culprit: "../../x", step: "must not change them",
		},
		"rootfs": {
			change:  func(r *kata.CreateContainerRequest) { r.OCI.Root.Path = "/run/sealvol/volumes/encrypted" },
			culprit: "/run/sealvol/volumes/encrypted", step: "use a file system shared by virtio-fs or 9p",
		},
		"seccomp": {
			change: func(r *kata.CreateContainerRequest) {
				r.OCI.Linux.Seccomp = &kata.LinuxSeccomp{DefaultAction: "SCMP_ACT_NOTIFY"}
			},
			culprit: "seccomp profile", step: "use the runtime's default profile",
		},
		"shared_mounts": {
			change: func(r *kata.CreateContainerRequest) {
				r.SharedMounts = []*kata.SharedMount{{Name: "x", SrcCtr: p.container, SrcPath: "/mnt/encrypted", DstCtr: r.ContainerId, DstPath: "/x"}}
			},
			culprit: "bypass the policy", step: "remove them",
		},
		"spec": {
			change:  func(r *kata.CreateContainerRequest) { r.OCI.Root = nil },
			culprit: "no process, root or linux section", step: "must send a whole one",
		},
		"stdio_ports": {
			change:  func(r *kata.CreateContainerRequest) { r.StdoutPort = 1027 },
			culprit: "ports of its own", step: "set use_passfd_io to false",
		},
		"storage_place": {
			change: func(r *kata.CreateContainerRequest) {
				for _, m := range r.OCI.Mounts {
					if m.Source == r.Storages[0].MountPoint {
						m.Source = storagePath(at)
					}
				}
				r.Storages[0].MountPoint = storagePath(at)
			},
			culprit: storagePath(at), step: "must give each storage its own",
		},
		"string_user": {
			change:  func(r *kata.CreateContainerRequest) { r.StringUser = &kata.StringUser{Uid: "root"} },
			culprit: "users by name", step: "use numbers",
		},
		"working_directory": {
			change:  func(r *kata.CreateContainerRequest) { r.OCI.Process.Cwd = "/proc/self/fd" },
			culprit: "/proc/self/fd", step: "correct the pod or the image",
		},
	}
	for rule, test := range tests {
		p.Run(rule, func(t *testing.T) {
			p := p.in(t)
			req := p.request("third", absent[:]...)
			test.change(req)
			p.wantDenial(p.refusal(req), rule, `container "third"`, test.culprit, test.step)
		})
	}
}

// What else the runtime asks for beside containers, and what it must not.
func (p *player) otherRequests(t *testing.T) {
	p = p.in(t)
	sealed := p.status().Volumes[0]
	p.put("link", linkTo("/run/sealvol/volumes"))
	copyTo := func(path string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := p.agent.CopyFile(ctx, &kata.CopyFileRequest{Path: path, FileMode: 0o100644, FileSize: 1, Data: []byte("x")})
			return err
		}
	}
	createSandbox := func(id string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := p.agent.CreateSandbox(ctx, &kata.CreateSandboxRequest{SandboxId: id, Storages: []*kata.Storage{
				{Driver: "9p", Source: "kataShared", Fstype: "9p", MountPoint: guestShare, Options: []string{"trans=virtio,version=9p2000.L,cache=mmap"}},
			}})
			return err
		}
	}
	tests := map[string]struct {
		call   func(ctx context.Context) error
		code   codes.Code
		reason string
	}{
		"a file copied through a link of the share": {copyTo(guestShare + "link/encrypted/x"), codes.PermissionDenied, "files are not copied"},
		"a file copied into a running container":    {copyTo(guestShare + p.container + "/rootfs/mnt/encrypted/x"), codes.PermissionDenied, "files are not copied"},
		"a file copied over the agent's":            {copyTo("/run/kata-containers/" + p.container + "/config.json"), codes.PermissionDenied, "files are not copied"},
		"a second sandbox":                          {createSandbox("again"), codes.FailedPrecondition, "a second CreateSandbox"},
		"the same sandbox again":                    {createSandbox(p.sandbox), codes.FailedPrecondition, "a second CreateSandbox"},
		"a command in the sandbox container": {
			func(ctx context.Context) error {
				_, err := p.agent.ExecProcess(ctx, &kata.ExecProcessRequest{ContainerId: p.sandbox, ExecId: "e", Process: &kata.Process{Args: []string{"sh"}, Cwd: "/"}})
				return err
			}, codes.PermissionDenied, "(rule exec_container)",
		},
		"a size of memory that is a path": {
			func(ctx context.Context) error {
				_, err := p.agent.UpdateContainer(ctx, &kata.UpdateContainerRequest{ContainerId: p.container, Resources: &kata.LinuxResources{
					HugepageLimits: []*kata.LinuxHugepageLimit{{Pagesize: "../../x", Limit: 1}},
				}})
				return err
			}, codes.PermissionDenied, "(rule resources)",
		},
		"a mount in a running pod": {
			func(ctx context.Context) error {
				_, err := p.agent.UpdateEphemeralMounts(ctx, &kata.UpdateEphemeralMountsRequest{Storages: []*kata.Storage{
					{Driver: "ephemeral", Source: "/dev/" + sealed.Device, Fstype: "ext4", MountPoint: guestShare + "x", Options: []string{"ro"}},
				}})
				return err
			}, codes.PermissionDenied, "(rule no_storages)",
		},
		"statistics of the guest's root": {
			func(ctx context.Context) error {
				_, err := p.agent.GetVolumeStats(ctx, &kata.VolumeStatsRequest{VolumeGuestPath: "/"})
				return err
			}, codes.PermissionDenied, "not the path of a sealed volume",
		},
		"a larger volume": {
			func(ctx context.Context) error {
				_, err := p.agent.ResizeVolume(ctx, &kata.ResizeVolumeRequest{VolumeGuestPath: storagePath(sealed.PciPath), Size: 1 << 40})
				return err
			}, codes.PermissionDenied, "ResizeVolume",
		},
	}
	for name, test := range tests {
		p.Run(name, func(t *testing.T) {
			p := p.in(t)
			ctx, cancel := context.WithTimeout(p.ctx, answerLimit)
			defer cancel()
			err := test.call(ctx)
			p.wantRefusal(err, test.reason)
			if status.Code(err) != test.code {
				t.Errorf("the class must be %v: %v", test.code, err)
			}
		})
	}
}
