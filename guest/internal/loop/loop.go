// Package loop makes a block device of a file.
package loop

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Device is a loop device. It keeps its file alive and is gone when Close has been called and nothing else, no mapping, uses it.
type Device struct {
	Number blockdev.Number
	file   *os.File
}

// Attach makes a loop device of a file; blockBytes is the device's logical block size. The file may be closed afterwards.
func Attach(ctx context.Context, backing *os.File, blockBytes uint32) (*Device, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("loop device: %w", err)
		}
		index, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		device, err := configure(fmt.Sprintf("/dev/loop%d", index), backing, blockBytes)
		// Somebody else, or another volume that is sealed now, took it meanwhile.
		if errors.Is(err, unix.EBUSY) {
			continue
		}
		return device, err
	}
}

func configure(path string, backing *os.File, blockBytes uint32) (*Device, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	config := &unix.LoopConfig{
		Fd:   uint32(backing.Fd()),
		Size: blockBytes,
		// The kernel frees the device when its last user is gone, also when we are killed.
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR},
	}
	if err := unix.IoctlLoopConfigure(int(file.Fd()), config); err != nil {
		file.Close()
		return nil, fmt.Errorf("configure %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		file.Close()
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	return &Device{Number: blockdev.FromDev(st.Rdev), file: file}, nil
}

// Close lets go of the device.
func (d *Device) Close() error { return d.file.Close() }
