# The framework: it judges the host's requests by the pod's data. It is measured with the guest; the author's text has no part in it.
#
# Input: rpc, the name of a method of the agent's service; request, its message as protobuf JSON with the names of the .proto files and
# every field there, absent messages as null; state.containers, live container id → name in the policy, "" for the sandbox container;
# pod, sealed_pod as the guest understood it, null for a pod that has none.
#
# Each rpc has a list of rules, and a request passes when each of them *holds*. Nothing here says what is forbidden: a rule that comes
# out undefined, because a field is missing or has another type, does not hold, so no odd request slips by a check that did not fire.
#
# Written in the Rego that OPA v1 and regorus (the agent's) both take.
package sealvol

import rego.v1

verdict := {
	"denied": denied,
	"reason": reason,
	"culprits": found,
	"container": name,
	"sandbox": sandbox,
	"attachments": attachments,
}

# In the order of the lists below: the first is the one that a person is told.
denied := [rule | some rule in rules; not holds[rule]]

# What is said about a denial has no part in it, so that no slip in the words lets a request through.
default reason := ""

reason := reasons[denied[0]]

default found := []

found := culprits[denied[0]]

# The rule "known_request" never holds.
default rules := ["known_request"]

rules := array.concat(always[input.rpc], sealed_pod[input.rpc]) if input.pod != null

rules := array.concat(always[input.rpc], open_pod[input.rpc]) if input.pod == null

# Rules for every pod, and those for pods with and without a sealed_pod.
always := {
	"CreateSandbox": ["sandbox_storages", "guest_hooks", "kernel_modules", "pid_namespace"],
	"CreateContainer": [
		"spec", "container_id", "stdio_ports", "string_user", "hooks", "namespaces", "shared_mounts", "rootfs", "cgroup", "devices",
	],
	"ExecProcess": ["stdio_ports", "string_user"],
	"UpdateEphemeralMounts": ["no_storages"],
}

sealed_pod := {
	"CreateSandbox": [],
	"CreateContainer": [
		"container_type", "annotations", "container_declared", "container_live", "args", "image", "device_nodes", "device_cgroup",
		"volume_shadowed", "volume_storage", "storages", "device_twice", "volume_missing", "mounts",
		"capabilities", "id_mappings", "sysctl", "propagation", "pid_namespace",
	],
	"ExecProcess": ["exec_container", "exec", "capabilities"],
	"UpdateEphemeralMounts": [],
}

open_pod := {
	"CreateSandbox": [],
	"CreateContainer": ["open_device_nodes", "open_device_cgroup", "open_storages", "open_mounts"],
	"ExecProcess": [],
	"UpdateEphemeralMounts": [],
}

