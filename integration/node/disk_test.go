//go:build node

package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mended gives the policy of sealedPod with something else in a place of it.
func mended(t *testing.T, what, by string) string {
	t.Helper()
	if strings.Count(sealedPolicy, what) != 1 {
		t.Fatalf("the policy must have one %q", what)
	}
	return strings.Replace(sealedPolicy, what, by, 1)
}

// TestADiskThatWasRefusedMakesRoomForAnotherOne: Kata tells disks apart by their numbers, and a container that was refused has told it one.
// The disk that comes in its place has a number of its own, since the sandbox keeps the first one.
func TestADiskThatWasRefusedMakesRoomForAnotherOne(t *testing.T) {
	s := newScene(t)
	pod := sealedPod("refused-disk")
	pod.Policy = mended(t, `"min": 0`, `"min": 100663296`)
	id := s.pod(pod)
	_, small, undo, err := s.node.Disk(s.ctx, "small", 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.node.RunContainer(s.ctx, id, pod, sealedContainer(small))
	// As a CSI driver does with a disk that nobody uses.
	if err := undo(); err != nil {
		t.Error(err)
	}
	s.wantRefusal(err, "the disk has 67108864 bytes, the policy wants at least 100663296")
	s.wantNothingSealed(id)
	_, large := s.disk(128 * mib)
	if large == small {
		t.Fatalf("the number of %s was free again, and Kata may know it as the refused disk", small)
	}
	container := s.start(id, pod, sealedContainer(large))
	s.exec(container, "sh", "-c", "echo alive > /mnt/encrypted/f && sync")
	if df := s.exec(container, "df", "-mP", "/mnt/encrypted"); !strings.Contains(df, "/dev/mapper/encrypted_disk_") {
		t.Errorf("the volume must be on the second disk, df says\n%s", df)
	}
	s.crictl("rm", "-f", container)
	_, other := s.disk(128 * mib)
	_, err = s.node.RunContainer(s.ctx, id, pod, sealedContainer(other))
	s.wantRefusal(err, "for the life of this pod")
}

// TestADiskThatStallsIsATimeoutAndNotAHalfMadeVolume freezes the file system below a disk, so that it reads but does not write. The guest gives up
// within Kata's create_container_timeout. When the disk works again, the volume is made on it.
func TestADiskThatStallsIsATimeoutAndNotAHalfMadeVolume(t *testing.T) {
	s := newScene(t)
	folder := s.fileSystem(256 * mib)
	file := filepath.Join(folder, "disk")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 64*mib)); err != nil {
		t.Fatal(err)
	}
	device := s.loop(file)
	pod := sealedPod("stalled")
	pod.Annotations["io.katacontainers.config.runtime.create_container_timeout"] = "30"
	id := s.pod(pod)
	before := len(s.syslog())
	thaw := s.freeze(folder)
	created := make(chan error, 1)
	go func() {
		_, err := s.node.RunContainer(s.ctx, id, pod, sealedContainer(device))
		created <- err
	}()
	// Kata then unplugs the disk, and QEMU waits until the last request to it has ended.
	if err := poll(s.ctx, "Kata to give up", func() bool {
		return strings.Contains(s.syslog()[before:], "container create failed")
	}, 2*time.Minute); err != nil {
		t.Error(err)
	}
	thaw()
	s.wantRefusal(<-created, "volume encrypted", "the disk does not answer", "deadline exceeded")

	var container string
	var err error
	if err := poll(s.ctx, "the container to be created on the disk that works again", func() bool {
		container, err = s.node.RunContainer(s.ctx, id, pod, sealedContainer(device))
		return err == nil
	}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := s.exec(container, "sh", "-c", "echo alive > /mnt/encrypted/f && sync && cat /mnt/encrypted/f"); got != "alive" {
		t.Errorf("the volume holds %q", got)
	}
}

// syslog is what was logged on the node so far.
func (s *scene) syslog() string {
	s.Helper()
	text, err := os.ReadFile(filepath.Join(s.node.dir, "syslog.txt"))
	if err != nil {
		s.Fatal(err)
	}
	return string(text)
}

// fileSystem makes a file system on the host, and gives where it is mounted until the end of the test.
func (s *scene) fileSystem(size int64) (folder string) {
	s.Helper()
	_, device := s.disk(size)
	folder = s.TempDir()
	s.run("mkfs.ext4", "-q", device)
	s.run("mount", device, folder)
	s.Cleanup(func() {
		// A sandbox that has just ended may still be about to close its disk.
		if err := poll(context.WithoutCancel(s.ctx), "nobody to use "+folder, func() bool {
			_, err := s.node.run(context.WithoutCancel(s.ctx), "umount", folder)
			return err == nil
		}, 20*time.Second); err != nil {
			s.Error(err)
		}
	})
	return folder
}

// loop makes a block device of a file.
func (s *scene) loop(file string) (device string) {
	s.Helper()
	device = s.run("losetup", "--find", "--show", file)
	s.Cleanup(func() { s.run("losetup", "--detach", device) })
	return device
}

// freeze lets nobody write to a file system any more, until thaw is called or the test ends.
func (s *scene) freeze(folder string) (thaw func()) {
	s.Helper()
	s.run("fsfreeze", "--freeze", folder)
	frozen := true
	thaw = func() {
		if frozen {
			frozen = false
			s.run("fsfreeze", "--unfreeze", folder)
		}
	}
	s.Cleanup(thaw)
	return thaw
}

// run runs a program on the host, also when the test's time is up.
func (s *scene) run(name string, args ...string) string {
	s.Helper()
	out, err := s.node.run(context.WithoutCancel(s.ctx), name, args...)
	if err != nil {
		s.Error(err)
	}
	return out
}
