package policy

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// name is what Kubernetes calls a DNS label: containers and volumes are named so.
var name = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// occupied are the paths at which CRI and Kata mount something into every container. A volume lies clear of them: on, above or below
// one of them it would hide it or be hidden. /run/secrets is /var/run/secrets in images where /var/run is a link.
var occupied = []string{
	"/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf",
	"/var/run/secrets/kubernetes.io/serviceaccount", "/run/secrets/kubernetes.io/serviceaccount",
}

// node is a value inside sealed_pod and the way to it, which every error names.
type node struct {
	path  string
	value any
}

func (n node) errorf(format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", n.path, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// unsupported is the error for what the policy's language has and this version has not.
func (n node) unsupported(value string) error {
	return fmt.Errorf("%s: %s is not supported yet: %w", n.path, printable(value), errdefs.ErrFailedPrecondition)
}

func (n node) object() (map[string]any, error) {
	o, ok := n.value.(map[string]any)
	if !ok {
		return nil, n.errorf("must be an object")
	}
	return o, nil
}

// members returns the members of an object that may have these keys and no others.
func (n node) members(keys ...string) (map[string]any, error) {
	o, err := n.object()
	if err != nil {
		return nil, err
	}
	for _, k := range slices.Sorted(maps.Keys(o)) {
		if !slices.Contains(keys, k) {
			return nil, n.errorf("unknown key %s (known: %s)", printable(k), strings.Join(keys, ", "))
		}
	}
	return o, nil
}

// named returns the entries of an object whose keys are names, in order.
func (n node) named() ([]string, map[string]any, error) {
	o, err := n.object()
	if err != nil {
		return nil, nil, err
	}
	keys := slices.Sorted(maps.Keys(o))
	for _, k := range keys {
		if !name.MatchString(k) {
			return nil, nil, n.errorf("bad name %s: want a DNS label, %s", printable(k), name)
		}
	}
	return keys, o, nil
}

func (n node) at(key string, value any) node { return node{n.path + "." + key, value} }

func (n node) list() ([]node, error) {
	l, ok := n.value.([]any)
	if !ok {
		return nil, n.errorf("must be an array")
	}
	nodes := make([]node, len(l))
	for i, v := range l {
		nodes[i] = node{n.path + "[" + strconv.Itoa(i) + "]", v}
	}
	return nodes, nil
}

func (n node) text() (string, error) {
	s, ok := n.value.(string)
	if !ok {
		return "", n.errorf("must be a string")
	}
	return s, nil
}

func (n node) texts() ([]string, error) {
	l, err := n.list()
	if err != nil {
		return nil, err
	}
	texts := make([]string, len(l))
	for i, e := range l {
		if texts[i], err = e.text(); err != nil {
			return nil, err
		}
	}
	return texts, nil
}

func (n node) bytes() (uint64, error) {
	number, ok := n.value.(json.Number)
	if !ok {
		return 0, n.errorf("must be a number of bytes")
	}
	b, err := strconv.ParseUint(number.String(), 10, 64)
	if err != nil || b > math.MaxInt64 {
		return 0, n.errorf("must be a whole number of bytes from 0 to 2^63-1")
	}
	return b, nil
}

// parsePod reads the value of sealed_pod.
func parsePod(value any) (pod, error) {
	root := node{"sealed_pod", value}
	o, err := root.members("version", "containers", "volumes")
	if err != nil {
		return pod{}, err
	}
	if v, ok := o["version"].(json.Number); !ok || v.String() != "1" {
		return pod{}, root.at("version", nil).errorf("must be 1, the version that this guest knows")
	}
	p := pod{Containers: map[string]Container{}, Volumes: map[string]Volume{}}

	containers := root.at("containers", o["containers"])
	names, entries, err := containers.named()
	if err != nil {
		return pod{}, err
	}
	for _, k := range names {
		if p.Containers[k], err = parseContainer(containers.at(k, entries[k])); err != nil {
			return pod{}, err
		}
	}

	value, ok := o["volumes"]
	if !ok {
		return p, nil
	}
	volumes := root.at("volumes", value)
	names, entries, err = volumes.named()
	if err != nil {
		return pod{}, err
	}
	taken := map[string]map[string]string{} // container → path → where it was said
	for _, k := range names {
		n := volumes.at(k, entries[k])
		v, err := parseVolume(n)
		if err != nil {
			return pod{}, err
		}
		for i, m := range v.Mounts {
			at := fmt.Sprintf("%s.mounts[%d]", n.path, i)
			if _, ok := p.Containers[m.Container]; !ok {
				return pod{}, node{path: at + ".container"}.errorf("sealed_pod.containers has no %s", printable(m.Container))
			}
			if taken[m.Container] == nil {
				taken[m.Container] = map[string]string{}
			}
			for _, other := range slices.Sorted(maps.Keys(taken[m.Container])) {
				if overlap(m.Path, other) {
					return pod{}, node{path: at + ".path"}.errorf("lies on, above or below %s of the same container", taken[m.Container][other])
				}
			}
			taken[m.Container][m.Path] = at
		}
		p.Volumes[k] = v
	}
	return p, nil
}

func parseContainer(n node) (Container, error) {
	c := Container{RootFS: HostRootFS}
	o, err := n.members("args", "image", "exec", "rootfs")
	if err != nil {
		return c, err
	}
	if v, ok := o["args"]; ok {
		args := n.at("args", v)
		if c.Args, err = args.texts(); err != nil {
			return c, err
		}
		if len(c.Args) == 0 {
			return c, args.errorf("must not be empty; leave it out to allow any")
		}
	}
	if v, ok := o["image"]; ok {
		image := n.at("image", v)
		if c.Image, err = image.text(); err != nil {
			return c, err
		}
		if c.Image == "" {
			return c, image.errorf("must not be empty; leave it out to allow any")
		}
	}
	if v, ok := o["exec"]; ok {
		commands, err := n.at("exec", v).list()
		if err != nil {
			return c, err
		}
		for _, command := range commands {
			argv, err := command.texts()
			if err != nil {
				return c, err
			}
			if len(argv) == 0 {
				return c, command.errorf("must not be empty")
			}
			if i := slices.Index(argv, "..."); i >= 0 && i < len(argv)-1 {
				return c, command.errorf(`"..." stands for any rest and so may only be last`)
			}
			c.Exec = append(c.Exec, argv)
		}
	}
	if v, ok := o["rootfs"]; ok {
		rootfs := n.at("rootfs", v)
		s, err := rootfs.text()
		if err != nil {
			return c, err
		}
		switch c.RootFS = RootFS(s); c.RootFS {
		case HostRootFS:
		case "verity", "guest-pull":
			return c, rootfs.unsupported(s)
		default:
			return c, rootfs.errorf("unknown root file system %s (known: host)", printable(s))
		}
	}
	return c, nil
}

func parseVolume(n node) (Volume, error) {
	v := Volume{Layering: MemoryTags, FSType: Ext4}
	o, err := n.members("mode", "layering", "suites", "fs_type", "options", "size", "mounts", "fs_group", "max_tag_memory", "preallocate_tags")
	if err != nil {
		return v, err
	}

	mode := n.at("mode", o["mode"])
	s, err := mode.text()
	if err != nil {
		return v, err
	}
	switch v.Mode = Mode(s); v.Mode {
	case Ephemeral:
	case "persistent":
		return v, mode.unsupported(s)
	default:
		return v, mode.errorf("unknown mode %s (known: ephemeral)", printable(s))
	}

	if value, ok := o["layering"]; ok {
		layering := n.at("layering", value)
		s, err := layering.text()
		if err != nil {
			return v, err
		}
		if v.Layering = Layering(s); v.Layering != MemoryTags && v.Layering != LUKS2 {
			return v, layering.errorf("unknown layering %s (known: memory-tags, luks2)", printable(s))
		}
	}
	if v.Suites, err = parseSuites(n, o, v.Layering); err != nil {
		return v, err
	}

	if value, ok := o["fs_type"]; ok {
		fs := n.at("fs_type", value)
		s, err := fs.text()
		if err != nil {
			return v, err
		}
		if v.FSType = FSType(s); v.FSType != Ext4 && v.FSType != XFS {
			return v, fs.errorf("unknown file system %s (known: ext4, xfs)", printable(s))
		}
	}
	if v.Options, err = parseOptions(n, o); err != nil {
		return v, err
	}
	if v.Size, err = parseSize(n.at("size", o["size"])); err != nil {
		return v, err
	}
	if v.Mounts, err = parseMounts(n.at("mounts", o["mounts"])); err != nil {
		return v, err
	}
	if value, ok := o["fs_group"]; ok {
		if v.FSGroup, err = parseFSGroup(n.at("fs_group", value)); err != nil {
			return v, err
		}
	}
	return v, parseTagMemory(n, o, &v)
}

func parseFSGroup(n node) (*FSGroup, error) {
	o, err := n.members("gid", "change_policy")
	if err != nil {
		return nil, err
	}
	gid := n.at("gid", o["gid"])
	number, _ := gid.value.(json.Number)
	// 2^32-1 is what chown(2) takes for "leave it".
	id, err := strconv.ParseUint(number.String(), 10, 32)
	if err != nil || id == 0 || id == math.MaxUint32 {
		return nil, gid.errorf("must be a whole number from 1 to 2^32-2")
	}
	group := &FSGroup{GID: uint32(id), ChangePolicy: Always} // Kubernetes' default
	if value, ok := o["change_policy"]; ok {
		change := n.at("change_policy", value)
		s, err := change.text()
		if err != nil {
			return nil, err
		}
		if group.ChangePolicy = ChangePolicy(s); group.ChangePolicy != Always && group.ChangePolicy != OnRootMismatch {
			return nil, change.errorf("unknown change policy %s (known: Always, OnRootMismatch)", printable(s))
		}
	}
	return group, nil
}

// parseTagMemory reads what only a layering with tags in memory has.
func parseTagMemory(volume node, o map[string]any, v *Volume) (err error) {
	for _, key := range []string{"max_tag_memory", "preallocate_tags"} {
		if _, ok := o[key]; ok && v.Layering != MemoryTags {
			return volume.at(key, nil).errorf("layering %s keeps no tags in memory", v.Layering)
		}
	}
	if value, ok := o["max_tag_memory"]; ok {
		most := volume.at("max_tag_memory", value)
		if v.MaxTagMemory, err = most.bytes(); err != nil {
			return err
		}
		if v.MaxTagMemory == 0 {
			return most.errorf("must be positive; leave it out for what the size comes to")
		}
	}
	if value, ok := o["preallocate_tags"]; ok {
		if v.PreallocateTags, ok = value.(bool); !ok {
			return volume.at("preallocate_tags", nil).errorf("must be true or false")
		}
	}
	return nil
}

func parseSuites(volume node, o map[string]any, layering Layering) ([]Suite, error) {
	known := []Suite{AEGIS128Random, AESXTSRandomHMACSHA256, AESXTSPlain64HMACSHA256}
	defaults := known[:2]
	if layering == LUKS2 {
		known = []Suite{AESXTSPlain64HMACSHA256}
		defaults = known
	}
	value, ok := o["suites"]
	if !ok {
		return defaults, nil
	}
	n := volume.at("suites", value)
	list, err := n.list()
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, n.errorf("must name at least one suite")
	}
	var suites []Suite
	for _, e := range list {
		s, err := e.text()
		if err != nil {
			return nil, err
		}
		switch suite := Suite(s); {
		case !slices.Contains(known, suite):
			return nil, e.errorf("layering %s has no suite %s (known: %v)", layering, printable(s), known)
		case slices.Contains(suites, suite):
			return nil, e.errorf("suite %s is named twice", suite)
		default:
			suites = append(suites, suite)
		}
	}
	return suites, nil
}