# What a person reads: what is wrong, then what to do. {} is the culprit.
reasons := {
	"annotations": "annotation {} is not one that containerd or Kata sets for itself; do not pass it on to the runtime",
	"args": "its arguments {} are not those of the policy; correct sealed_pod.containers or the pod",
	"capabilities": "capability {} is not in CRI's default set; drop it from the pod's security context",
	"cgroup": "its cgroup path {} does not end in the container's id; the runtime must not change it",
	"container_declared": "the policy does not name it; add it to sealed_pod.containers",
	"container_id": "its id is not a plain word; the runtime must not change it",
	"container_live": "it is running already; remove it first, one name is one live container",
	"container_type": "its type annotations do not say whether it is the sandbox or a container; use containerd's CRI and Kata",
	"device_cgroup": "it asks for access to devices; do not run it privileged",
	"device_nodes": "device {} would reach it raw; name a volume of the policy for it, or remove it from the pod",
	"device_twice": "two volumes came on one device {}; give each volume a device of its own",
	"devices": "device {} would reach it raw; name a volume of the policy for it, or remove it from the pod",
	"exec": "the command {} is not listed; add it to the container's exec in sealed_pod.containers",
	"exec_container": "no live container of the policy has this id; commands run only in containers that the policy names",
	"guest_hooks": "hooks would run in the guest; remove guest_hook_path from Kata's configuration",
	"hooks": "OCI hooks would run in the guest; remove them",
	"id_mappings": "user namespaces are not for sealed pods; remove hostUsers: false from the pod",
	"image": "its image {} is not that of the policy; correct sealed_pod.containers or the pod",
	"known_request": "the policy knows no such request; the gate must not ask for it",
	"kernel_modules": "the host may not load kernel modules; remove kernel_modules from Kata's configuration",
	"mounts": "the mount at {} is neither a volume of the policy nor one that CRI gives every container; remove it from the pod",
	"namespaces": "it must have a mount namespace of its own and join none of the guest's; the runtime must not change them",
	"no_storages": "mounts of a running pod are not changed; remove memory volumes from the pod",
	"open_device_cgroup": "it asks for access to block devices; do not run it privileged, or write a policy that names a volume",
	"open_device_nodes": "device {} would reach it raw; write a policy (sealed_pod) that names a volume for it",
	"open_mounts": "the mount at {} is not one that Kata makes without block storage; write a policy (sealed_pod) that names a volume for it",
	"open_storages": "storage {} is not one that Kata makes without block storage; write a policy (sealed_pod) that names a volume for it",
	"pid_namespace": "it would see the processes of other containers, and so their volumes; set its pid namespace to CONTAINER (shareProcessNamespace: false)",
	"propagation": "its mounts would propagate; use private mount propagation",
	"rootfs": "its root file system {} is not where Kata puts it; use a file system shared by virtio-fs or 9p",
	"sandbox_storages": "storage {} is neither Kata's share nor its shared memory; remove it from Kata's configuration",
	"shared_mounts": "mounts shared between containers bypass the policy; remove them",
	"spec": "its specification has no process, root or linux section; the runtime must send a whole one",
	"stdio_ports": "standard I/O over ports of its own is not supported; set use_passfd_io to false in Kata's configuration",
	"storages": "storage {} is not a volume of the policy; name it in sealed_pod.volumes or remove it from the pod",
	"string_user": "users by name are not supported; use numbers",
	"sysctl": "sysctl {} is not on the list of safe ones; remove it from the pod",
	"volume_missing": "its volume {} is not there; ask for it in the pod and see that plugin and shim run on the node",
	"volume_shadowed": "another mount, at {}, lies on, above or below a volume; remove it from the pod",
	"volume_storage": "the mount of its volume {} is not made of one virtio-blk device of its own; see that plugin and shim run on the node",
}

# What the reason is about, worst first. Each is a list that is always defined.
culprits := {
	"annotations": [k | some k, _ in spec.Annotations; not annotation_known(k)],
	"args": [a | a := concat(" ", spec.Process.Args)],
	"capabilities": [c | some c in capabilities; not capability_default(c)],
	"cgroup": [p | p := spec.Linux.CgroupsPath],
	"device_nodes": [d.Path | some d in spec.Linux.Devices],
	"device_twice": [s.source | some i, s in request.storages; some j, t in request.storages; i < j; s.source == t.source],
	"devices": [d.container_path | some d in request.devices],
	"exec": [a | a := concat(" ", request.process.Args)],
	"image": [i | i := spec.Annotations["io.kubernetes.cri.image-name"]],
	"mounts": [m.destination | some m in spec.Mounts; not mount_sealed(m)],
	"open_device_nodes": [d.Path | some d in spec.Linux.Devices; not device_node_open(d)],
	"open_mounts": [m.destination | some m in spec.Mounts; not mount_open(m)],
	"open_storages": [storage_name(s) | some s in request.storages; not storage_open(s)],
	"rootfs": [p | p := spec.Root.Path],
	"sandbox_storages": [s.driver | some s in request.storages; not storage_sandbox(s)],
	"storages": [storage_name(s) | some s in request.storages; not storage_volume(s)],
	"sysctl": [k | some k, _ in spec.Linux.Sysctl; not k in sysctls],
	"volume_missing": [concat(" at ", [v.volume, v.path]) | some v in volumes; count(mounts_at(v.path)) == 0],
	"volume_shadowed": array.concat(
		[m.destination | some v in volumes; some m in spec.Mounts; not mount_clear(m, v.path)],
		[v.path | some v in volumes; count(mounts_at(v.path)) > 1],
	),
	"volume_storage": [concat(" at ", [v.volume, v.path]) | some v in volumes; some m in mounts_at(v.path); not volume_mount(m)],
}

