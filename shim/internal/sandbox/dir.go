package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/shim/atomicfile"
	"github.com/sealvol/sealvol/shim/hotplug"
	"github.com/sealvol/sealvol/shim/internal/process"
)

const (
	// separator stands between namespace and sandbox id in a folder's name;
	// neither can hold one.
	separator = ":"
	// link is what a bundle has that was started by us: it points to the folder.
	link = "sealvol"
	// maxSocket is how long a unix socket's path can be: sun_path without its NUL.
	maxSocket = 107
)

// dir is the folder of a sandbox: state.json, the socket that containerd
// connects to, and the lock. Whoever holds the lock owns the sandbox: the
// daemon as long as it lives, or a `delete` after it has died.
type dir struct {
	path      string
	namespace string
	sandbox   string
}

func newDir(root, namespace, sandbox string) (dir, error) {
	for _, id := range []string{namespace, sandbox} {
		if err := identifiers.Validate(id); err != nil {
			return dir{}, err
		}
	}
	d := dir{filepath.Join(root, namespace+separator+sandbox), namespace, sandbox}
	if len(d.socket()) > maxSocket {
		return dir{}, fmt.Errorf("%s: %d bytes, a socket's path has at most %d; choose a shorter state_dir: %w",
			d.socket(), len(d.socket()), maxSocket, errdefs.ErrInvalidArgument)
	}
	return d, nil
}

// parseDir is the reverse of newDir.
func parseDir(path string) (dir, error) {
	namespace, sandbox, _ := strings.Cut(filepath.Base(path), separator)
	d, err := newDir(filepath.Dir(path), namespace, sandbox)
	if err == nil && d.path != path {
		err = errdefs.ErrInvalidArgument
	}
	if err != nil {
		return dir{}, fmt.Errorf("%q is no folder of a sandbox: %w", path, err)
	}
	return d, nil
}

func (d dir) socket() string { return filepath.Join(d.path, "sock") }

func (d dir) lockPath() string { return filepath.Join(d.path, "lock") }

// remove removes the folder of a sandbox that has ended. The state goes last:
// as long as it is there a sweep knows that this is no folder in the making.
func (d dir) remove() error {
	for _, path := range []string{d.socket(), d.lockPath()} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.RemoveAll(d.path)
}

// mark is the environment entry of all that the sandbox runs.
func (d dir) mark() string { return "SEALVOL_SHIM_STATE=" + d.path }

// lock takes the sandbox, which must be there unless create is set. If another
// process has it the error is an errdefs.ErrUnavailable, if the sandbox is not
// there an errdefs.ErrNotFound.
func (d dir) lock(create bool) (*os.File, error) {
	file, err := os.OpenFile(d.lockPath(), os.O_RDWR, 0o600)
	for create && errors.Is(err, fs.ErrNotExist) { // A sweep may take the empty folder away.
		if err := os.MkdirAll(d.path, 0o700); err != nil {
			return nil, err
		}
		file, err = os.OpenFile(d.lockPath(), os.O_RDWR|os.O_CREATE, 0o600)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("sandbox %s: %w", d.sandbox, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		file.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errdefs.ErrUnavailable
		}
		return nil, fmt.Errorf("lock sandbox %s: %w", d.sandbox, err)
	}
	// Its owner may have removed the folder after the file was opened here.
	ours, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	current, err := os.Stat(file.Name())
	if err != nil || !os.SameFile(ours, current) {
		return nil, errors.Join(fmt.Errorf("sandbox %s: %w", d.sandbox, errdefs.ErrNotFound), file.Close())
	}
	return file, nil
}

// linkFrom notes in a bundle where its sandbox's folder is, for `delete`:
// containerd gives the configured environment to `start` alone.
func (d dir) linkFrom(bundle string) error {
	name := filepath.Join(bundle, link)
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Symlink(d.path, name)
}

// linked gives the folder that a bundle's link points to. A bundle that we
// did not start is an errdefs.ErrNotFound.
func linked(bundle string) (dir, error) {
	path, err := os.Readlink(filepath.Join(bundle, link))
	if errors.Is(err, fs.ErrNotExist) {
		return dir{}, fmt.Errorf("bundle %s is not ours: %w", bundle, errdefs.ErrNotFound)
	}
	if err != nil {
		return dir{}, err
	}
	return parseDir(path)
}