func parseOptions(volume node, o map[string]any) ([]Option, error) {
	value, ok := o["options"]
	if !ok {
		return []Option{NoSUID, NoDev}, nil
	}
	list, err := volume.at("options", value).list()
	if err != nil {
		return nil, err
	}
	// What may not be said together, nor twice.
	groups := map[Option]string{
		NoSUID: "suid", "suid": "suid", NoDev: "dev", "dev": "dev", NoExec: "exec",
		NoATime: "atime", RelATime: "atime", StrictATime: "atime",
		NoDirATime: "diratime", LazyTime: "lazytime", Sync: "sync", DirSync: "dirsync",
	}
	said := map[string]Option{}
	var options []Option
	for _, e := range list {
		s, err := e.text()
		if err != nil {
			return nil, err
		}
		option := Option(s)
		group, ok := groups[option]
		if !ok {
			return nil, e.errorf("unknown mount option %s (known: %v)", printable(s), slices.Sorted(maps.Keys(groups)))
		}
		if other, ok := said[group]; ok {
			return nil, e.errorf("%s after %s", option, other)
		}
		said[group] = option
		if option != "suid" && option != "dev" {
			options = append(options, option)
		}
	}
	for _, option := range []Option{NoSUID, NoDev} {
		if _, ok := said[groups[option]]; !ok {
			options = append(options, option)
		}
	}
	return options, nil
}

