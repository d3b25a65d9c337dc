//go:build vm

package attack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/integration/qmp"
)

// hostFile is what the host has of a disk.
func hostFile(disk int) string { return fmt.Sprintf("/run/vmrun/disks/%d", disk) }

// hands are the host's hands on the disks that it writes to behind the guest's back: other disks with the same files behind them. By
// vmrun's folder the files can be reached, too, but fifty times slower.
var hands = sync.OnceValues(func() (map[int]*os.File, error) {
	host, err := qmp.Open()
	if err != nil {
		return nil, err
	}
	opened := map[int]*os.File{}
	for i, disk := range []int{attacked, second} {
		node := fmt.Sprint("hand", disk)
		if err := host.Execute("blockdev-add", object{
			"driver": "raw", "node-name": node,
			"file": object{"driver": "file", "locking": "off", "filename": filepath.Join(os.Getenv("VMRUN_DISKS"), fmt.Sprint(disk))},
		}); err != nil {
			return nil, err
		}
		if err := host.Execute("device_add", object{
			"driver": "virtio-blk-pci", "drive": node, "serial": node, "bus": "bridge4", "addr": fmt.Sprintf("0x%x", 0x1f-i),
		}); err != nil {
			return nil, err
		}
		if opened[disk], err = openSerial(node); err != nil {
			return nil, err
		}
	}
	return opened, nil
})

// openSerial waits for a disk with a serial number and opens it.
func openSerial(serial string) (*os.File, error) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		names, err := filepath.Glob("/sys/block/vd*/serial")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			// A disk that comes or goes may have none.
			if text, err := os.ReadFile(name); err != nil || string(text) != serial {
				continue
			}
			f, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), os.O_RDWR|unix.O_DIRECT, 0)
			if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENXIO) {
				return f, err
			}
		}
	}
	return nil, fmt.Errorf("no disk with serial number %s", serial)
}

func (a *arena) hand(disk int) *os.File {
	a.Helper()
	all, err := hands()
	if err != nil {
		a.Fatal(err)
	}
	return all[disk]
}

// read reads a disk as the host does. What it reads and puts is a multiple of 512 bytes.
func (a *arena) read(disk int, offset int64, n int) []byte {
	a.Helper()
	b := aligned(n)
	if _, err := a.hand(disk).ReadAt(b, offset); err != nil {
		a.Fatal(err)
	}
	return b
}

// put writes to a disk behind the guest's back.
func (a *arena) put(disk int, offset int64, b []byte) {
	a.Helper()
	memory := aligned(len(b))
	copy(memory, b)
	if _, err := a.hand(disk).WriteAt(memory, offset); err != nil {
		a.Fatal(err)
	}
}

// flip flips one bit in each of some blocks, another one in each. The second time it flips them back.
func (a *arena) flip(disk int, offsets []int64) {
	a.Helper()
	first, end := slices.Min(offsets), slices.Max(offsets)+block
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
	options := object{"driver": "blkdebug", "node-name": node, "image": qmp.FileID(disk)}
	if len(rules) > 0 {
		options["inject-error"] = rules
	}
	a.qmp("blockdev-add", options)
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
