// Package testbed runs guest/testbed, which seals volumes as the guest service does, for the tests and measurements that play the host
// or the containers. The volumes are in the same machine: an attached one can be used at its folder.
package testbed

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// Config says how a testbed is started.
type Config struct {
	Program string    // build/testbed
	Dir     string    // a folder of its own
	Policy  string    // the text
	Log     io.Writer // what the service would log
}

// Bed is a running testbed. It may be used by several goroutines at once; requests do not wait for one another.
type Bed struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when the process has ended and waitErr is there
	err   error

	mu      sync.Mutex
	stdin   io.WriteCloser
	last    uint64
	waiting map[uint64]chan Answer // nil when nothing comes any more
}

// Start starts a testbed, which lives until Close or Kill.
func Start(config Config) (*Bed, error) {
	policy := filepath.Join(config.Dir, "policy.rego")
	if err := os.WriteFile(policy, []byte(config.Policy), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(config.Program, "-dir", config.Dir, "-policy", policy)
	cmd.Stderr = config.Log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	b := &Bed{cmd: cmd, ended: make(chan struct{}), stdin: stdin, waiting: map[uint64]chan Answer{}}
	go func() {
		defer close(b.ended)
		readErr := b.receive(stdout)
		b.err = errors.Join(readErr, cmd.Wait())
	}()
	return b, nil
}

// receive passes answers on until there are no more.
func (b *Bed) receive(stdout io.Reader) error {
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, waiting := range b.waiting {
			close(waiting)
		}
		b.waiting = nil
	}()
	in := bufio.NewReader(stdout)
	for {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var answer Answer
		if err := json.Unmarshal(line, &answer); err != nil {
			return fmt.Errorf("answer %q: %w", line, err)
		}
		b.mu.Lock()
		waiting, ok := b.waiting[answer.ID]
		delete(b.waiting, answer.ID)
		b.mu.Unlock()
		if !ok {
			return fmt.Errorf("answer to no request: %q", line)
		}
		waiting <- answer
	}
}

// errEnded says that the testbed is not there to answer.
var errEnded = errors.New("the testbed has ended")

// call makes a request; its limit is ctx's deadline. An error of the testbed's has its class of errdefs.
func (b *Bed) call(ctx context.Context, r Request) (Answer, error) {
	if deadline, ok := ctx.Deadline(); ok {
		r.Timeout = time.Until(deadline).String()
	}
	done := make(chan Answer, 1)
	if err := b.send(r, done); err != nil {
		return Answer{}, err
	}
	// Not for ctx's end: the testbed keeps it, and that it does is part of what is tested.
	answer, ok := <-done
	if !ok {
		return Answer{}, errEnded
	}
	if answer.Error != "" {
		return answer, errgrpc.ToNative(status.Error(class(answer.Class), answer.Error))
	}
	return answer, nil
}

func (b *Bed) send(r Request, done chan Answer) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiting == nil {
		return errEnded
	}
	b.last++
	r.ID = b.last
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	b.waiting[r.ID] = done
	if _, err := b.stdin.Write(append(line, '\n')); err != nil {
		delete(b.waiting, r.ID)
		return err
	}
	return nil
}

// class is the code of a name that codes.Code.String gives.
func class(name string) codes.Code {
	for code := codes.OK; code <= codes.Unauthenticated; code++ {
		if code.String() == name {
			return code
		}
	}
	return codes.Unknown
}

// Acquire makes a volume ready for a container, on the disk at a PCI path.
func (b *Bed) Acquire(ctx context.Context, container, volume, path string) error {
	_, err := b.call(ctx, Request{Do: DoAcquire, Container: container, Volume: volume, Path: path})
	return err
}

// Release takes a container's volumes from it.
func (b *Bed) Release(ctx context.Context, container string) error {
	_, err := b.call(ctx, Request{Do: DoRelease, Container: container})
	return err
}

// Attach attaches a volume at the returned folder, until Detach.
func (b *Bed) Attach(volume string) (dir string, err error) {
	answer, err := b.call(context.Background(), Request{Do: DoAttach, Volume: volume})
	return answer.Dir, err
}

// Detach takes a volume from its folder.
func (b *Bed) Detach(volume string) error {
	_, err := b.call(context.Background(), Request{Do: DoDetach, Volume: volume})
	return err
}

// At calls do with the folder where a volume is attached meanwhile.
func (b *Bed) At(volume string, do func(dir string) error) (err error) {
	dir, err := b.Attach(volume)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Detach(volume)) }()
	return do(dir)
}

// Number is the device number of a volume's file system, "major:minor".
func (b *Bed) Number(volume string) (string, error) {
	answer, err := b.call(context.Background(), Request{Do: DoNumber, Volume: volume})
	return answer.Number, err
}

// Status is what the guest's control service would say about each volume.
func (b *Bed) Status() ([]*sealvolv1.Volume, error) {
	answer, err := b.call(context.Background(), Request{Do: DoStatus})
	if err != nil {
		return nil, err
	}
	volumes := make([]*sealvolv1.Volume, len(answer.Status))
	for i, text := range answer.Status {
		volumes[i] = &sealvolv1.Volume{}
		if err := protojson.Unmarshal(text, volumes[i]); err != nil {
			return nil, err
		}
	}
	return volumes, nil
}

// Volume is the status of one volume.
func (b *Bed) Volume(name string) (*sealvolv1.Volume, error) {
	volumes, err := b.Status()
	if err != nil {
		return nil, err
	}
	for _, v := range volumes {
		if v.Name == name {
			return v, nil
		}
	}
	return nil, fmt.Errorf("the testbed has no volume %s", name)
}

// Destroy ends all volumes, as the end of the sandbox does. Volumes that are acquired afterwards are new ones.
func (b *Bed) Destroy(ctx context.Context) error {
	_, err := b.call(ctx, Request{Do: DoDestroy})
	return err
}

// Memory is what the testbed holds, after it has given back what it does not need.
func (b *Bed) Memory() (Memory, error) {
	answer, err := b.call(context.Background(), Request{Do: DoMemory})
	if err != nil {
		return Memory{}, err
	}
	return *answer.Memory, nil
}

// Pid is the testbed's process.
func (b *Bed) Pid() int { return b.cmd.Process.Pid }

// Wait waits until the testbed has ended and says how.
func (b *Bed) Wait() *os.ProcessState {
	<-b.ended
	return b.cmd.ProcessState
}

// Close ends the testbed in order: it destroys its volumes. The error is of that, or that it had ended before.
func (b *Bed) Close() error {
	b.mu.Lock()
	err := b.stdin.Close()
	b.mu.Unlock()
	<-b.ended
	return errors.Join(err, b.err)
}

// Kill ends the testbed as kill -9 does.
func (b *Bed) Kill() error {
	err := b.cmd.Process.Kill()
	<-b.ended
	return err
}
