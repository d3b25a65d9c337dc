//go:build vm

package attack

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// foreign is what a host may present in place of an empty disk, or of the one that it was lent back.
type foreign struct {
	what  string
	bytes []byte
}

// craft makes disks that a program which looks at them would do something about.
func craft(t *testing.T) []foreign {
	t.Helper()
	dir := t.TempDir()
	planted, key := filepath.Join(dir, "planted"), filepath.Join(dir, "key")
	if err := os.Mkdir(planted, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{filepath.Join(planted, "planted"), key} {
		if err := os.WriteFile(file, []byte("the host's"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ext4, luks := filepath.Join(dir, "ext4"), filepath.Join(dir, "luks")
	for file, size := range map[string]int64{ext4: 4 * mib, luks: 4 * mib} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, size); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "mkfs.ext4", "-q", "-F", "-d", planted, ext4)
	run(t, "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		"--luks2-metadata-size", "16k", "--luks2-keyslots-size", "256k", luks, key)
	return []foreign{{"an ext4", file(t, ext4)}, {"a LUKS2 header", file(t, luks)}, {"a partition table", partitionTable()}}
}

// partitionTable is that of a disk with one partition, of Linux, from sector 2 on.
func partitionTable() []byte {
	sector := make([]byte, 512)
	entry := sector[446:]
	entry[4] = 0x83
	binary.LittleEndian.PutUint32(entry[8:], 2)
	binary.LittleEndian.PutUint32(entry[12:], 4096)
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

func file(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// present plugs the attacked disk in anew with something at its beginning, so that the kernel, too, looks at it.
func (a *arena) present(content []byte) {
	a.Helper()
	a.unplug(attacked)
	a.put(attacked, 0, content)
	a.plug(attacked, pathOf(attacked))
}

func TestWhatTheHostPutOnADiskIsSealedOverAndDoesNotOpen(t *testing.T) {
	disks := craft(t)
	play(t, all, func(a *arena) {
		for i, volume := range []string{a.name, a.name + secondOf, a.name + largeOf} {
			a.Logf("%s", disks[i].what)
			a.present(disks[i].bytes)
			a.open(volume, attacked)
			a.at(volume, func(dir string) {
				entries, err := os.ReadDir(dir)
				if err != nil {
					a.Fatal(err)
				}
				for _, entry := range entries {
					if entry.Name() != "lost+found" {
						a.Errorf("over %s: a new volume has %q", disks[i].what, entry.Name())
					}
				}
			})
			a.works(volume)
			a.close(volume)
			a.present(disks[i].bytes)
			a.isLoss(volume, a.acquire(volume, attacked))
		}
	})
}

// What reads blocks that nobody wrote gets errors, and a file system in use does not.
func TestABlockThatWasNeverWrittenIsAnError(t *testing.T) {
	play(t, tagsInMemory, func(a *arena) {
		// Where no file system has anything of its own.
		const blocks = 256
		start := int64(a.bytes) * 3 / 8
		a.put(attacked, start, content("what the host would like to be read", blocks))
		a.open(a.name, attacked)
		device := a.direct(a.name)
		defer device.Close()
		buffer := aligned(block)
		for i := range int64(blocks) {
			if _, err := device.ReadAt(buffer, start+i*block); !damage(err) {
				a.Errorf("block %d, which nobody wrote: %v", start/block+i, err)
			}
		}
		a.works(a.name)
		a.sound(a.name)
	})
}

// sound makes sure that a volume's file system has no fault.
func (a *arena) sound(volume string) {
	a.Helper()
	switch a.fs {
	case "ext4":
		device := filepath.Join("/dev/mapper", a.status(volume).Mappings[0].Name)
		a.at(volume, func(dir string) {
			// So that the superblock says what is so.
			run(a.T, "mount", "-o", "remount,ro", dir)
			out, err := exec.Command("e2fsck", "-f", "-n", device).CombinedOutput()
			run(a.T, "mount", "-o", "remount,rw", dir)
			a.Logf("e2fsck: %v\n%s", err, out)
			if err != nil {
				a.Errorf("volume %s is not sound", volume)
			}
		})
	case "xfs":
		device := filepath.Join("/dev/mapper", a.status(volume).Mappings[0].Name)
		a.at(volume, func(dir string) {
			run(a.T, "mount", "-o", "remount,ro", dir)
			out, err := exec.Command("xfs_repair", "-n", "-d", device).CombinedOutput()
			run(a.T, "mount", "-o", "remount,rw", dir)
			a.Logf("xfs_repair: %v\n%s", err, out)
		})
	default:
		a.Fatalf("no tool for %s", a.fs)
	}
}
