package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Roles of the processes that this program starts of itself, its first
// argument; containerd's arguments follow.
const (
	// RoleDaemon fronts the stock shim of one sandbox.
	RoleDaemon = "daemon"
	// RoleCleanup does what `delete` asks for. It is a process of its own
	// since containerd kills `delete` after five seconds.
	RoleCleanup = "cleanup"
)

// The descriptors that such a process starts with.
const (
	postFD = 3
	lockFD = 4
)

// letter is what such a process tells the one that containerd waits for.
type letter struct {
	Stdout []byte `json:"stdout,omitempty"`
	Error  string `json:"error,omitempty"`
}

// spawn starts this program again in another role and session, with more
// environment, and with no descriptor of containerd's but stdin: `start` has
// ended for containerd when nobody has its stdout and stderr open any more.
func spawn(role string, call Call, directory string, environment []string, files ...*os.File) (*post, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	here, there := os.NewFile(uintptr(pair[0]), "post"), os.NewFile(uintptr(pair[1]), "post")
	defer there.Close()
	command := exec.Command("/proc/self/exe", append([]string{role}, call.args()...)...)
	command.Args[0] = os.Args[0]
	command.Dir = directory
	command.Env = append(os.Environ(), environment...)
	command.Stdin = os.Stdin
	command.ExtraFiles = append([]*os.File{there}, files...)
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := command.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the %s: %w", role, err), here.Close())
	}
	return &post{here}, command.Process.Release()
}

// post is the connection between the two.
type post struct{ file *os.File }

func openPost() *post {
	unix.CloseOnExec(postFD)
	return &post{os.NewFile(postFD, "post")}
}

func (p *post) send(l letter) error { return json.NewEncoder(p.file).Encode(l) }

// receive waits for the letter. If the other process was killed the error is an errdefs.ErrAborted.
func (p *post) receive() ([]byte, error) {
	var l letter
	if err := json.NewDecoder(p.file).Decode(&l); err != nil {
		return nil, fmt.Errorf("it ended without an answer: %w: %w", err, errdefs.ErrAborted)
	}
	if l.Error != "" {
		return nil, errors.New(l.Error)
	}
	return l.Stdout, nil
}

// acknowledge says that what was received has arrived.
func (p *post) acknowledge() error {
	_, err := p.file.Write([]byte{1})
	return errors.Join(err, p.file.Close())
}

// acknowledged waits for that. It is false when the other side has ended.
func (p *post) acknowledged() bool {
	_, err := io.ReadFull(p.file, make([]byte, 1))
	return err == nil
}
