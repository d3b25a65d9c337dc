package author

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/policy"
)

var (
	regoText   = regexp.MustCompile(`(?m)^package[ \t]+agent_policy\b`)
	base64Text = regexp.MustCompile(`^[A-Za-z0-9+/\r\n]+=*\s*$`)
)

// Policies finds the policies in a text: a manifest with annotations, the value of one annotation, or Rego. There is at least one.
func Policies(text []byte) ([]Pod, error) {
	if regoText.Match(text) {
		return []Pod{{Name: "policy", Policy: text}}, nil
	}
	if base64Text.Match(text) {
		there, err := existing(map[string]string{Annotation: strings.Join(strings.Fields(string(text)), "")})
		return []Pod{{Name: "policy", Policy: []byte(there)}}, err
	}
	documents, err := parse(text)
	if err != nil {
		return nil, err
	}
	var pods []Pod
	for _, d := range documents {
		objects, err := d.objects()
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			if o.template == nil {
				continue
			}
			value, ok := d.at(o.template.with("metadata", "annotations", Annotation)).(string)
			if !ok {
				continue
			}
			there, err := existing(map[string]string{Annotation: value})
			if err != nil {
				return nil, fmt.Errorf("%s: %w", o.name(), err)
			}
			pods = append(pods, Pod{Name: o.name(), Policy: []byte(there)})
		}
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("no pod here has a policy; write one with sealvol policy -f: %w", errdefs.ErrNotFound)
	}
	return pods, nil
}

// Explain says in words what a policy allows.
func Explain(p *policy.Policy) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("sha256 %s", p.Digest())
	if !p.Sealed() {
		line("has no sealed_pod: any container runs, without sealed volumes, and no block storage reaches one")
		return b.String()
	}
	volumes, containers := p.Volumes(), p.Containers()
	for _, name := range slices.Sorted(maps.Keys(volumes)) {
		line("")
		explainVolume(line, name, volumes[name])
	}
	for _, name := range slices.Sorted(maps.Keys(containers)) {
		line("")
		explainContainer(line, name, containers[name])
	}
	line("\nNo other container runs in the guest.")
	return b.String()
}

func explainVolume(line func(string, ...any), name string, v policy.Volume) {
	line("volume %s", name)
	if v.Size.Min == 0 {
		line("  size       at most %s, of a device of any size", inUnits(v.Size.Max))
	} else {
		line("  size       at most %s, of a device of at least %s", inUnits(v.Size.Max), inUnits(v.Size.Min))
	}
	line("  life       made empty with a fresh key for each pod, and gone with it")
	switch v.Layering {
	case policy.MemoryTags:
		line("  sealed by  memory-tags: the host cannot read it, nor change, move or roll back a block unnoticed")
	case policy.LUKS2:
		line("  sealed by  luks2: the host cannot read it nor change a block unnoticed, but can roll blocks back to what they were")
	}
	line("  cipher     %s", strings.Join(suiteNames(v.Suites), ", else ")+", else none: the pod does not start")
	mounted := string(v.FSType)
	for _, o := range v.Options {
		mounted += ", " + string(o)
	}
	line("  mounted    %s", mounted)
	if v.FSGroup != nil {
		when := "each time that it is mounted"
		if v.FSGroup.ChangePolicy == policy.OnRootMismatch {
			when = "when its root folder has another"
		}
		line("  group      %d, given to all files %s", v.FSGroup.GID, when)
	}
	if v.Layering == policy.MemoryTags {
		most := v.MaxTagMemory
		if most == 0 {
			most = tagMemory(v.Size.Max)
		}
		line("  memory     at most %s of the guest's for its tags", inUnits(most))
	}
	for _, m := range v.Mounts {
		access := "read and write"
		if m.ReadOnly {
			access = "read only"
		}
		line("  seen by    %s at %s, %s", m.Container, m.Path, access)
	}
}

func explainContainer(line func(string, ...any), name string, c policy.Container) {
	line("container %s", name)
	if c.Args == nil {
		line("  runs       anything")
	} else {
		line("  runs       exactly %s", words(c.Args))
	}
	if c.Image == "" {
		line("  image      any")
	} else {
		line("  image      %s", c.Image)
	}
	if len(c.Exec) == 0 {
		line("  exec       nothing may be executed in it besides")
	}
	for _, argv := range c.Exec {
		if last := len(argv) - 1; argv[last] == "..." {
			line("  exec       %s with any arguments", words(argv[:last]))
		} else {
			line("  exec       exactly %s", words(argv))
		}
	}
	if c.RootFS == policy.HostRootFS {
		line("  programs   from the host, which can read and change them: only the volumes' disks are protected")
	}
}

// tagMemory is the most guest memory that the tags of a volume can take, in bytes: 1/128 of its size.
func tagMemory(size uint64) uint64 { return size / 128 }

func suiteNames(suites []policy.Suite) []string {
	names := make([]string, len(suites))
	for i, s := range suites {
		names[i] = string(s)
	}
	return names
}

// words are a command's arguments, such that no two commands look the same.
func words(argv []string) string {
	if len(argv) == 0 {
		return "any command"
	}
	quoted := make([]string, len(argv))
	for i, w := range argv {
		quoted[i] = w
		if strings.ContainsFunc(w, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune("\"'\\`$*?[]{}()<>|&;#!~", r) }) || w == "" {
			b, _ := json.Marshal(w) // of a string
			quoted[i] = string(b)
		}
	}
	return strings.Join(quoted, " ")
}

// inUnits is a number of bytes in the largest unit that gives a whole number.
func inUnits(n uint64) string {
	if n == 1 {
		return "1 byte"
	}
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for ; n > 0 && n%1024 == 0 && i < len(units)-1; i++ {
		n /= 1024
	}
	return fmt.Sprintf("%d %s", n, units[i])
}