# The driver, and where the container would see it.
storage_name(s) := concat(" at ", array.concat([s.driver], places)) if {
	places := [m.destination | some m in spec.Mounts; m.source == s.mount_point]
}

request := input.request

spec := request.OCI

# --- Which container -------------------------------------------------------------------------------------------------------------

default sandbox := false

sandbox if {
	input.rpc == "CreateContainer"
	spec.Annotations["io.kubernetes.cri.container-type"] == "sandbox"
}

workload if spec.Annotations["io.kubernetes.cri.container-type"] == "container"

# The name in the policy; "" for the sandbox container, for requests that are about no container, and for pods without sealed_pod.
default name := ""

name := spec.Annotations["io.kubernetes.cri.container-name"] if {
	input.rpc == "CreateContainer"
	input.pod != null
	workload
}

name := input.state.containers[request.container_id] if input.rpc == "ExecProcess"

container := input.pod.containers[name]

holds contains "container_type" if {
	sandbox
	spec.Annotations["io.katacontainers.pkg.oci.container_type"] == "pod_sandbox"
}

holds contains "container_type" if {
	workload
	spec.Annotations["io.katacontainers.pkg.oci.container_type"] == "pod_container"
}

# The agent knows a container by other keys too (CRI-O's, dockershim's) and injects devices for the keys of CDI. None of them may be
# there to disagree.
holds contains "annotations" if {
	every key, _ in spec.Annotations {
		annotation_known(key)
	}
}

annotation_known(key) if {
	some prefix in ["io.kubernetes.cri.", "io.kubernetes.container.", "io.katacontainers.", "io.containerd.", "nerdctl/"]
	startswith(key, prefix)
}

holds contains "container_declared" if {
	workload
	container
}

holds contains "container_declared" if {
	sandbox
	not spec.Annotations["io.kubernetes.cri.container-name"]
}

holds contains "container_live" if {
	sandbox
	every id, live in input.state.containers {
		id != request.container_id
		live != ""
	}
}

holds contains "container_live" if {
	workload
	every id, live in input.state.containers {
		id != request.container_id
		live != name
	}
}

holds contains "container_id" if regex.match("^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$", request.container_id)

# --- What runs -------------------------------------------------------------------------------------------------------------------

holds contains "spec" if {
	is_object(spec.Process)
	is_object(spec.Root)
	is_object(spec.Linux)
}

# What pause images run: Kubernetes' and its mirrors', OpenShift's, one made of busybox.
holds contains "args" if {
	sandbox
	spec.Process.Args in [["/pause"], ["/usr/bin/pod"]]
}

holds contains "args" if {
	workload
	container.args == null
}

holds contains "args" if {
	workload
	spec.Process.Args == container.args
}

holds contains "image" if sandbox

holds contains "image" if {
	workload
	container.image == ""
}

holds contains "image" if {
	workload
	spec.Annotations["io.kubernetes.cri.image-name"] == container.image
}

holds contains "exec_container" if {
	name != ""
	container
}

holds contains "exec" if {
	is_array(container.exec)
	some argv in container.exec
	exec_matches(argv, request.process.Args)
}

exec_matches(argv, args) if {
	count(args) > 0
	args == argv
}

exec_matches(argv, args) if {
	n := count(argv) - 1
	argv[n] == "..."
	count(args) > 0
	array.slice(args, 0, n) == array.slice(argv, 0, n)
}

# containerd's default, which Kata passes on. A container without the list would have all; an executed process without it has its
# container's.
default_capabilities := {
	"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID",
	"SETPCAP", "SETUID", "SYS_CHROOT",
}

capability_default(c) if trim_prefix(c, "CAP_") in default_capabilities

process := spec.Process if input.rpc == "CreateContainer"

process := request.process if input.rpc == "ExecProcess"

capabilities := [c | is_object(process.Capabilities); some set in process.Capabilities; some c in set]

holds contains "capabilities" if {
	is_object(process.Capabilities)
	every c in capabilities {
		capability_default(c)
	}
}

holds contains "capabilities" if {
	input.rpc == "ExecProcess"
	request.process.Capabilities == null
}

