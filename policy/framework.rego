# The framework: it judges the host's requests by the pod's data. It is measured with the guest; the author's text has no part in it.
#
# Input: rpc, the name of a method of the agent's service; request, its message as protobuf JSON with the names of the .proto files and
# every field there, absent messages as null, bytes of more than a path's length left out; state, what the guest knows (type State in
# decide.go); pod, sealed_pod as the guest understood it, null for a pod that has none.
#
# Each rpc has a list of rules, and a request passes when each of them *holds*. Nothing here says what is forbidden: a rule that comes
# out undefined, because a field is missing or has another type, does not hold, so no odd request slips by a check that did not fire.
#
# A decision takes time in proportion to the request: volumes, storages and mounts find each other by key, never by trying all pairs.
# What is fine among many mounts or devices is a set, which is then counted: a function called for each would take several times as long.
#
# Written in the Rego that OPA v1 and regorus (the agent's) both take.
package sealvol

import input.request
import input.request.OCI as spec
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

rules := [] if input.rpc in unjudged

rules := array.concat(always[input.rpc], sealed_pod[input.rpc]) if input.pod != null

rules := array.concat(always[input.rpc], open_pod[input.rpc]) if input.pod == null

# Methods that pass whatever they say. They read counters and exit statuses; configure the network, which is the host's and which no
# container may trust; carry what a container prints, and standard input to a process that the policy names; stop and end what runs, as
# the host can by taking the processors away; set a clock on which no key, nonce or check depends; or start a container, whose mounts the
# gate compares with the policy. A method that is in none of the lists is denied.
unjudged := {
	"AddARPNeighbors", "Check", "CloseStdin", "GetGuestDetails", "GetIPTables", "GetMetrics", "GetOOMEvent", "ListInterfaces",
	"ListRoutes", "OnlineCPUMem", "PauseContainer", "ReadStderr", "ReadStdout", "RemoveStaleVirtiofsShareMounts", "ResumeContainer",
	"SetGuestDateTime", "SignalProcess", "StartContainer", "StatsContainer", "TtyWinResize", "UpdateInterface", "UpdateRoutes", "Version",
	"WaitProcess", "WriteStdin",
}

# Rules for every pod, and those for pods with and without a sealed_pod.
always := {
	"CopyFile": ["copy_share", "copy_path", "copy_kind", "copy_link"],
	"CreateSandbox": ["sandbox_storages", "guest_hooks", "kernel_modules", "pid_namespace"],
	"CreateContainer": [
		"spec", "container_id", "stdio_ports", "string_user", "hooks", "namespaces", "shared_mounts", "rootfs", "cgroup", "resources", "devices",
	],
	"ExecProcess": ["stdio_ports", "string_user"],
	"GetVolumeStats": ["volume_path"],
	"UpdateContainer": ["resources"],
	"UpdateEphemeralMounts": ["no_storages"],
}

sealed_pod := {
	"CopyFile": [],
	"CreateSandbox": [],
	"CreateContainer": [
		"container_type", "annotations", "container_declared", "container_live", "args", "image", "working_directory", "core_dumps",
		"device_nodes", "device_cgroup", "mount_paths", "volume_shadowed", "masked_paths", "volume_storage", "storages", "device_twice", "device_bound",
		"device_kind", "device_size", "storage_place", "volume_missing", "mounts", "mounts_missing", "capabilities", "seccomp", "labels",
		"id_mappings", "sysctl", "propagation", "pid_namespace",
	],
	"ExecProcess": ["exec_container", "exec", "working_directory", "core_dumps", "capabilities", "labels"],
	"GetVolumeStats": [],
	"UpdateContainer": [],
	"UpdateEphemeralMounts": [],
}

