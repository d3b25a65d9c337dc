// Package loop makes block devices of files. It is the shim's, and the CSI driver's. It imports no other package of the project.
package loop

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Attach puts a loop device on a file that is open for reading and writing, and
// gives the device, open. The file may be closed then. Flags are the kernel's
// LO_FLAGS (loop(4)); with LO_FLAGS_AUTOCLEAR the device goes away with its last
// user, also when that is killed, and without it by LOOP_CLR_FD alone.
func Attach(file *os.File, flags uint32) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()

	config := unix.LoopConfig{Fd: uint32(file.Fd())}
	// With direct I/O the host's page cache does not hold the volume a second
	// time. The kernel leaves it out where the file's file system has none.
	config.Info.Flags = flags | unix.LO_FLAGS_DIRECT_IO
	copy(config.Info.File_name[:len(config.Info.File_name)-1], file.Name())
	// Between the kernel's answer and ours another process may take the number.
	for range 100 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		node := fmt.Sprintf("/dev/loop%d", n)
		device, err := os.OpenFile(node, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if err == nil {
			return device, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach %s to %s: %w", file.Name(), node, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("no loop device stays free for %s: %w", file.Name(), errdefs.ErrUnavailable)
}
