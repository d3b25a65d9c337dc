package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// errEOF ends the copy loops of Kata's shim, which stop at any error; an empty
// answer would make them spin.
var errEOF = errors.New("read meet eof")

// maxRead bounds one answer; Kata's shim asks for 32 KiB.
const maxRead = 1 << 20

// stdio is the agent's end of a process's standard I/O: three pipes, or the
// master of a terminal.
type stdio struct {
	in, out, err *os.File
	tty          *os.File
}

// childFiles are the process's ends of the pipes.
type childFiles struct{ in, out, err *os.File }

func (c *childFiles) Close() { closeAll(c.in, c.out, c.err) }

// newPipes makes the agent's ends pollable, so that deadlines and Close work,
// and leaves the process's ends blocking, as programs expect.
func newPipes() (_ *stdio, _ *childFiles, err error) {
	var agent, child [3]*os.File
	defer func() {
		if err != nil {
			closeAll(append(agent[:], child[:]...)...)
		}
	}()
	for i := range agent {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return nil, nil, err
		}
		ours, theirs := fds[0], fds[1]
		if i == 0 {
			ours, theirs = fds[1], fds[0]
		}
		child[i] = os.NewFile(uintptr(theirs), "child")
		if agent[i], err = pollable(ours, "pipe"); err != nil {
			return nil, nil, err
		}
	}
	return &stdio{in: agent[0], out: agent[1], err: agent[2]}, &childFiles{in: child[0], out: child[1], err: child[2]}, nil
}

// pollable takes over fd.
func pollable(fd int, name string) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (s *stdio) stdout() *os.File {
	if s.tty != nil {
		return s.tty
	}
	return s.out
}

// stderr is nil for a terminal, which has but one stream.
func (s *stdio) stderr() *os.File { return s.err }

// read returns what is there, at most n bytes, and blocks while there is
// nothing; errEOF at the end.
func read(f *os.File, n int) ([]byte, error) {
	if f == nil {
		return nil, errEOF
	}
	b := make([]byte, min(n, maxRead))
	n, err := f.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		n, err = readBuffered(f, b)
	}
	if n > 0 {
		return b[:n], nil
	}
	_ = err // EOF, EIO of a terminal without slaves, or closed: all the end
	return nil, errEOF
}

// readBuffered reads without waiting and without regard to the deadline.
func readBuffered(f *os.File, b []byte) (n int, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := rc.Control(func(fd uintptr) { n, err = unix.Read(int(fd), b) }); cerr != nil {
		return 0, cerr
	}
	return n, err
}

// write blocks until the process took everything, the deadline of ctx passed
// or the process ended.
func (s *stdio) write(ctx context.Context, b []byte) (int, error) {
	f := s.in
	if s.tty != nil {
		f = s.tty
	}
	deadline, _ := ctx.Deadline() // the zero time means none
	if err := f.SetWriteDeadline(deadline); err != nil {
		return 0, err
	}
	return f.Write(b)
}

// closeStdin does nothing to a terminal, as in the real agent.
func (s *stdio) closeStdin() error {
	if s.in == nil {
		return nil
	}
	if err := s.in.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

func (s *stdio) resize(rows, cols uint16) error {
	if s.tty == nil {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrInvalidArgument)
	}
	rc, err := s.tty.SyscallConn()
	if err != nil {
		return err
	}
	var ioctl error
	if err := rc.Control(func(fd uintptr) {
		ioctl = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	}); err != nil {
		return err
	}
	return ioctl
}

// exited is called when the process has ended. Children of it may keep the
// terminal open for ever, so from now on readers get only what is buffered.
// A pipe ends when its last writer does.
func (s *stdio) exited() {
	s.closeStdin()
	if s.tty != nil {
		s.tty.SetReadDeadline(time.Now())
	}
}

func (s *stdio) Close() { closeAll(s.in, s.out, s.err, s.tty) }

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// consoleSocket receives the master of a terminal from runc (--console-socket).
type consoleSocket struct {
	*net.UnixListener
	path string
}

func listenConsole(path string) (*consoleSocket, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return &consoleSocket{l, path}, nil
}

// receive is called when runc has ended, so what it sent is there.
func (c *consoleSocket) receive() (*stdio, error) {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	conn, err := c.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	defer conn.Close()
	name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(name, oob)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("console socket: no terminal received: %w", errors.Join(err, errdefs.ErrInvalidArgument))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	tty, err := pollable(fds[0], "tty")
	if err != nil {
		return nil, err
	}
	return &stdio{tty: tty}, nil
}
