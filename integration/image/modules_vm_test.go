//go:build vm

package image

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

// In the machine, the running kernel's modules are at their usual place.
const here = "/"

func TestModulesComeInLoadingOrderUncompressed(t *testing.T) {
	t.Parallel()
	var tree Tree
	paths, err := tree.Modules(here, "/m", "dm_crypt", "ext4", "dm_mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if data := tree.entries[path].data; !bytes.HasPrefix(data, []byte("\x7fELF")) {
			t.Errorf("%s is no uncompressed module", path)
		}
	}
	for _, pair := range [][2]string{{"dm-mod", "dm-crypt"}, {"jbd2", "ext4"}} {
		before, after := slices.Index(paths, "/m/"+pair[0]+".ko"), slices.Index(paths, "/m/"+pair[1]+".ko")
		if before < 0 || after < before {
			t.Errorf("%s does not come before %s in %v", pair[0], pair[1], paths)
		}
	}
}

func TestUnknownModuleIsAnError(t *testing.T) {
	t.Parallel()
	if _, err := new(Tree).Modules(here, "/m", "dm_mod", "no_such_module"); err == nil || !strings.Contains(err.Error(), "no_such_module") {
		t.Error(err)
	}
}

func TestGuestHasItsPartsAndModules(t *testing.T) {
	t.Parallel()
	const program = "/bin/busybox" // any
	tree, err := Guest{Service: program, Agent: program, Kernel: here}.Tree()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/init", "/usr/bin/kata-agent", "/usr/sbin/mkfs.ext4", "/usr/sbin/mkfs.xfs", "/usr/sbin/cryptsetup", "/etc/sealvol/agent.toml", "/etc/sealvol/guest.toml"} {
		if _, ok := tree.entries[name]; !ok {
			t.Errorf("the guest lacks %s", name)
		}
	}
	for _, path := range strings.Fields(string(tree.entries["/etc/sealvol/modules"].data)) {
		if _, ok := tree.entries[path]; !ok {
			t.Errorf("the guest lacks module %s", path)
		}
	}
}