// search gives the folder of the sandbox that a container belongs to, for a
// container without a bundle. Without one the error is an errdefs.ErrNotFound.
func search(root, namespace, container string) (dir, error) {
	paths, err := filepath.Glob(filepath.Join(root, namespace+separator+"*"))
	if err != nil {
		return dir{}, err
	}
	for _, path := range paths {
		d, err := parseDir(path)
		if err != nil {
			continue
		}
		s, err := d.read()
		if _, has := s.Containers[container]; d.sandbox == container || err == nil && has {
			return d, nil
		}
	}
	return dir{}, fmt.Errorf("container %s belongs to no sandbox of ours: %w", container, errdefs.ErrNotFound)
}

const stateVersion = 1

// state is what outlives the daemon: what `delete` needs to end the sandbox.
// Records need no entry, see record.Dir.RemoveSandbox, nor do processes, see
// dir.mark; loop devices go away with the daemon.
type state struct {
	Version int `json:"version"`
	// StockShim is the program that the sandbox was started with.
	StockShim string `json:"stock_shim"`
	// Stock is the stock shim's process, and Socket where it listens.
	Stock  *process.ID `json:"stock,omitempty"`
	Socket string      `json:"socket,omitempty"`
	// Answer is what `start` answers to containerd.
	Answer []byte `json:"answer,omitempty"`
	// Containers are the bundles of the containers that the stock shim has, by id.
	Containers map[string]string `json:"containers"`
	// Devices are the numbers of the block devices that the stock shim has heard
	// of: the hypervisor may have one open for longer than the daemon lives.
	Devices []string `json:"devices,omitempty"`
}

func (d dir) statePath() string { return filepath.Join(d.path, "state.json") }

func (d dir) write(s state) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return atomicfile.Write(d.statePath(), data, 0o600)
}

// read reads the state strictly. One that does not fit is an errdefs.ErrDataLoss.
func (d dir) read() (state, error) {
	data, err := os.ReadFile(d.statePath())
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return state{}, err
	}
	s, err := parseState(data)
	if err != nil {
		return state{}, fmt.Errorf("%s: %w: %w", d.statePath(), err, errdefs.ErrDataLoss)
	}
	return s, nil
}

func parseState(data []byte) (state, error) {
	var s state
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&s); err != nil {
		return state{}, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return state{}, errors.New("trailing data")
	}
	if s.Version != stateVersion {
		return state{}, fmt.Errorf("version %d, not %d", s.Version, stateVersion)
	}
	if s.Stock != nil && s.Stock.Pid <= 1 {
		return state{}, fmt.Errorf("stock shim with pid %d", s.Stock.Pid)
	}
	paths := []string{s.StockShim}
	if s.Socket != "" {
		paths = append(paths, s.Socket)
	}
	for id, bundle := range s.Containers {
		if err := identifiers.Validate(id); err != nil {
			return state{}, err
		}
		paths = append(paths, bundle)
	}
	for _, path := range paths {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path {
			return state{}, fmt.Errorf("%q is not an absolute, clean path", path)
		}
	}
	for _, number := range s.Devices {
		if !numberRE.MatchString(number) {
			return state{}, fmt.Errorf("%q is no number of a block device", number)
		}
	}
	return s, nil
}

var numberRE = regexp.MustCompile(`^[0-9]{1,10}:[0-9]{1,10}$`)

// checkFree refuses a device that another sandbox has by its state, with an
// errdefs.ErrUnavailable. That sandbox's daemon may be dead, and its lock on the
// device free; the state stays until its hypervisor has ended.
func (d dir) checkFree(number hotplug.Device) error {
	paths, err := filepath.Glob(filepath.Join(filepath.Dir(d.path), "*"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		other, err := parseDir(path)
		if err != nil || other == d {
			continue
		}
		s, err := other.read()
		if errdefs.IsNotFound(err) {
			continue // It has not begun, or has just ended.
		}
		if err != nil {
			return fmt.Errorf("block device %s may be that of sandbox %s, which must be removed first: %w: %w", number, other.sandbox, err, errdefs.ErrUnavailable)
		}
		if slices.Contains(s.Devices, number.String()) {
			return fmt.Errorf("block device %s is that of another pod (sandbox %s), which must be removed first; or give this pod one of its own: %w",
				number, other.sandbox, errdefs.ErrUnavailable)
		}
	}
	return nil
}