open_pod := {
	"CopyFile": [],
	"CreateSandbox": [],
	"CreateContainer": ["open_annotations", "open_device_nodes", "open_device_cgroup", "open_storages", "open_mounts"],
	"ExecProcess": [],
	"GetVolumeStats": [],
	"UpdateContainer": [],
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
	"copy_kind": "only files, folders and links are copied; the runtime must send no other kind",
	"copy_link": "the link would lead to {}, out of its folder; remove it from the pod's volume",
	"copy_path": "the path {} is not a clean one in Kata's share; the runtime must not change it",
	"copy_share": "files are not copied where the host serves the share; turn virtio-fs or 9p off for that",
	"core_dumps": "it sets the limit {}, which lets it leave its memory in a file or is not known; leave it out",
	"device_bound": "device {} is another volume's, or the volume has another one; plug each volume's own device in again",
	"device_cgroup": "it asks for access to devices; do not run it privileged",
	"device_kind": "device {} is not one plain disk that can be written; see that plugin and shim run on the node",
	"device_nodes": "device {} would reach it raw; name a volume of the policy for it, or remove it from the pod",
	"device_size": "device {} is smaller than the volume's size.min; lend a larger one",
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
	"labels": "SELinux label {} is not for sealed pods; set disable_guest_selinux to true in Kata's configuration",
	"masked_paths": "{} would be hidden or made read-only, and is not of the kernel's in /proc or /sys; the runtime must not change these lists",
	"mount_paths": "the mount at {} does not have a clean path; write paths without \"..\", \".\", \"//\" and a slash at the end",
	"mounts": "the mount at {} is neither a volume of the policy nor one that CRI gives every container; remove it from the pod",
	"mounts_missing": "{}, which CRI mounts into every container, is not there; the runtime must not leave it out",
	"namespaces": "it must have a mount namespace of its own and join none of the guest's; the runtime must not change them",
	"no_storages": "mounts of a running pod are not changed; remove memory volumes from the pod",
	"open_annotations": "annotation {} would inject devices; write a policy (sealed_pod) that names a volume for what it needs, or remove it",
	"open_device_cgroup": "it asks for access to block devices; do not run it privileged, or write a policy that names a volume",
	"open_device_nodes": "device {} would reach it raw; write a policy (sealed_pod) that names a volume for it",
	"open_mounts": "the mount at {} is not one that Kata makes without block storage; write a policy (sealed_pod) that names a volume for it",
	"open_storages": "storage {} is not one that Kata makes without block storage; write a policy (sealed_pod) that names a volume for it",
	"pid_namespace": "it would see the processes of other containers, and so their volumes; set its pid namespace to CONTAINER (shareProcessNamespace: false)",
	"propagation": "its mounts would propagate; use private mount propagation",
	"resources": "the limits name {}, which is no size, list of processors or class; the runtime must not change them",
	"rootfs": "its root file system {} is not where Kata puts it; use a file system shared by virtio-fs or 9p",
	"sandbox_storages": "storage {} is neither Kata's share nor its shared memory; remove it from Kata's configuration",
	"seccomp": "its seccomp profile does more than refuse system calls with EPERM or ENOSYS; use the runtime's default profile",
	"shared_mounts": "mounts shared between containers bypass the policy; remove them",
	"spec": "its specification has no process, root or linux section; the runtime must send a whole one",
	"stdio_ports": "standard I/O over ports of its own is not supported; set use_passfd_io to false in Kata's configuration",
	"storage_place": "the mount point {} is in use already; the runtime must give each storage its own",
	"storages": "storage {} is not a volume of the policy; name it in sealed_pod.volumes or remove it from the pod",
	"string_user": "users by name are not supported; use numbers",
	"sysctl": "sysctl {} is not on the list of safe ones; remove it from the pod",
	"volume_missing": "its volume {} is not there; ask for it in the pod and see that plugin and shim run on the node",
	"volume_path": "{} is not where a volume of the pod is; ask for the statistics of one that is mounted",
	"volume_shadowed": "another mount, at {}, lies on, above or below a volume; remove it from the pod",
	"volume_storage": "the mount of its volume {} is not made of one block device of its own; see that plugin and shim run on the node",
	"working_directory": "its working directory {} is not a clean path outside of /proc; correct the pod or the image",
}

# What the reason is about, worst first.
culprits.annotations := [k | some k, _ in spec.Annotations; not k in known_annotations]

