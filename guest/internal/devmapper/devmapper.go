// Package devmapper makes device-mapper devices by the ioctls of /dev/mapper/control, without libdevmapper and without udev.
//
// Each mapping has one target and exists from Create, which leaves it ready for use, to Remove. What could not be removed, or was left by
// a process that was killed, is ended by Kill and Sweep. The link /dev/mapper/NAME is made
// and removed here; where udev runs it is told to keep away, so that nothing reads a mapping whose blocks were never written.
//
// The format of the ioctls is that of linux/dm-ioctl.h, version 4.
package devmapper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// SectorBytes is the unit of a mapping's length.
const SectorBytes = 512

// undoTimeout bounds what is done to leave nothing behind when the caller's context is over already.
const undoTimeout = 5 * time.Second

// udevFlags go into the upper half of the event number of an ioctl. They tell udev's rules to make no links, to look for nothing on
// the device, and that the event is not a spurious one (DM_UDEV_DISABLE_{DM,SUBSYSTEM,DISK,OTHER}_RULES_FLAG and
// DM_UDEV_PRIMARY_SOURCE_FLAG of libdevmapper.h).
const udevFlags = (0x1 | 0x2 | 0x4 | 0x8 | 0x40) << 16

// Control makes and removes mappings. It may be used by several goroutines at once.
type Control struct {
	file    *os.File
	dev     string // /dev
	ioctl   func(request uint, buffer []byte) error
	failing singleflight.Group // of mappings, by name
}

// Device is a mapping that is ready for use.
type Device struct {
	Name   string
	Number blockdev.Number
	Bytes  uint64
}

// Node is the device's own file; Link is what people know it by.
func (d Device) Node() string { return fmt.Sprintf("/dev/dm-%d", d.Number.Minor) }

// Link is the name that mount shows.
func (d Device) Link() string { return "/dev/mapper/" + d.Name }

// Open opens the control device. The error is errdefs.ErrFailedPrecondition when the kernel has no device mapper.
func Open() (*Control, error) {
	file, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("the kernel has no device mapper: %w: %w", errdefs.ErrFailedPrecondition, err)
	}
	if err != nil {
		return nil, err
	}
	return &Control{file: file, dev: "/dev", ioctl: func(request uint, buffer []byte) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), uintptr(request), uintptr(unsafe.Pointer(&buffer[0])))
		if errno != 0 {
			return errno
		}
		return nil
	}}, nil
}

// Close lets go of the control device; mappings stay.
func (c *Control) Close() error { return c.file.Close() }

// Create makes a mapping of the given length in bytes, a multiple of SectorBytes, and leaves nothing behind when it fails.
// It must be called on the thread that can find the key of a Crypt target.
func (c *Control) Create(ctx context.Context, name, uuid string, length uint64, target Target) (Device, error) {
	if err := ctx.Err(); err != nil {
		return Device{}, fmt.Errorf("make mapping %s: %w", name, err)
	}
	create := newMessage(name)
	if len(name) >= unix.DM_NAME_LEN || len(uuid) >= unix.DM_UUID_LEN {
		return Device{}, fmt.Errorf("mapping %s: name or uuid is too long: %w", name, errdefs.ErrInvalidArgument)
	}
	copy(create.Uuid[:], uuid)
	if _, err := c.send(unix.DM_DEV_CREATE, create, nil); err != nil {
		return Device{}, fmt.Errorf("make mapping %s: %w", name, err)
	}
	device, err := c.activate(name, length, target)
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if undoErr := c.Remove(undo, name); undoErr != nil {
			return Device{}, fmt.Errorf("%w; %w", err, undoErr)
		}
		return Device{}, err
	}
	return device, nil
}

func (c *Control) activate(name string, length uint64, target Target) (Device, error) {
	load := newMessage(name)
	// The kernel then overwrites its copy of the message. There is no key in it, but its name need not stay either.
	load.Flags |= unix.DM_SECURE_DATA_FLAG
	load.Target_count = 1
	if _, err := c.send(unix.DM_TABLE_LOAD, load, encodeTarget(length/SectorBytes, target)); err != nil {
		return Device{}, fmt.Errorf("load %s table of mapping %s: %w", target.kind(), name, err)
	}
	// Without DM_SUSPEND_FLAG this resumes the device, which makes the table live.
	resume := newMessage(name)
	resume.Event_nr = udevFlags
	if _, err := c.send(unix.DM_DEV_SUSPEND, resume, nil); err != nil {
		return Device{}, fmt.Errorf("start mapping %s: %w", name, err)
	}
	device := Device{Name: name, Number: blockdev.FromDev(resume.Dev), Bytes: length}
	link := filepath.Join(c.dev, "mapper", name)
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return Device{}, err
	}
	if err := os.Symlink(filepath.Join("..", filepath.Base(device.Node())), link); err != nil {
		return Device{}, err
	}
	return device, nil
}