holds contains "string_user" if request.string_user == null

# runtime-rs can name ports for standard I/O, which an agent without the listener ignores.
holds contains "stdio_ports" if {
	request.stdin_port == 0
	request.stdout_port == 0
	request.stderr_port == 0
}

# --- Where it runs ---------------------------------------------------------------------------------------------------------------

share := "/run/kata-containers/shared/containers/"

# Kata's Go runtime, and runtime-rs.
holds contains "rootfs" if {
	some folder in ["", "passthrough/"]
	spec.Root.Path == concat("", [share, folder, request.container_id, "/rootfs"])
}

# The gate finds the container's processes by it. Paths are "/a/b/id" or, for systemd, "slice:prefix:id".
holds contains "cgroup" if {
	parts := split(replace(spec.Linux.CgroupsPath, ":", "/"), "/")
	parts[count(parts) - 1] == request.container_id
	count(parts) > 1
	not ".." in parts
}

# In a sandbox that shares the process namespace a container reads another one's files through /proc/PID/root.
holds contains "pid_namespace" if request.sandbox_pidns == false

holds contains "hooks" if spec.Hooks == null

# runtime-rs sends an object with empty lists.
holds contains "hooks" if {
	is_object(spec.Hooks)
	every _, hooks in spec.Hooks {
		count(hooks) == 0
	}
}

holds contains "guest_hooks" if request.guest_hook_path == ""

holds contains "kernel_modules" if count(request.kernel_modules) == 0

holds contains "shared_mounts" if count(request.shared_mounts) == 0

# A path would join a namespace of the guest; without a mount namespace the container runs in the guest's root.
holds contains "namespaces" if {
	types := [namespace_type(ns) | some ns in spec.Linux.Namespaces]
	count(types) == count(spec.Linux.Namespaces)
	count(types) == count({type | some type in types})
	"mount" in types
}

namespace_type(ns) := type if {
	ns.Path == ""
	type := object.get(namespace_types, ns.Type, null)
	type != null
}

# Kata's Go runtime drops pid, network and cgroup; runtime-rs keeps cgroup and says mnt.
namespace_types := {"mount": "mount", "mnt": "mount", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "user": "user"}

holds contains "id_mappings" if {
	count(spec.Linux.UIDMappings) == 0
	count(spec.Linux.GIDMappings) == 0
	not "user" in {ns.Type | some ns in spec.Linux.Namespaces}
}

# Kubernetes' safe set, and what containerd sets for every pod.
sysctls := {
	"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.ip_unprivileged_port_start",
	"net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes",
	"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem",
}

holds contains "sysctl" if {
	every key, _ in spec.Linux.Sysctl {
		key in sysctls
	}
}

holds contains "propagation" if spec.Linux.RootfsPropagation in ["", "private", "rprivate"]

# --- Devices ---------------------------------------------------------------------------------------------------------------------

holds contains "devices" if count(request.devices) == 0

holds contains "device_nodes" if count(spec.Linux.Devices) == 0

holds contains "device_cgroup" if count(spec.Linux.Resources.Devices) == 0

holds contains "device_cgroup" if {
	is_object(spec.Linux)
	spec.Linux.Resources == null
}

# Character major 21 is SCSI generic: block storage by another name.
device_node_open(d) if {
	d.Type in ["c", "u", "p"]
	not d.Major in [21, "21"]
}

holds contains "open_device_nodes" if {
	every d in spec.Linux.Devices {
		device_node_open(d)
	}
}

holds contains "open_device_cgroup" if {
	every d in spec.Linux.Resources.Devices {
		device_cgroup_open(d)
	}
}

holds contains "open_device_cgroup" if {
	is_object(spec.Linux)
	spec.Linux.Resources == null
}

device_cgroup_open(d) if d.Allow == false

device_cgroup_open(d) if d.Type == "c"

# --- Mounts ----------------------------------------------------------------------------------------------------------------------

