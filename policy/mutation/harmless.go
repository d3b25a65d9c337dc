package mutation

import (
	"regexp"
	"strconv"
	"strings"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// A HarmlessChange is a kind of change to a permitted CreateContainer that may be permitted too.
type HarmlessChange struct {
	name, reason string
	pattern      *regexp.Regexp
}

func (h HarmlessChange) String() string { return h.name + ": " + h.reason }

// Matches says whether a mutation of a CreateContainer is one of these.
func (h HarmlessChange) Matches(m Mutation) bool { return h.pattern.MatchString(byDestination(m)) }

// Harmless are the changes to a permitted CreateContainer that may be permitted too, each with the reason. Which they are in a case is the
// policy's to say; every other change is denied.
func Harmless() []HarmlessChange {
	list := []HarmlessChange{
		{name: `storages\[\d+\]\.(fstype|options).*`, reason: "the gate drops the storage: file system and options come from the policy"},
		{name: `storages\[\d+\]\.source = "0[23]/0[0-9]"`, reason: "the host lends what disk it likes, and it is sealed; a volume that has one keeps it (device_bound)"},
		{name: `storages\[\d+\] swap with the next`, reason: "mounts find their storages by mount point, not by place"},
		{name: `OCI\.Mounts\[.*\] swap with the next`, reason: "no volume lies on, above or below another mount, so the order hides nothing of one; CRI's own mounts hide only CRI's own"},
		{name: `OCI\.Mounts\[/mnt/[a-z]+\]\.options.*`, reason: "the gate writes a volume's options, from the policy"},
		{name: `OCI\.Mounts\[/sys/fs/cgroup\] drop`, reason: "it shows limits; without it the container sees less"},
		{name: `OCI\.Mounts\[/dev/shm\] drop`, reason: "then it is a folder of the container's own /dev"},
		{name: `OCI\.Mounts\[/etc/(hosts|hostname|resolv.conf)\] drop`, reason: "they are the host's files; without them it is the root file system's"},
		{name: `OCI\.Mounts\[/etc/(hosts|hostname|resolv.conf)\]\.source .*`, reason: "they are the host's files, under whatever name in the share, and nothing but files of the share"},
		{name: `OCI\.Mounts\[.*\]\.options(\[\d+\])? (double|swap with the next)`, reason: "options are a set"},
		{name: `OCI\.Mounts\[(/dev|/dev/pts|/sys/fs/cgroup)\]\.options\[\d+\] drop`, reason: "what must be there is; a size, a mode and when access times are written are no protection"},
		{name: `OCI\.Mounts\[(/etc/[a-z.]+|/dev/shm)\]\.options(\[\d+\])? (drop|= "(bind|private)"|add "bind")`, reason: "any way to bind that does not propagate is as good"},
		{name: `OCI\.Process\.Env.*`, reason: "the environment is the host's choice (SECURITY.md)"},
		{name: `OCI\.Process\.User.*`, reason: "the user is the host's choice (SECURITY.md); it has CRI's default capabilities at most"},
		{name: `OCI\.Process\.Cwd .*`, reason: "the working directory is the host's choice (SECURITY.md), inside of the container"},
		{name: `OCI\.Process\.(Terminal|ConsoleSize) .*`, reason: "how a terminal looks"},
		{name: `OCI\.Process\.NoNewPrivileges .*`, reason: "the bounding set holds either way"},
		{name: `OCI\.Process\.ApparmorProfile .*`, reason: "containerd sets it for the node; Kata's guests have no AppArmor"},
		{name: `OCI\.Process\.OOMScoreAdj .*`, reason: "which process dies first: refusing service is the host's right"},
		{name: `OCI\.Process\.Capabilities\.[A-Za-z]+.* (drop|drop all|double|swap with the next)`, reason: "less, or the same set, of CRI's default"},
		{name: `OCI\.Root\.Readonly .*`, reason: "the root file system is the host's"},
		{name: `OCI\.(Version|Hostname) .*`, reason: "names that decide nothing"},
		{name: `OCI\.Hooks = \{\}`, reason: "no hook"},
		{name: `OCI\.Annotations\["io\.kubernetes\.cri\.(sandbox-|podsandbox\.|x).*`, reason: "what CRI says about itself; the agent reads none of it"},
		{name: `OCI\.Annotations\["nerdctl/.*`, reason: "what containerd says about itself; the agent reads none of it"},
		{name: `OCI\.Annotations\["io\.kubernetes\.cri\.image-name"\] .*`, reason: "of a container whose image the policy does not pin, or the sandbox container, whose program is /pause"},
		{name: `OCI\.Annotations\["io\.katacontainers\.pkg\.oci\.bundle_path"\] .*`, reason: "a path of the host; the agent makes its own"},
		{name: `OCI\.Process\.Args.*`, reason: "of a container whose arguments the policy does not pin, which the guest logs"},
		{name: `OCI\.Linux\.Resources.*`, reason: "limits are the host's, and refusing service its right; what of them becomes a file's name or text is checked"},
		{name: `OCI\.Linux\.CgroupsPath .*`, reason: "where the limits are; it ends in the container's id, by which the gate finds it, and does not climb"},
		{name: `OCI\.Linux\.Namespaces\[\d+\] (swap with the next|drop)`, reason: "ipc and uts are the pod's to share (SECURITY.md); its own mount namespace is required"},
		{name: `OCI\.Linux\.(MaskedPaths|ReadonlyPaths).*`, reason: "paths below /proc and /sys alone; the gate adds those that CRI has"},
	}
	for i := range list {
		list[i].pattern = regexp.MustCompile(`^(` + list[i].name + `)$`)
	}
	return list
}

// byDestination is a mutation's name with a mount's destination in place of its index.
func byDestination(m Mutation) string {
	name := m.String()
	if request, ok := m.original.(*agent.CreateContainerRequest); ok {
		for i, mount := range request.GetOCI().GetMounts() {
			if rest, ok := strings.CutPrefix(name, "OCI.Mounts["+strconv.Itoa(i)+"]"); ok {
				return "OCI.Mounts[" + mount.Destination + "]" + rest
			}
		}
	}
	return strings.ReplaceAll(name, "\n", `\n`)
}
