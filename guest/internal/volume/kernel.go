package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/guest/internal/ioerror"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/luks2"
	"github.com/sealvol/sealvol/guest/internal/pci"
	"github.com/sealvol/sealvol/guest/internal/tagstore"
)

// kernel is where sealing leaves this package: what it needs from the kernel and from mkfs.
type kernel struct {
	disks   disks
	mapper  mapper
	tags    func(ctx context.Context, dataBytes uint64) (tags, error)
	lend    func(key *keyring.Key, description string, do func() error) error
	luks2   func(ctx context.Context, data devmapper.Device, key *keyring.Key) (luksHeader, error)
	driver  func(cipher string) (string, error)
	systems fileSystems
	faults  watcher
}

type disks interface {
	// Wait returns the disk at a path as soon as it is there.
	Wait(ctx context.Context, path pci.Path) (pci.Device, error)
	// Find looks once.
	Find(path pci.Path) (pci.Device, error)
	// Hold makes sure that nobody uses the disk, and that it stays this one until the result is closed.
	Hold(ctx context.Context, disk pci.Device) (closer, error)
}

type closer interface{ Close() error }

type mapper interface {
	Create(ctx context.Context, name, uuid string, length uint64, target devmapper.Target) (devmapper.Device, error)
	Remove(ctx context.Context, name string) error
	// Sweep ends the mappings whose names begin with prefix, also those that are in use.
	Sweep(ctx context.Context, prefix string) ([]devmapper.Swept, error)
	Table(name string) (string, error)
	Status(name string) (string, error)
}

type tags interface {
	Preallocate(dataBytes uint64) error
	Number() blockdev.Number
	Allocated() (uint64, error)
	Close() error
}

type luksHeader interface {
	Open(ctx context.Context, name string, data devmapper.Device, key *keyring.Key) (luks2.Mappings, error)
	Close() error
}

type watcher interface {
	// Watch calls first when the first I/O of a device fails.
	Watch(number blockdev.Number, first func(ioerror.Fault))
	Faults(number blockdev.Number) ioerror.Report
	Forget(number blockdev.Number)
}

type fileSystems interface {
	Make(ctx context.Context, fs filesystem.Type, size uint64) (image, error)
	Mount(ctx context.Context, fs filesystem.Type, device devmapper.Device, options filesystem.Options) (mount, error)
}

type image interface {
	CopyTo(ctx context.Context, node string) error
	Close() error
}

type mount interface {
	Attach(dir string) error
	Detach() error
	SetGroup(ctx context.Context, gid uint32, policy filesystem.ChangePolicy) error
	Usage() (unix.Statfs_t, error)
	Close(ctx context.Context) error
}

// pciDisks are the disks of the machine.
type pciDisks struct{ sysfs string }

func (d pciDisks) Wait(ctx context.Context, path pci.Path) (pci.Device, error) {
	return pci.Wait(ctx, d.sysfs, path)
}

func (d pciDisks) Find(path pci.Path) (pci.Device, error) { return pci.Find(d.sysfs, path) }

func (d pciDisks) Hold(ctx context.Context, disk pci.Device) (closer, error) {
	f, err := openNew(ctx, disk)
	if err != nil {
		return nil, err
	}
	if err := check(ctx, f, disk); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// openNew opens a disk that sysfs shows already; its node under /dev, and the readiness to be opened, come a moment later.
func openNew(ctx context.Context, disk pci.Device) (*os.File, error) {
	for {
		f, err := blockdev.Open(disk.Node(), disk.Number, os.O_RDONLY)
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENXIO) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("open disk: %w: %w: %w", err, ctx.Err(), errdefs.ErrUnavailable)
		case <-time.After(time.Millisecond):
		}
	}
}

func check(ctx context.Context, f *os.File, disk pci.Device) error {
	sequence, err := blockdev.Sequence(f)
	if err != nil {
		return err
	}
	size, err := blockdev.Size(f)
	if err != nil {
		return err
	}
	if sequence != disk.Sequence || size != disk.Bytes {
		return fmt.Errorf("disk %s was replaced while it was opened: %w", disk.Name, errdefs.ErrUnavailable)
	}
	return blockdev.WaitUnused(ctx, disk.Node(), disk.Number)
}

// mkfs makes file systems with the tools of the image, and mounts them.
type mkfs struct{ tools filesystem.Tools }

func (k mkfs) Make(ctx context.Context, fs filesystem.Type, size uint64) (image, error) {
	made, err := fs.Make(ctx, k.tools, size)
	if err != nil {
		return nil, err
	}
	return made, nil
}

func (mkfs) Mount(ctx context.Context, fs filesystem.Type, device devmapper.Device, options filesystem.Options) (mount, error) {
	mounted, err := fs.Open(ctx, device.Link(), device.Node(), device.Number, options)
	if err != nil {
		return nil, err
	}
	return mounted, nil
}

func newTags(ctx context.Context, dataBytes uint64) (tags, error) {
	store, err := tagstore.New(ctx, dataBytes)
	if err != nil {
		return nil, err
	}
	return store, nil
}

// header is a LUKS2 header with the tool that made it.
type header struct {
	*luks2.Header
	tool *luks2.Tool
}

func (h header) Open(ctx context.Context, name string, data devmapper.Device, key *keyring.Key) (luks2.Mappings, error) {
	return h.tool.Open(ctx, name, data, h.Header, key)
}

func formatter(tool *luks2.Tool) func(context.Context, devmapper.Device, *keyring.Key) (luksHeader, error) {
	return func(ctx context.Context, data devmapper.Device, key *keyring.Key) (luksHeader, error) {
		made, err := tool.Format(ctx, data, key)
		if err != nil {
			return nil, err
		}
		return header{made, tool}, nil
	}
}

// checkKernel refuses kernels before 6.8. They lack the commits 50c70240097c (CVE-2024-26763: the data may change between
// encryption and authentication) and 42e15d12070b of dm-crypt.
func checkKernel() error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return os.NewSyscallError("uname", err)
	}
	return checkRelease(unix.ByteSliceToString(name.Release[:]))
}

func checkRelease(release string) error {
	major, rest, _ := strings.Cut(release, ".")
	minor, _, _ := strings.Cut(rest, ".")
	minor, _, _ = strings.Cut(minor, "-")
	a, errMajor := strconv.ParseUint(major, 10, 32)
	b, errMinor := strconv.ParseUint(minor, 10, 32)
	if errMajor != nil || errMinor != nil || a < 6 || a == 6 && b < 8 {
		return fmt.Errorf("kernel %q is older than 6.8 and may lack fixes of dm-crypt; if it has them, the guest image must say so: %w", release, errdefs.ErrFailedPrecondition)
	}
	return nil
}