# What containerd's CRI mounts into every container: type, source, options that must be there and that may be.
fixed_mounts := {
	"/proc": {"type": "proc", "source": "proc", "must": {"nosuid", "noexec", "nodev"}, "may": set()},
	"/dev": {"type": "tmpfs", "source": "tmpfs", "must": {"nosuid"}, "may": {"noexec", "strictatime", "mode=755", "size=65536k"}},
	"/dev/pts": {
		"type": "devpts", "source": "devpts", "must": {"nosuid", "noexec", "newinstance"},
		"may": {"ptmxmode=0666", "mode=0620", "gid=5"},
	},
	"/dev/mqueue": {"type": "mqueue", "source": "mqueue", "must": {"nosuid", "noexec", "nodev"}, "may": set()},
	"/sys": {"type": "sysfs", "source": "sysfs", "must": {"nosuid", "noexec", "nodev", "ro"}, "may": set()},
	"/sys/fs/cgroup": {
		"type": "cgroup", "source": "cgroup", "must": {"nosuid", "noexec", "nodev", "ro"},
		"may": {"relatime", "nsdelegate", "memory_recursiveprot"},
	},
}

# Files of the node that kubelet and containerd bind into every container, through the share.
host_files := {
	"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log", "/var/run/secrets/kubernetes.io/serviceaccount",
}

bind_options := {"bind", "rbind", "private", "rprivate", "ro", "rro", "rw", "nosuid", "nodev", "noexec", "noatime", "relatime"}

bind(m) if {
	m.type == "bind"
	some option in m.options
	option in ["bind", "rbind"]
	every o in m.options {
		o in bind_options
	}
}

mount_sealed(m) if {
	fixed := fixed_mounts[m.destination]
	m.type == fixed.type
	m.source == fixed.source
	options := {o | some o in m.options}
	count(fixed.must - options) == 0
	count((options - fixed.must) - fixed.may) == 0
}

mount_sealed(m) if mount_shm(m)

# A file of the share itself, not a path into it: a link further down would be the host's choice.
mount_sealed(m) if {
	m.destination in host_files
	bind(m)
	some folder in ["", "passthrough/"]
	prefix := concat("", [share, folder])
	below(m.source, prefix)
	count(split(trim_prefix(m.source, prefix), "/")) == 1
}

mount_sealed(m) if volume_mount(m)

# The pod's shared memory, which CreateSandbox made.
mount_shm(m) if {
	m.destination == "/dev/shm"
	m.source == "/run/kata-containers/sandbox/shm"
	bind(m)
}

holds contains "mounts" if {
	every m in spec.Mounts {
		mount_sealed(m)
	}
	count(spec.Mounts) == count({m.destination | some m in spec.Mounts})
}

# path is prefix and more, in clean components. prefix ends in "/".
below(path, prefix) if {
	startswith(path, prefix)
	every part in split(trim_prefix(path, prefix), "/") {
		not part in ["", ".", ".."]
	}
}

# --- Volumes ---------------------------------------------------------------------------------------------------------------------

# The volumes of this container, each with its path.
volumes := [{"volume": v, "path": m.path, "read_only": m.read_only} |
	some v, volume in input.pod.volumes
	some m in volume.mounts
	workload
	m.container == name
]

mounts_at(path) := [m | some m in spec.Mounts; m.destination == path]

holds contains "volume_missing" if {
	every v in volumes {
		count(mounts_at(v.path)) > 0
	}
}

# No other mount on, above or below a volume's path, wherever in the list it stands.
holds contains "volume_shadowed" if {
	every v in volumes {
		count(mounts_at(v.path)) < 2
		every m in spec.Mounts {
			mount_clear(m, v.path)
		}
	}
}

mount_clear(m, path) if m.destination == path

mount_clear(m, path) if not touches(m.destination, path)

touches(a, b) if a == b

touches(a, b) if startswith(a, concat("", [trim_right(b, "/"), "/"]))

touches(a, b) if startswith(b, concat("", [trim_right(a, "/"), "/"]))

# The mount of a volume: at its path, a bind of exactly one storage. Which options it has is the policy's to say; the gate writes them.
volume_mount(m) if {
	some v in volumes
	v.path == m.destination
	bind(m)
	storages := [s | some s in request.storages; s.mount_point == m.source]
	count(storages) == 1
	storage_device(storages[0])
}

holds contains "volume_storage" if {
	every v in volumes {
		every m in mounts_at(v.path) {
			volume_mount(m)
		}
	}
}