func parseSize(n node) (Size, error) {
	var size Size
	o, err := n.members("min", "max")
	if err != nil {
		return size, err
	}
	if value, ok := o["min"]; ok {
		if size.Min, err = n.at("min", value).bytes(); err != nil {
			return size, err
		}
	}
	most := n.at("max", o["max"])
	if size.Max, err = most.bytes(); err != nil {
		return size, err
	}
	if size.Max == 0 || size.Max%BlockSize != 0 {
		return size, most.errorf("must be a positive multiple of %d", BlockSize)
	}
	if size.Min > size.Max {
		return size, n.at("min", nil).errorf("%d is more than max, %d", size.Min, size.Max)
	}
	return size, nil
}

func parseMounts(n node) ([]Mount, error) {
	list, err := n.list()
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, n.errorf("must name at least one container and path")
	}
	var mounts []Mount
	for _, e := range list {
		o, err := e.members("container", "path", "read_only")
		if err != nil {
			return nil, err
		}
		var m Mount
		container := e.at("container", o["container"])
		if m.Container, err = container.text(); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(mounts, func(other Mount) bool { return other.Container == m.Container }) {
			return nil, container.errorf("%s has the volume already; a container sees it at one path", printable(m.Container))
		}
		if m.Path, err = parsePath(e.at("path", o["path"])); err != nil {
			return nil, err
		}
		if value, ok := o["read_only"]; ok {
			if m.ReadOnly, ok = value.(bool); !ok {
				return nil, e.at("read_only", nil).errorf("must be true or false")
			}
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

func parsePath(n node) (string, error) {
	p, err := n.text()
	if err != nil {
		return "", err
	}
	switch {
	case !path.IsAbs(p):
		return "", n.errorf("%s is not absolute", printable(p))
	case p != path.Clean(p) || p == "/":
		return "", n.errorf("%s is not a clean path below /", printable(p))
	case !utf8.ValidString(p) || strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }):
		return "", n.errorf("%s has characters that do not print", printable(p))
	case len(p) > 1024:
		return "", n.errorf("is longer than 1024 bytes")
	}
	for _, other := range occupied {
		if overlap(p, other) {
			return "", n.errorf("%s lies on, above or below %s, which every container has", printable(p), other)
		}
	}
	return p, nil
}

// overlap reports whether one of two clean paths is the other or lies below it.
func overlap(a, b string) bool {
	return a == b || strings.HasPrefix(a, b+"/") || strings.HasPrefix(b, a+"/")
}

// printable makes a foreign string fit for a one-line message: quoted, ASCII, and cut.
func printable(s string) string {
	const most = 64
	if len(s) <= most {
		return strconv.QuoteToASCII(s)
	}
	return strconv.QuoteToASCII(s[:most]) + "..."
}
