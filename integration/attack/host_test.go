//go:build vm

package attack

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/sealvol/sealvol/integration/qmp"
)

// hostFile is what the host has of a disk.
func hostFile(disk int) string { return fmt.Sprintf("/run/vmrun/disks/%d", disk) }

// read reads the disk as the host does.
func (a *arena) read(disk int, offset int64, n int) []byte {
	a.Helper()
	f, err := os.Open(hostFile(disk))
	if err != nil {
		a.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, offset); err != nil {
		a.Fatal(err)
	}
	return b
}

// put writes to the disk behind the guest's back.
func (a *arena) put(disk int, offset int64, b []byte) {
	a.Helper()
	f, err := os.OpenFile(hostFile(disk), os.O_WRONLY, 0)
	if err != nil {
		a.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, offset); err != nil {
		a.Fatal(err)
	}
}

// flip flips one bit in each of some blocks, another one in each. The second time it flips them back.
func (a *arena) flip(disk int, offsets []int64) {
	a.Helper()
	first, end := slices.Min(offsets), slices.Max(offsets)+block
	// All at once, for the host's files are slow to reach.
	image := a.read(disk, first, int(end-first))
	for _, offset := range offsets {
		bit := offset / block * 12345 % (8 * block)
		image[offset-first+bit/8] ^= 1 << (bit % 8)
	}
	a.put(disk, first, image)
}

func (a *arena) truncate(disk int, size int64) {
	a.Helper()
	if err := os.Truncate(hostFile(disk), size); err != nil {
		a.Fatal(err)
	}
}

// places are where a file's blocks are on the disk, for a kind that puts them in the volume's order.
func (a *arena) places(file string, blocks []int) (offsets []int64) {
	a.Helper()
	for _, i := range blocks {
		offsets = append(offsets, where(a.T, file, i))
	}
	return offsets
}

func (a *arena) unplug(disk int) {
	a.Helper()
	if err := a.host.Unplug(disk); err != nil {
		a.Fatal(err)
	}
}

func (a *arena) plug(disk int, path string) {
	a.Helper()
	if err := a.host.Plug(disk, path); err != nil {
		a.Fatal(err)
	}
}

type object map[string]any

func (a *arena) qmp(command string, arguments object) {
	a.Helper()
	if err := a.host.Execute(command, arguments); err != nil {
		a.Fatal(err)
	}
}

// resize changes the size that the disk says it has, and returns when the guest has heard of it.
func (a *arena) resize(disk int, size int64) {
	a.Helper()
	a.qmp("block_resize", object{"node-name": qmp.ID(disk), "size": size})
	device := device(a.T, disk)
	if device == "" {
		return // it will, when it is plugged in
	}
	want := strconv.FormatInt(size/512, 10) + "\n"
	for ctx := a.within(); string(file(a.T, filepath.Join("/sys/block", filepath.Base(device), "size"))) != want; time.Sleep(time.Millisecond) {
		if ctx.Err() != nil {
			a.Fatalf("disk %d did not become %d bytes large", disk, size)
		}
	}
}

// device is a disk's file in the guest, or empty.
func device(t *testing.T, disk int) string {
	t.Helper()
	path := pathOf(disk)
	found, err := filepath.Glob(fmt.Sprintf("/sys/devices/pci0000:00/0000:00:%s.0/0000:*:%s.0/virtio*/block/vd*", path[:2], path[3:]))
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		return ""
	}
	return "/dev/" + filepath.Base(found[0])
}

// fault lets requests to a disk fail, until the result is called. The rules are those of QEMU's driver blkdebug.
func (a *arena) fault(disk int, rules ...object) (lift func()) {
	a.Helper()
	node := "fault" + fmt.Sprint(disk)
	a.qmp("blockdev-add", object{"driver": "blkdebug", "node-name": node, "image": qmp.FileID(disk), "inject-error": rules})
	a.stand(disk, node)
	return func() {
		a.Helper()
		a.stand(disk, qmp.FileID(disk))
		a.qmp("blockdev-del", object{"node-name": node})
	}
}

// stand puts a node behind a disk.
func (a *arena) stand(disk int, node string) {
	a.Helper()
	a.qmp("blockdev-reopen", object{"options": []object{{"driver": "raw", "node-name": qmp.ID(disk), "file": node}}})
}

// Kinds of requests, as blkdebug calls them.
const (
	reads   = "read"
	writes  = "write"
	flushes = "flush"
)

// failing is a rule by which requests of a kind fail.
func failing(requests string, errno int, once bool) object {
	return object{"event": "none", "iotype": requests, "errno": errno, "once": once}
}

// stall holds all requests to a disk up, until the result is called.
func (a *arena) stall(disk int) (resume func()) {
	a.Helper()
	lift := a.fault(disk)
	// By the device: by the node's name QEMU would wait until no request is on its way.
	command := fmt.Sprintf("qemu-io -d /machine/peripheral/%s/virtio-backend", qmp.ID(disk))
	events := []string{"read_aio", "write_aio", "flush_to_disk"}
	for _, event := range events {
		a.human(fmt.Sprintf("%s \"break %s %s\"", command, event, event))
	}
	return func() {
		a.Helper()
		for _, event := range events {
			a.human(fmt.Sprintf("%s \"remove_break %s\"", command, event))
		}
		lift()
	}
}

func (a *arena) human(line string) {
	a.Helper()
	said, err := a.host.Human(line)
	if err != nil || said != "" {
		a.Fatalf("%s: %q, %v", line, said, err)
	}
}
