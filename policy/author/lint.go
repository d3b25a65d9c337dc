package author

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/sealvol/sealvol/policy"
)

// Finding is something in a policy that its author may not have meant.
type Finding struct {
	// Rule is the finding's name, Subject the volume or container.
	Rule, Subject string
	// Text says what is so, and what to do.
	Text string
	// Note says that it cannot be otherwise yet.
	Note bool
}

// maxSize is a size of a volume, in bytes, that nobody means.
const maxSize = 64 << 40

var shells = []string{"sh", "bash", "ash", "dash", "zsh", "ksh", "busybox", "env", "python", "python3", "perl", "node", "ruby"}

// Lint finds what a policy leaves open.
func Lint(p *policy.Policy) []Finding {
	if !p.Sealed() {
		return []Finding{{Rule: "no-sealed-pod", Subject: "policy", Text: "has no sealed_pod, so any container runs and no volume is sealed; write one with sealvol policy -f"}}
	}
	var findings []Finding
	add := func(rule, subject, format string, args ...any) {
		findings = append(findings, Finding{Rule: rule, Subject: subject, Text: fmt.Sprintf(format, args...)})
	}
	containers, volumes := p.Containers(), p.Volumes()
	for _, name := range slices.Sorted(maps.Keys(containers)) {
		c := containers[name]
		subject := "container " + name
		lintContainer(add, subject, c)
		if c.RootFS == policy.HostRootFS {
			findings = append(findings, Finding{Rule: "rootfs-host", Subject: subject, Note: true,
				Text: "its programs come from the host, which can change them; only the disk is protected"})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(volumes)) {
		lintVolume(add, "volume "+name, volumes[name])
	}
	return findings
}

func lintContainer(add func(rule, subject, format string, args ...any), subject string, c policy.Container) {
	if c.Args == nil {
		add("args-open", subject, "any arguments are allowed; write the command in the pod, or give --image-config")
	}
	switch {
	case c.Image == "":
		add("image-open", subject, "any image is allowed; name it")
	case !strings.Contains(c.Image, "@"):
		add("image-by-name", subject, "image %s is named by a tag, which its registry can move; name it by digest", c.Image)
	}
	for _, argv := range c.Exec {
		if argv[len(argv)-1] != "..." {
			continue
		}
		if len(argv) == 1 || slices.Contains(shells, path.Base(argv[0])) {
			add("exec-open", subject, "%s may be executed with any arguments, which is anything, by whoever may call exec, the host included; list whole commands", words(argv[:len(argv)-1]))
		}
	}
}

func lintVolume(add func(rule, subject, format string, args ...any), subject string, v policy.Volume) {
	if v.Size.Min == 0 {
		add("size-min", subject, "a device of any size, however small, is accepted; give size.min what the claim requests")
	}
	if v.Size.Max > maxSize {
		add("size-open", subject, "size.max is %s, which bounds nothing; give it what the claim requests", inUnits(v.Size.Max))
	} else if v.Layering == policy.MemoryTags && v.MaxTagMemory == 0 && tagMemory(v.Size.Max) > 1<<30 {
		add("tag-memory", subject, "its tags can take up to %s of the guest's memory; set max_tag_memory, or give the guest that much", inUnits(tagMemory(v.Size.Max)))
	}
	if v.Layering == policy.LUKS2 {
		add("layering", subject, "luks2 does not notice a disk that was rolled back; use memory-tags")
	} else if slices.Contains(v.Suites, policy.AESXTSPlain64HMACSHA256) {
		add("suite", subject, "%s shows the host which parts of a block a rewrite changed; remove it", policy.AESXTSPlain64HMACSHA256)
	}
	for _, option := range []policy.Option{policy.NoSUID, policy.NoDev} {
		if !slices.Contains(v.Options, option) {
			add("options", subject, "%s is allowed on it, which data seldom needs; remove the option", strings.TrimPrefix(string(option), "no"))
		}
	}
}