# A virtio-blk device by its PCI path, with nothing that the agent would do with it. Its file system and options are the host's words:
# the gate drops the storage and goes by the policy.
storage_device(s) if {
	s.driver == "blk"
	regex.match("^[01][0-9a-f](/[01][0-9a-f]){0,7}$", s.source)
	below(s.mount_point, "/run/kata-containers/")
	count(s.driver_options) == 0
	s.fs_group == null
}

storage_volume(s) if {
	storage_device(s)
	some m in spec.Mounts
	m.source == s.mount_point
	volume_mount(m)
}

holds contains "storages" if {
	every s in request.storages {
		storage_volume(s)
	}
	count(request.storages) == count(attachments)
}

holds contains "device_twice" if {
	count(request.storages) == count({s.source | some s in request.storages})
	count(request.storages) == count({s.mount_point | some s in request.storages})
}

attachments := [{"volume": v.volume, "mount": i, "storage": j, "read_only": v.read_only} |
	some i, m in spec.Mounts
	some v in volumes
	v.path == m.destination
	some j, s in request.storages
	s.mount_point == m.source
]

# --- Pods without sealed_pod: what Kata makes, but for block storage -------------------------------------------------------------

mount_open(m) if {
	m.type in ["proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "tmpfs"]
	not "bind" in m.options
	not "rbind" in m.options
}

# Kata leaves the type of an emptyDir's mount at local.
mount_open(m) if {
	m.type in ["bind", "local"]
	some prefix in [share, "/run/kata-containers/sandbox/ephemeral/"]
	below(m.source, prefix)
}

mount_open(m) if mount_shm(m)

# Kata passes binds of the node's /sys on as they are; they show the guest's.
mount_open(m) if {
	m.type == "bind"
	m.source == "/sys"
}

mount_open(m) if {
	m.type == "bind"
	below(m.source, "/sys/")
}

holds contains "open_mounts" if {
	every m in spec.Mounts {
		mount_open(m)
	}
}

storage_open(s) if {
	s.driver == "ephemeral"
	[s.source, s.fstype] in [["tmpfs", "tmpfs"], ["nodev", "hugetlbfs"]]
	below(s.mount_point, "/run/kata-containers/sandbox/ephemeral/")
}

storage_open(s) if {
	s.driver == "local"
	s.source == "local"
	s.fstype == "local"
	below(s.mount_point, share)
}

storage_open(s) if {
	s.driver == "watchable-bind"
	s.fstype == "bind"
	below(s.source, share)
	below(s.mount_point, share)
}

holds contains "open_storages" if {
	every s in request.storages {
		storage_open(s)
	}
}

# --- Sandbox ---------------------------------------------------------------------------------------------------------------------

storage_sandbox(s) if {
	s.driver == "9p"
	s.fstype == "9p"
	storage_share(s, "^(trans=virtio|version=9p2000\\.L|cache=(none|loose|fscache|mmap)|msize=[0-9]{1,9}|nodev|nosuid)$")
}

storage_sandbox(s) if {
	s.driver == "virtio-fs"
	s.fstype == "virtiofs"
	storage_share(s, "^(dax|nodev|nosuid)$")
}

storage_sandbox(s) if {
	s.driver == "ephemeral"
	s.fstype == "tmpfs"
	s.source == "shm"
	s.mount_point == "/run/kata-containers/sandbox/shm"
	storage_options(s, "^(noexec|nosuid|nodev|mode=1777|size=[0-9]{1,15})$")
}

storage_share(s, pattern) if {
	s.source == "kataShared"
	s.mount_point in [share, trim_right(share, "/")]
	storage_options(s, pattern)
}

# Kata puts several options into one string.
storage_options(s, pattern) if {
	count(s.driver_options) == 0
	s.fs_group == null
	every options in s.options {
		every option in split(options, ",") {
			regex.match(pattern, option)
		}
	}
}

holds contains "sandbox_storages" if {
	every s in request.storages {
		storage_sandbox(s)
	}
	count(request.storages) == count({s.mount_point | some s in request.storages})
}

holds contains "no_storages" if count(request.storages) == 0
