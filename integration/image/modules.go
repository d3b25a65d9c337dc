package image

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// Modules adds the named kernel modules and all that they need, uncompressed, to the tree below dir,
// and returns their paths in the order in which they must be loaded. What the kernel has built in is
// left out. The kernel is a folder with lib/modules/VERSION of one version, indexed by depmod.
func (t *Tree) Modules(kernel, dir string, names ...string) ([]string, error) {
	versions, err := os.ReadDir(filepath.Join(kernel, "lib/modules"))
	if err != nil {
		return nil, err
	}
	if len(versions) != 1 {
		return nil, fmt.Errorf("%s/lib/modules has %d versions, want 1", kernel, len(versions))
	}
	args := append([]string{"-d", kernel, "-S", versions[0].Name(), "--show-depends", "-a"}, names...)
	modprobe := exec.Command("modprobe", args...)
	modprobe.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := output(modprobe)
	if err != nil {
		return nil, err
	}
	var loads []string
	for line := range strings.Lines(string(out)) {
		verb, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if verb != "insmod" {
			continue // "builtin NAME"
		}
		source := strings.Fields(rest)[0] // parameters may follow
		name := strings.TrimSuffix(filepath.Base(source), ".xz")
		target := path.Join(dir, name)
		if _, ok := t.entries[target]; ok {
			continue
		}
		data, err := readModule(source)
		if err != nil {
			return nil, err
		}
		t.File(target, 0o644, data)
		loads = append(loads, target)
	}
	return loads, nil
}

func readModule(source string) ([]byte, error) {
	if !strings.HasSuffix(source, ".xz") {
		return os.ReadFile(source)
	}
	return output(exec.Command("xz", "-dc", source))
}

// output is cmd.Output with what the command said on stderr in the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}