// Remove removes a mapping; one that is not there is no error. While somebody holds it open, Remove tries again until ctx ends and
// then fails with errdefs.ErrUnavailable.
func (c *Control) Remove(ctx context.Context, name string) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		remove := newMessage(name)
		remove.Event_nr = udevFlags
		_, err := c.send(unix.DM_DEV_REMOVE, remove, nil)
		if err == nil || errors.Is(err, unix.ENXIO) {
			break
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove mapping %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove mapping %s: still in use: %w: %w", name, ctx.Err(), errdefs.ErrUnavailable)
		case <-time.After(pause):
		}
	}
	if err := os.Remove(filepath.Join(c.dev, "mapper", name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Table is a mapping's live table as one line, in the form in which Target describes it.
func (c *Control) Table(name string) (string, error) {
	spec, params, err := c.target(name, unix.DM_STATUS_TABLE_FLAG)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d %d %s %s", spec.Sector_start, spec.Length, text(spec.Target_type[:]), params), nil
}

// Status is what a mapping's target reports about itself: nothing for Linear and Crypt; for Integrity the mismatches that it
// counted, the sectors that it provides and the progress of recalculation.
func (c *Control) Status(name string) (string, error) {
	_, status, err := c.target(name, 0)
	return status, err
}

func (c *Control) target(name string, flags uint32) (unix.DmTargetSpec, string, error) {
	m := newMessage(name)
	// Without DM_NOFLUSH_FLAG the kernel commits before it answers, which waits for the disk.
	m.Flags |= flags | unix.DM_NOFLUSH_FLAG
	payload, err := c.send(unix.DM_TABLE_STATUS, m, make([]byte, 4096))
	if err != nil {
		return unix.DmTargetSpec{}, "", fmt.Errorf("table of mapping %s: %w", name, err)
	}
	if m.Target_count == 0 {
		return unix.DmTargetSpec{}, "", fmt.Errorf("mapping %s has no table: %w", name, errdefs.ErrNotFound)
	}
	if m.Flags&unix.DM_BUFFER_FULL_FLAG != 0 || m.Target_count != 1 || len(payload) < targetSpecBytes {
		return unix.DmTargetSpec{}, "", fmt.Errorf("table of mapping %s is not one of ours: %w", name, errdefs.ErrFailedPrecondition)
	}
	return *(*unix.DmTargetSpec)(unsafe.Pointer(&payload[0])), text(payload[targetSpecBytes:]), nil
}

const (
	headerBytes     = int(unsafe.Sizeof(unix.DmIoctl{}))
	targetSpecBytes = int(unsafe.Sizeof(unix.DmTargetSpec{}))
)

func newMessage(name string) *unix.DmIoctl {
	// The minor version is the lowest that has what is used here, DM_SECURE_DATA_FLAG.
	m := &unix.DmIoctl{Version: [3]uint32{unix.DM_VERSION_MAJOR, 20, 0}}
	copy(m.Name[:unix.DM_NAME_LEN-1], name)
	return m
}

// send makes one ioctl. The payload follows the header; what the kernel puts in its place is returned and the header updated.
func (c *Control) send(request uint, m *unix.DmIoctl, payload []byte) ([]byte, error) {
	// uint64 because the kernel's structs want 8-byte alignment, which a []byte does not promise.
	aligned := make([]uint64, (headerBytes+len(payload)+7)/8)
	buffer := unsafe.Slice((*byte)(unsafe.Pointer(&aligned[0])), 8*len(aligned))
	header := (*unix.DmIoctl)(unsafe.Pointer(&buffer[0]))
	m.Data_size, m.Data_start = uint32(len(buffer)), uint32(headerBytes)
	*header = *m
	copy(buffer[headerBytes:], payload)
	if err := c.ioctl(request, buffer); err != nil {
		return nil, err
	}
	*m = *header
	start, end := int(m.Data_start), int(m.Data_size)
	if payload == nil || start > end || end > len(buffer) {
		return nil, nil
	}
	return buffer[start:end], nil
}

// encodeTarget writes a struct dm_target_spec and its parameters.
func encodeTarget(sectors uint64, target Target) []byte {
	params := target.params()
	payload := make([]byte, (targetSpecBytes+len(params)+1+7)/8*8)
	spec := unix.DmTargetSpec{Length: sectors, Next: uint32(len(payload))}
	copy(spec.Target_type[:], target.kind())
	copy(payload, unsafe.Slice((*byte)(unsafe.Pointer(&spec)), targetSpecBytes))
	copy(payload[targetSpecBytes:], params)
	return payload
}

// text is the string that a fixed field holds up to its first zero byte.
func text(field []byte) string {
	before, _, _ := bytes.Cut(field, []byte{0})
	return string(before)
}