culprits.args := [concat(" ", spec.Process.Args)]

culprits.capabilities := [c | some c in other_capabilities]

culprits.cgroup := [spec.Linux.CgroupsPath]

culprits.copy_link := [target | is_string(request.data); target := base64.decode(request.data)]

culprits.copy_path := [request.path]

culprits.core_dumps := [limit.Type | some limit in process.Rlimits; not limit_fine(limit)]

culprits.device_bound := [a.device | some a in attachments; not a in own_devices]

culprits.device_kind := [source | some source in sources - plain_devices]

culprits.device_nodes := [d.Path | some d in spec.Linux.Devices]

culprits.device_size := [a.device | some a in attachments; not a in large_devices]

culprits.device_twice := [s.source | some i, s in request.storages; some j, t in request.storages; i < j; s.source == t.source]

culprits.devices := [d.container_path | some d in request.devices]

culprits.exec := [concat(" ", request.process.Args)]

culprits.image := [spec.Annotations["io.kubernetes.cri.image-name"]]

culprits.labels := [label | some label in labels; label != ""]

culprits.masked_paths := [path | some path in masked; not maskable(path)]

culprits.mount_paths := [m.destination | some m in spec.Mounts; not clean(m.destination)]

culprits.mounts := [m.destination | some i, m in spec.Mounts; not i in fine_mounts]

culprits.mounts_missing := [path | some path in missing_mounts]

culprits.open_annotations := [k | some k, _ in spec.Annotations; startswith(k, injecting)]

culprits.open_device_nodes := [d.Path | some d in spec.Linux.Devices; not device_node_open(d)]

culprits.open_mounts := [m.destination | some i, m in spec.Mounts; not mount_open(i, m)]

culprits.open_storages := [storage_name(s) | some s in request.storages; not storage_open(s)]

culprits.resources := [word | some word in resource_words; not resource_word(word)]

culprits.rootfs := [spec.Root.Path]

culprits.sandbox_storages := [s.driver | some s in request.storages; not storage_sandbox(s)]

culprits.storage_place := [request.storages[a.storage].mount_point | some a in attachments; not a in own_places]

culprits.storages := [storage_name(s) | some s in request.storages; not s.mount_point in mounted_storages]

culprits.sysctl := [k | some k, _ in spec.Linux.Sysctl; not k in sysctls]

culprits.volume_missing := [concat(" at ", [v.volume, v.path]) | some v in volumes; not v.path in destinations]

culprits.volume_path := [request.volume_guest_path]

culprits.volume_shadowed := [m.destination | some m in spec.Mounts; not mount_clear([m.destination])]

culprits.volume_storage := [concat(" at ", [v.volume, v.path]) |
	some i in volume_mounts
	v := volume_at[spec.Mounts[i].destination]
	not i in sealed_mounts
]

culprits.working_directory := [process.Cwd]

# The driver, and where the container would see it.
storage_name(s) := concat(" at ", array.concat([s.driver], places)) if {
	places := [m.destination | some m in spec.Mounts; m.source == s.mount_point]
}

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

holds.container_type if {
	sandbox
	spec.Annotations["io.katacontainers.pkg.oci.container_type"] == "pod_sandbox"
}

holds.container_type if {
	workload
	spec.Annotations["io.katacontainers.pkg.oci.container_type"] == "pod_container"
}

# The agent knows a container by other keys too (CRI-O's, dockershim's) and injects devices for the keys of CDI. None of them may be
# there to disagree.
holds.annotations if count(spec.Annotations) == count(known_annotations)

known_annotations := {key |
	some key, _ in spec.Annotations
	strings.any_prefix_match(key, ["io.kubernetes.cri.", "io.katacontainers.", "io.containerd.", "nerdctl/"])
}

# Of CDI: the agent adds the devices that they name, by what the image's files say of them.
injecting := "cdi.k8s.io/"

holds.open_annotations if {
	every key, _ in spec.Annotations {
		not startswith(key, injecting)
	}
}

holds.container_declared if {
	workload
	container
}

holds.container_declared if {
	sandbox
	not spec.Annotations["io.kubernetes.cri.container-name"]
}

