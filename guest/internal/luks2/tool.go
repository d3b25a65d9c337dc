package luks2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/devmapper"
	"github.com/sealvol/sealvol/guest/internal/keyring"
	"github.com/sealvol/sealvol/guest/internal/noswap"
	"github.com/sealvol/sealvol/guest/internal/output"
)

const (
	// undoTimeout bounds what is done to leave nothing behind when the caller's context is over already.
	undoTimeout = 5 * time.Second
	// killDelay is how long cryptsetup may take to come to its end when it is told to.
	killDelay = time.Second
)

// Tool makes and opens volumes with cryptsetup. It may be used by several goroutines at once.
type Tool struct {
	run    runner
	memory func(name string, size uint64) (*os.File, error)
	mapper mapper
	sysfs  string // /sys
}

// runner runs one action of cryptsetup. The header is the process' descriptor headerFile, the key its standard input.
type runner func(ctx context.Context, header *os.File, key *keyring.Key, action string, flags ...string) error

type mapper interface {
	Find(name string) (devmapper.Device, error)
	Table(name string) (string, error)
	Remove(ctx context.Context, name string) error
}

// New makes a Tool of the cryptsetup at a path.
func New(cryptsetup string, control *devmapper.Control) *Tool {
	return &Tool{run: process(cryptsetup).run, memory: noswap.File, mapper: control, sysfs: "/sys"}
}

// headerFile is where cryptsetup finds the header, which has no other path. It opens it again.
const headerFile = "/proc/self/fd/3"

// common are the flags of every action.
var common = []string{
	"--batch-mode",    // no questions
	"--type=luks2",    // nothing else, whatever is found
	"--disable-locks", // the lock would be a file below /run; nobody else has this header
	"--header=" + headerFile,
	"--key-file=-", // all of standard input, whatever bytes there are
	// Less than that is an error, not a shorter key.
	fmt.Sprintf("--keyfile-size=%d", KeyBytes),
}

// process is the path of a cryptsetup.
type process string

func (p process) run(ctx context.Context, header *os.File, key *keyring.Key, action string, flags ...string) error {
	stdin, err := key.Pipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	said, err := output.New()
	if err != nil {
		return err
	}
	defer said.Close()
	cmd := exec.CommandContext(ctx, string(p), append(append([]string{action}, common...), flags...)...)
	cmd.Stdin = stdin
	cmd.ExtraFiles = []*os.File{header}
	cmd.Env = []string{
		"DM_DISABLE_UDEV=1", // there may be none to wait for, and it has no business with our mappings
		"LC_ALL=C",
	}
	cmd.Stdout, cmd.Stderr = said, said
	// It does not stop between two steps then, which would leave half a mapping; it is killed when that takes too long.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = killDelay
	err = cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("cryptsetup %s: %w", action, ctx.Err())
	}
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cryptsetup: %w: %w", errdefs.ErrFailedPrecondition, err)
	}
	err = fmt.Errorf("cryptsetup %s: %w: %q", action, err, output.Text(said))
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exitClasses[exit.ExitCode()] != nil {
		err = fmt.Errorf("%w: %w", err, exitClasses[exit.ExitCode()])
	}
	return err
}

// exitClasses are what cryptsetup(8) says of its exit codes. Of 1, "wrong parameters", there is no more to say: it is the code of every
// other failure, too.
var exitClasses = map[int]error{
	2: errdefs.ErrUnauthenticated,   // "no permission (bad passphrase)"
	3: errdefs.ErrResourceExhausted, // "out of memory"
	// "wrong device specified": also when the kernel takes no table, for want of a cipher or for what the disk's superblock says.
	4: errdefs.ErrFailedPrecondition,
	5: errdefs.ErrAlreadyExists, // "device already exists or device is busy"
}

// undoing is a context for what must be done though ctx has ended.
func undoing(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// and appends what the undo of err failed with.
func and(err, undo error) error {
	if undo == nil {
		return err
	}
	return fmt.Errorf("%w; %w", err, undo)
}
