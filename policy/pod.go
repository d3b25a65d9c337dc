package policy

// The values of sealed_pod. Load makes them; what Load has not refused is one of the constants below and keeps the bounds it states.

// Mode says how long a volume lives.
type Mode string

// Ephemeral volumes live as long as their pod.
const Ephemeral Mode = "ephemeral"

// Layering says where a volume's integrity tags and key material are.
type Layering string

const (
	// MemoryTags keeps the tags in guest memory; the disk holds ciphertext alone.
	MemoryTags Layering = "memory-tags"
	// LUKS2 is cryptsetup's on-disk format with its header in guest memory.
	LUKS2 Layering = "luks2"
)

// Suite is a cipher with its integrity, as the policy spells it.
type Suite string

const (
	// AEGIS128Random is AEGIS-128 with a random nonce for each write.
	AEGIS128Random Suite = "aegis128-random"
	// AESXTSRandomHMACSHA256 is AES-XTS with a random IV for each write and HMAC-SHA256 cut to 16 bytes.
	AESXTSRandomHMACSHA256 Suite = "aes-xts-random+hmac-sha256"
	// AESXTSPlain64HMACSHA256 is AES-XTS with the sector number as IV and HMAC-SHA256. It shows the host which 16-byte units of a
	// block a rewrite changed, so it is used only by those who ask, and by LUKS2, which knows no other.
	AESXTSPlain64HMACSHA256 Suite = "aes-xts-plain64+hmac-sha256"
)

// FSType is the file system that the guest makes on a volume.
type FSType string

// The file systems that a volume may have.
const (
	Ext4 FSType = "ext4"
	XFS  FSType = "xfs"
)

// Option is a mount option of a volume.
type Option string

// The options that a volume may have. The policy may also say "suid" and "dev", which take NoSUID and NoDev away.
const (
	NoSUID      Option = "nosuid"
	NoDev       Option = "nodev"
	NoExec      Option = "noexec"
	NoATime     Option = "noatime"
	RelATime    Option = "relatime"
	StrictATime Option = "strictatime"
	NoDirATime  Option = "nodiratime"
	LazyTime    Option = "lazytime"
	Sync        Option = "sync"
	DirSync     Option = "dirsync"
)

// ChangePolicy says when a volume that is mounted gets its group, as Kubernetes' fsGroupChangePolicy does.
type ChangePolicy string

const (
	// OnRootMismatch looks at the root folder alone, and changes everything when that has not the group.
	OnRootMismatch ChangePolicy = "OnRootMismatch"
	// Always changes everything each time that the volume is mounted.
	Always ChangePolicy = "Always"
)

// FSGroup is the group that owns everything on a volume, as Kubernetes' fsGroup.
type FSGroup struct {
	GID          uint32       `json:"gid"` // not 0
	ChangePolicy ChangePolicy `json:"change_policy"`
}

// RootFS says where a container's root file system comes from.
type RootFS string

// HostRootFS is a root file system that the host serves and so can read and change.
const HostRootFS RootFS = "host"

// BlockSize is the unit of a volume's size, in bytes: the sealed sector.
const BlockSize = 4096

// Size bounds a volume, in bytes.
type Size struct {
	Min uint64 `json:"min"` // a smaller device is refused
	Max uint64 `json:"max"` // what lies beyond is not used; a positive multiple of BlockSize, at least Min, less than 2^63
}

// Mount is a place where a container sees a volume.
type Mount struct {
	Container string `json:"container"` // a key of sealed_pod.containers
	Path      string `json:"path"`      // absolute, clean and printable; clear of what every container has mounted
	ReadOnly  bool   `json:"read_only"`
}

// Volume is one entry of sealed_pod.volumes.
type Volume struct {
	Mode     Mode     `json:"mode"`
	Layering Layering `json:"layering"`
	Suites   []Suite  `json:"suites"` // best first, at least one, none twice, all known to the layering
	FSType   FSType   `json:"fs_type"`
	Options  []Option `json:"options"` // those in force: NoSUID and NoDev are here unless the policy took them away
	Size     Size     `json:"size"`
	// FSGroup is nil where the policy leaves files to whoever makes them.
	FSGroup *FSGroup `json:"fs_group,omitempty"`
	// MaxTagMemory bounds the guest memory that the tags of MemoryTags may take, in bytes; 0: what the size comes to.
	MaxTagMemory uint64 `json:"max_tag_memory,omitempty"`
	// PreallocateTags takes the memory of all tags when the volume is made, where it is missed at once, and not as blocks are written.
	PreallocateTags bool    `json:"preallocate_tags,omitempty"`
	Mounts          []Mount `json:"mounts"` // at least one, one for a container; no two volumes of a container lie on or below each other
}

// Container is one entry of sealed_pod.containers.
type Container struct {
	Args   []string   `json:"args"`  // exact; nil: any
	Image  string     `json:"image"` // exact, as containerd's annotation gives it; "": any
	Exec   [][]string `json:"exec"`  // argv that may be executed; a last "..." stands for any rest
	RootFS RootFS     `json:"rootfs"`
}

// pod is sealed_pod, and the form in which the framework sees it.
type pod struct {
	Containers map[string]Container `json:"containers"`
	Volumes    map[string]Volume    `json:"volumes"`
}
