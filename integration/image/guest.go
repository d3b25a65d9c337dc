package image

import (
	"debug/elf"
	"errors"
	"os/exec"
	"strings"
)

// A Guest is what the initial RAM disk of a Kata guest is made of.
type Guest struct {
	Service string // the program sealvol-guest
	Agent   string // the program kata-agent
	Kernel  string // folder with lib/modules of the guest's kernel; empty: all is built in
}

// agentConfig is kata-agent's: it listens where only the service reaches it. (Kata's
// src/agent/src/config.rs lists the keys.)
const agentConfig = `# The agent listens for the sealvol service alone, which starts it and stands before it.
server_addr = "unix:///run/sealvol/agent/agent.sock"
log_level = "info"
`

// guestModules is what a guest needs of a modular kernel. Those for other processors fail to load
// with ENODEV, which is no error.
var guestModules = strings.Fields(`
	virtio_pci virtio_console virtio_net virtio_blk virtio_scsi sd_mod virtio_rng
	9pnet_virtio 9p virtiofs overlay
	vmw_vsock_virtio_transport vsock_diag
	dm_mod dm_crypt dm_integrity loop ext4 xfs
	aesni_intel sha256_ssse3 aegis128_aesni
	authenc xts aegis128 hmac sha256_generic cbc ctr`)

// Tree puts the guest together: the service is process 1, and starts the agent.
func (g Guest) Tree() (*Tree, error) {
	tree := &Tree{}
	for _, dir := range []string{"/dev", "/proc", "/run", "/sys", "/tmp", "/var/lib"} {
		tree.Dir(dir)
	}
	tree.Link("/var/run", "../run")
	for name, source := range map[string]string{
		"/init":                g.Service,
		"/usr/bin/kata-agent":  g.Agent,
		"/usr/sbin/mkfs.ext4":  "/usr/sbin/mkfs.ext4",
		"/usr/sbin/mkfs.xfs":   "/usr/sbin/mkfs.xfs",
		"/usr/sbin/cryptsetup": "/usr/sbin/cryptsetup", // for the layering luks2 alone
		"/usr/sbin/runc":       "/usr/sbin/runc",       // for the agent of the tests; the real one does without
		"/bin/busybox":         "/bin/busybox",
	} {
		if err := tree.Add(name, source); err != nil {
			return nil, err
		}
	}
	tree.File("/etc/sealvol/agent.toml", 0o644, []byte(agentConfig))
	tree.File("/etc/sealvol/guest.toml", 0o644, nil) // the defaults
	var modules []string
	if g.Kernel != "" {
		var err error
		if modules, err = tree.Modules(g.Kernel, "/lib/modules", guestModules...); err != nil {
			return nil, err
		}
	}
	tree.File("/etc/sealvol/modules", 0o644, []byte(strings.Join(modules, "\n")+"\n"))
	return tree, nil
}

// Add adds a file of this machine and, if that is a program, the shared libraries that it needs.
func (t *Tree) Add(name, source string) error {
	if err := t.Copy(name, source); err != nil {
		return err
	}
	program, err := elf.Open(source)
	if _, ok := errors.AsType[*elf.FormatError](err); ok {
		return nil // no program
	}
	if err != nil {
		return err
	}
	defer program.Close()
	if program.Section(".interp") == nil {
		return nil // static
	}
	out, err := output(exec.Command("ldd", source))
	if err != nil {
		return err
	}
	// "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)", "/lib64/ld-linux-x86-64.so.2 (0x…)"
	for line := range strings.Lines(string(out)) {
		for _, field := range strings.Fields(line) {
			if strings.HasPrefix(field, "/") {
				if err := t.Copy(field, field); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