# The sandbox container is the first, and so one.
holds.container_live if {
	sandbox
	count(input.state.containers) == 0
}

holds.container_live if {
	workload
	every id, live in input.state.containers {
		id != request.container_id
		live != name
	}
}

# The container's first process has the container's id.
holds.container_id if {
	regex.match("^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$", request.container_id)
	request.exec_id == request.container_id
}

# --- What runs -------------------------------------------------------------------------------------------------------------------

holds.spec if {
	is_object(spec.Process)
	is_object(spec.Root)
	is_object(spec.Linux)
	spec.Solaris == null
	spec.Windows == null
}

# What pause images run: Kubernetes' and its mirrors', OpenShift's, one made of busybox.
holds.args if {
	sandbox
	spec.Process.Args in [["/pause"], ["/usr/bin/pod"]]
}

holds.args if {
	workload
	container.args == null
}

holds.args if {
	workload
	spec.Process.Args == container.args
}

holds.image if sandbox

holds.image if {
	workload
	container.image == ""
}

holds.image if {
	workload
	spec.Annotations["io.kubernetes.cri.image-name"] == container.image
}

holds.exec_container if {
	name != ""
	container
}

holds.exec if {
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
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

process := spec.Process if input.rpc == "CreateContainer"

process := request.process if input.rpc == "ExecProcess"

# Most of the lists are one and the same.
capability_lists := {list | some list in process.Capabilities}

other_capabilities := {c | some list in capability_lists; some c in list} - default_capabilities

holds.capabilities if {
	is_object(process.Capabilities)
	count(other_capabilities) == 0
}

holds.capabilities if {
	input.rpc == "ExecProcess"
	request.process.Capabilities == null
}

# Without SELinux in the guest a label stops the container, with it the label is what confines it.
labels := [process.SelinuxLabel, object.get(request, ["OCI", "Linux", "MountLabel"], "")]

holds.labels if labels == ["", ""]

# A container that crashes must not leave its memory in a file, which can be the host's.
holds.core_dumps if {
	is_object(process)
	every limit in process.Rlimits {
		limit_fine(limit)
	}
}

limit_fine(limit) if limit.Type in other_limits

limit_fine(limit) if {
	limit.Type == "RLIMIT_CORE"
	limit.Hard == "0"
	limit.Soft == "0"
}

other_limits := {
	"RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NICE",
	"RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_RSS", "RLIMIT_RTPRIO", "RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_STACK",
}

# A folder of /proc can be another process's root, or what the agent has open.
holds.working_directory if process.Cwd == "/"

holds.working_directory if {
	clean(process.Cwd)
	not startswith(concat("", [process.Cwd, "/"]), "/proc/")
}

# A profile may only refuse, in the words of the runtimes' own profiles, EPERM and ENOSYS. One that has system calls succeed without being
# made, by the errno 0, makes a program believe that its data is on the disk, and so do errors that programs pass over, such as fsync's
# EINVAL; others hand them to a process of the host's choice.
holds.seccomp if spec.Linux.Seccomp == null

holds.seccomp if {
	spec.Linux.Seccomp.DefaultAction in seccomp_actions
	spec.Linux.Seccomp.Flags == []
	every syscall in spec.Linux.Seccomp.Syscalls {
		syscall.Action in seccomp_actions
		object.get(syscall, "errnoret", 1) in {1, 38}
	}
}

seccomp_actions := {
	"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG",
}

holds.string_user if request.string_user == null

# runtime-rs can name ports for standard I/O, which an agent without the listener ignores.
holds.stdio_ports if {
	request.stdin_port == 0
	request.stdout_port == 0
	request.stderr_port == 0
}

# --- Where it runs ---------------------------------------------------------------------------------------------------------------

share := "/run/kata-containers/shared/containers/"

# Kata's Go runtime, and runtime-rs.
holds.rootfs if {
	some folder in ["", "passthrough/"]
	spec.Root.Path == concat("", [share, folder, request.container_id, "/rootfs"])
}

# The gate finds the container's processes by it. Paths are "/a/b/id" or, for systemd, "slice:prefix:id".
holds.cgroup if {
	parts := split(replace(spec.Linux.CgroupsPath, ":", "/"), "/")
	parts[count(parts) - 1] == request.container_id
	count(parts) > 1
	not ".." in parts
}

# Limits are the host's. Some have a text of which the agent makes the name of a file, or its content.
resources := spec.Linux.Resources if input.rpc == "CreateContainer"

resources := request.resources if input.rpc == "UpdateContainer"

resource_words := array.concat(
	[limit.Pagesize | some limit in resources.HugepageLimits],
	[word | some word in [resources.CPU.Cpus, resources.CPU.Mems]; word != ""],
)

resource_word(word) if regex.match("^([0-9]{1,4}[KMG]B|[0-9]{1,4}([-,][0-9]{1,4})*)$", word)

holds.resources if {
	input.rpc == "CreateContainer"
	is_object(spec.Linux)
	spec.Linux.IntelRdt == null
	resource_words_fine
}

holds.resources if {
	input.rpc == "UpdateContainer"
	is_object(request)
	resource_words_fine
}

resource_words_fine if {
	every word in resource_words {
		resource_word(word)
	}
}

# In a sandbox that shares the process namespace a container reads another one's files through /proc/PID/root.
holds.pid_namespace if request.sandbox_pidns == false

holds.hooks if spec.Hooks == null

# runtime-rs sends an object with empty lists.
holds.hooks if {
	is_object(spec.Hooks)
	every _, hooks in spec.Hooks {
		count(hooks) == 0
	}
}

holds.guest_hooks if request.guest_hook_path == ""

holds.kernel_modules if request.kernel_modules == []

holds.shared_mounts if request.shared_mounts == []

# A path would join a namespace of the guest; without a mount namespace the container runs in the guest's root.
holds.namespaces if {
	types := [namespace_types[ns.Type] | some ns in spec.Linux.Namespaces; ns.Path == ""]
	count(types) == count(spec.Linux.Namespaces)
	count(types) == count({type | some type in types})
	"mount" in types
}

# Kata's Go runtime drops pid, network and cgroup; runtime-rs keeps cgroup and says mnt.
namespace_types := {"mount": "mount", "mnt": "mount", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "user": "user"}

holds.id_mappings if {
	spec.Linux.UIDMappings == []
	spec.Linux.GIDMappings == []
	not "user" in {ns.Type | some ns in spec.Linux.Namespaces}
}

# Kubernetes' safe set, and what containerd sets for every pod.
sysctls := {
	"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.ip_unprivileged_port_start",
	"net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes",
	"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem",
}

holds.sysctl if {
	every key, _ in spec.Linux.Sysctl {
		key in sysctls
	}
}

holds.propagation if spec.Linux.RootfsPropagation in ["", "private", "rprivate"]

# --- Devices ---------------------------------------------------------------------------------------------------------------------

holds.devices if request.devices == []

holds.device_nodes if spec.Linux.Devices == []

holds.device_cgroup if spec.Linux.Resources.Devices == []

holds.device_cgroup if {
	is_object(spec.Linux)
	spec.Linux.Resources == null
}

# Character major 21 is SCSI generic: block storage by another name.
device_node_open(d) if {
	d.Type in ["c", "u", "p"]
	not d.Major in [21, "21"]
}

holds.open_device_nodes if {
	every d in spec.Linux.Devices {
		device_node_open(d)
	}
}

holds.open_device_cgroup if {
	every d in spec.Linux.Resources.Devices {
		device_cgroup_open(d)
	}
}

holds.open_device_cgroup if {
	is_object(spec.Linux)
	spec.Linux.Resources == null
}

device_cgroup_open(d) if d.Allow == false

device_cgroup_open(d) if d.Type == "c"

# --- Mounts ----------------------------------------------------------------------------------------------------------------------

# What containerd's CRI mounts into every container: type, source, options that must be there and that may be. Those that are always
# there must be: without /dev, say, the root file system's own would be the container's source of randomness.
fixed_mounts := {
	"/proc": {"type": "proc", "source": "proc", "always": true, "must": {"nosuid", "noexec", "nodev"}, "may": set()},
	"/dev": {
		"type": "tmpfs", "source": "tmpfs", "always": true, "must": {"nosuid"},
		"may": {"noexec", "strictatime", "mode=755", "size=65536k"},
	},
	"/dev/pts": {
		"type": "devpts", "source": "devpts", "always": true, "must": {"nosuid", "noexec", "newinstance"},
		"may": {"ptmxmode=0666", "mode=0620", "gid=5"},
	},
	"/dev/mqueue": {"type": "mqueue", "source": "mqueue", "always": true, "must": {"nosuid", "noexec", "nodev"}, "may": set()},
	"/sys": {"type": "sysfs", "source": "sysfs", "always": true, "must": {"nosuid", "noexec", "nodev", "ro"}, "may": set()},
	"/sys/fs/cgroup": {
		"type": "cgroup", "source": "cgroup", "always": false, "must": {"nosuid", "noexec", "nodev", "ro"},
		"may": {"relatime", "nsdelegate", "memory_recursiveprot"},
	},
}

# Files of the node that kubelet and containerd bind into every container, through the share.
host_files := {
	"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log", "/var/run/secrets/kubernetes.io/serviceaccount",
}

bind_options := {"bind", "rbind", "private", "rprivate", "ro", "rro", "rw", "nosuid", "nodev", "noexec", "noatime", "relatime"}

# The mounts that only bind, by index.
binds := {i |
	some i, m in spec.Mounts
	m.type == "bind"
	options := {o | some o in m.options}
	options & {"bind", "rbind"} != set()
	options - bind_options == set()
}

# The mounts that may be there, by index: volumes, and CRI's.
fine_mounts contains i if some i in sealed_mounts

fine_mounts contains i if some i in shm_mounts

fine_mounts contains i if {
	some i, m in spec.Mounts
	fixed := fixed_mounts[m.destination]
	m.type == fixed.type
	m.source == fixed.source
	options := {o | some o in m.options}
	fixed.must - options == set()
	(options - fixed.must) - fixed.may == set()
}

# A file of the share itself, not a path into it: a link further down would be the host's choice.
fine_mounts contains i if {
	some i in binds
	m := spec.Mounts[i]
	m.destination in host_files
	regex.match(`^/run/kata-containers/shared/containers/(passthrough/)?[A-Za-z0-9][^/\x00]*$`, m.source)
}

# The pod's shared memory, which CreateSandbox made.
shm_mounts := {i |
	some i in binds
	m := spec.Mounts[i]
	m.destination == "/dev/shm"
	m.source == "/run/kata-containers/sandbox/shm"
}

holds.mounts if {
	count(spec.Mounts) == count(fine_mounts)
	count(spec.Mounts) == count(destinations)
}

destinations := {m.destination | some m in spec.Mounts}

missing_mounts := {path | some path, fixed in fixed_mounts; fixed.always} - destinations

holds.mounts_missing if missing_mounts == set()

# Only where every path is clean do two texts name one place when they are equal, and one above the other when they begin alike. All are
# looked at in one text, a line each; one with a newline in it is two lines, of which each must be clean.
holds.mount_paths if {
	is_array(spec.Mounts)
	text := concat("\n", destinations)
	regex.match(`^(/[^/\x00\n]+)+(\n(/[^/\x00\n]+)+)*$`, text)
	not regex.match(`/\.\.?([/\n]|$)`, text)
}

# path is absolute, not the root, and has no empty component, "." or "..", nor a NUL, where the kernel would end it.
clean(path) if {
	regex.match(`^(/[^/\x00]+)+$`, path)
	not regex.match(`/\.\.?(/|$)`, path)
}

# path is prefix and more, in clean components. prefix ends in "/".
below(path, prefix) if {
	startswith(path, prefix)
	clean(concat("", ["/", trim_prefix(path, prefix)]))
}

below_any(path, prefixes) if {
	some prefix in prefixes
	below(path, prefix)
}

# The paths at which the agent hides what is there, or makes it read-only, after the mounts.
masked := array.concat(spec.Linux.MaskedPaths, spec.Linux.ReadonlyPaths)

holds.masked_paths if {
	every path in masked {
		maskable(path)
	}
}

# Through the folder of a process lies all that it sees (/proc/self/root/…).
maskable(path) if {
	below_any(path, ["/proc/", "/sys/"])
	not regex.match(`^/proc/(self|thread-self|[0-9]+)(/|$)`, path)
}

# --- Volumes ---------------------------------------------------------------------------------------------------------------------

# The volumes of this container, each with its path.
volumes := [{"volume": v, "path": m.path, "read_only": m.read_only} |
	workload
	some v, volume in input.pod.volumes
	some m in volume.mounts
	m.container == name
]

volume_at := {v.path: v | some v in volumes}

holds.volume_missing if object.keys(volume_at) - destinations == set()

# The container's mounts that are at a volume's path.
volume_mounts := [i | some i, m in spec.Mounts; volume_at[m.destination]]

# No other mount on, above or below a volume's path, wherever in the list it stands.
holds.volume_shadowed if {
	count(volume_mounts) == count({spec.Mounts[i].destination | some i in volume_mounts})
	mount_clear(destinations)
	is_array(spec.Mounts)
}

# None of the clean paths is below a volume's, or above it.
mount_clear(paths) if {
	volume_paths := object.keys(volume_at)
	not strings.any_prefix_match(paths, {concat("", [path, "/"]) | some path in volume_paths})
	not strings.any_prefix_match(volume_paths, {concat("", [path, "/"]) | some path in paths})
}

# Those that are as they must be: a bind of exactly one storage. Which options it has is the policy's to say; the gate writes them.
sealed_mounts := {i |
	some i in volume_mounts
	i in binds
	m := spec.Mounts[i]
	s := request.storages[storage_at[m.source]]
	storage_device(s)
	storage_group(s, input.pod.volumes[volume_at[m.destination].volume])
}

mount_points := {s.mount_point | some s in request.storages}

# The storages by mount point, as long as each has its own.
default storage_at := {}

storage_at := {s.mount_point: i | some i, s in request.storages} if {
	count(request.storages) == count(mount_points)
}

holds.volume_storage if {
	is_array(spec.Mounts)
	count(sealed_mounts) == count(volume_mounts)
}

# A disk by its driver and address, with nothing that the agent would do with it but what a volume of the policy gets anyway. Its file system
# and options are the host's words: the gate drops the storage and goes by the policy.
storage_device(s) if {
	regex.match(disk_sources[s.driver], s.source)
	below(s.mount_point, "/run/kata-containers/")
	s.driver_options in sealing_options
}

# None, or those by which Kata 4.0 and 4.1 ask the agent for a fresh key and a new file system: for each emptyDir with emptydir_mode =
# "block-encrypted", and for a direct volume with encryptionKey and createFilesystem among its metadata. Both runtimes write them in this order.
sealing_options := {[], ["encryption_key=ephemeral", "create_filesystem"]}

# The group of the emptyDir's folder, which Kata 4.x passes on, is the policy's. Which files it gets is the policy's to say.
storage_group(s, _) if s.fs_group == null

storage_group(s, volume) if s.fs_group.group_id == volume.fs_group.gid

# As guest/internal/device reads them. No form is that of two drivers, and a place has one form, so that the source alone tells disks apart.
disk_sources := {
	"blk": "^[01][0-9a-f](/[01][0-9a-f]){0,7}$",
	"scsi": "^(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9]):(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])$",
	"mmioblk": "^/dev/vd[a-z]{1,3}$",
}

# Where storages have a mount point in common, none is mounted (storage_at).
mounted_storages := {spec.Mounts[i].source | some i in sealed_mounts}

holds.storages if {
	mount_points - mounted_storages == set()
	count(request.storages) == count(attachments)
}

holds.device_twice if {
	count(request.storages) == count(sources)
	count(request.storages) == count(mount_points)
}

attachments := [{"volume": v.volume, "mount": i, "storage": s, "device": request.storages[s].source, "read_only": v.read_only} |
	some i in volume_mounts
	m := spec.Mounts[i]
	v := volume_at[m.destination]
	s := storage_at[m.source]
]

# --- What is already there ----------------------------------------------------------------------------------------------------------

sources := {s.source | some s in request.storages}

# One device for a volume and one volume for a device, for the life of the sandbox. A volume that nobody has may come back elsewhere: the
# guest opens it only if the device holds what it was closed with.
holds.device_bound if count(own_devices) == count(attachments)

own_devices contains a if {
	some a in attachments
	input.state.volumes[a.volume] == a.device
}

own_devices contains a if {
	some a in attachments
	not input.state.volumes[a.volume]
	not a.device in bound_devices
}

bound_devices := {source | some source in input.state.volumes}

# A device that the guest does not see yet is judged when it comes, by the same data: guest/internal/volume waits for it.
holds.device_kind if sources - plain_devices == set()

plain_devices contains source if {
	some source in sources
	not input.state.devices[source]
}

plain_devices contains source if {
	some source in sources
	input.state.devices[source].plain == true
	input.state.devices[source].read_only == false
}

holds.device_size if count(large_devices) == count(attachments)

large_devices contains a if {
	some a in attachments
	not input.state.devices[a.device]
}

large_devices contains a if {
	some a in attachments
	input.state.devices[a.device].bytes >= input.pod.volumes[a.volume].size.min
}

# The agent takes a storage whose mount point it knows for one that is mounted, and does not look at it. Ours never reach it; that the
# host cannot use a mount point to name what is there already is for those who look at both.
holds.storage_place if count(own_places) == count(attachments)

own_places contains a if {
	taken := taken_places
	some a in attachments
	s := request.storages[a.storage]
	object.get(input.state.paths, s.mount_point, a.volume) == a.volume
	not s.mount_point in taken
}

taken_places := {spec.Root.Path, trim_right(share, "/"), "/run/kata-containers/sandbox/shm"}

# The path by which the host knows a volume, from a container that has it.
holds.volume_path if input.state.paths[request.volume_guest_path]

# --- Files ---------------------------------------------------------------------------------------------------------------------------

# Kata copies where it shares no file system. Where the host serves the share, it could put a link into the agent's way after any check.
holds.copy_share if input.state.shared == false

holds.copy_path if below(request.path, share)

file_kind := bits.and(request.file_mode, 61440)

# File, folder, link.
holds.copy_kind if file_kind in {32768, 16384, 40960}

holds.copy_link if file_kind != 40960

# What Kubernetes makes of secrets and config maps: key → ..data/key, ..data → ..2026_11_24.
holds.copy_link if {
	is_string(request.data)
	below(base64.decode(request.data), "")
}

# --- Pods without sealed_pod: what Kata makes, but for block storage -------------------------------------------------------------

mount_open(_, m) if {
	m.type in ["proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "tmpfs"]
	not "bind" in m.options
	not "rbind" in m.options
}

# Kata leaves the type of an emptyDir's mount at local.
mount_open(_, m) if {
	m.type in ["bind", "local"]
	some prefix in [share, "/run/kata-containers/sandbox/ephemeral/"]
	below(m.source, prefix)
}

mount_open(i, _) if i in shm_mounts

# Kata passes binds of the node's /sys on as they are; they show the guest's.
mount_open(_, m) if {
	m.type == "bind"
	m.source == "/sys"
}

mount_open(_, m) if {
	m.type == "bind"
	below(m.source, "/sys/")
}

holds.open_mounts if {
	every i, m in spec.Mounts {
		mount_open(i, m)
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

holds.open_storages if {
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
	s.driver_options == []
	s.fs_group == null
	every options in s.options {
		every option in split(options, ",") {
			regex.match(pattern, option)
		}
	}
}

holds.sandbox_storages if {
	every s in request.storages {
		storage_sandbox(s)
	}
	count(request.storages) == count(mount_points)
}

holds.no_storages if request.storages == []
