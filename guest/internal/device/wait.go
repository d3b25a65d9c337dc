package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Wait returns the disk at an address as soon as it is there. It waits for the kernel's uevents and for nothing else; when ctx ends
// first the error is errdefs.ErrUnavailable, and when what arrives is not one plain disk errdefs.ErrFailedPrecondition.
func Wait(ctx context.Context, sysfs string, address Address) (Disk, error) {
	// Subscribed before the first look, so that nothing arrives unseen between the two.
	events, err := subscribe()
	if err != nil {
		return Disk{}, err
	}
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	return wait(ctx, func() (Disk, error) { return Find(sysfs, address) }, func() error { return nextDisk(events) })
}

// wait looks again after each arrival until there is something.
func wait(ctx context.Context, look func() (Disk, error), arrival func() error) (Disk, error) {
	for {
		disk, err := look()
		if !errdefs.IsNotFound(err) {
			return disk, err
		}
		if ctx.Err() != nil {
			return Disk{}, fmt.Errorf("%v: %w: %w", err, ctx.Err(), errdefs.ErrUnavailable)
		}
		// An end by ctx is seen above, after one more look.
		if err := arrival(); err != nil && ctx.Err() == nil {
			return Disk{}, fmt.Errorf("wait for uevent: %w", err)
		}
	}
}

// kernelEvents is the multicast group of the kernel's own messages; udev's are in group 2.
const kernelEvents = 1

func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelEvents}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	// Non-blocking, so the file has deadlines.
	return os.NewFile(uintptr(fd), "uevents"), nil
}

// nextDisk returns when the kernel has said that a block device was added, or that it lost messages.
func nextDisk(events *os.File) error {
	conn, err := events.SyscallConn()
	if err != nil {
		return err
	}
	message := make([]byte, 8192) // the kernel's limit is 2048 bytes of variables and a path
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := conn.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), message, 0)
			return !errors.Is(recvErr, unix.EAGAIN)
		})
		if err != nil {
			return err
		}
		if errors.Is(recvErr, unix.ENOBUFS) {
			return nil
		}
		if recvErr != nil {
			return os.NewSyscallError("recvfrom", recvErr)
		}
		// Any process with the right may send to the group; port 0 is the kernel.
		if sender, ok := from.(*unix.SockaddrNetlink); ok && sender.Pid == 0 && announcesDisk(message[:n]) {
			return nil
		}
	}
}

// announcesDisk reads the first line of a message, "ACTION@DEVPATH".
func announcesDisk(message []byte) bool {
	line, _, _ := bytes.Cut(message, []byte{0})
	return bytes.HasPrefix(line, []byte("add@")) && bytes.Contains(line, []byte("/block/"))
}
