// Package keyring keeps the keys of volumes, and lends them to the kernel while it loads a table.
//
// A key is made from the kernel's random generator in memory that is neither swapped nor dumped, and never leaves it but for the
// kernel's keyring, as a key of type "logon", which no process can read back, in the keyring of one thread; or for a pipe to the one
// process that works with it.
package keyring

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Key is a secret. It may be used by several goroutines at once.
type Key struct {
	mu     sync.Mutex
	size   int
	memory []byte // nil after Destroy
}

// New makes a random key of size bytes. The error is errdefs.ErrUnavailable while the kernel's random generator is not seeded.
func New(size int) (*Key, error) { return newKey(size, unix.Getrandom) }

func newKey(size int, random func([]byte, int) (int, error)) (*Key, error) {
	if size <= 0 {
		return nil, fmt.Errorf("key of %d bytes: %w", size, errdefs.ErrInvalidArgument)
	}
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("memory for a key: %w", err)
	}
	k := &Key{size: size, memory: memory}
	if err := k.fill(random); err != nil {
		return nil, errors.Join(err, k.Destroy())
	}
	return k, nil
}

func (k *Key) fill(random func([]byte, int) (int, error)) error {
	if err := unix.Mlock(k.memory); err != nil {
		return fmt.Errorf("lock a key's memory: %w", err)
	}
	if err := unix.Madvise(k.memory, unix.MADV_DONTDUMP); err != nil {
		return fmt.Errorf("keep a key out of core dumps: %w", err)
	}
	for filled := 0; filled < k.size; {
		// Once this succeeds the generator is seeded for good, also for the nonces that dm-crypt takes from it without asking.
		n, err := random(k.memory[filled:], unix.GRND_NONBLOCK)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("the guest's random generator is not seeded yet, give its VM a virtio-rng device: %w", errdefs.ErrUnavailable)
		}
		if err != nil {
			return fmt.Errorf("random key: %w", err)
		}
		filled += n
	}
	return nil
}

// Size is the key's length in bytes.
func (k *Key) Size() int { return k.size }

// Lend calls do while the kernel can find the key under the description, which must have the form "prefix:name". It can on the
// calling thread only, so that do must not start goroutines for what needs the key.
func (k *Key) Lend(description string, do func() error) (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.memory == nil {
		return fmt.Errorf("key is destroyed: %w", errdefs.ErrFailedPrecondition)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	id, err := unix.AddKey("logon", description, k.memory, unix.KEY_SPEC_THREAD_KEYRING)
	if err != nil {
		return fmt.Errorf("add key to the thread's keyring: %w", err)
	}
	defer func() {
		// Invalidated, a key is found by nobody from now on and the kernel overwrites it.
		if _, takeErr := unix.KeyctlInt(unix.KEYCTL_INVALIDATE, id, 0, 0, 0); takeErr != nil {
			err = errors.Join(err, fmt.Errorf("take key from the thread's keyring: %w", takeErr))
		}
	}()
	return do()
}

// maxPipe is what every pipe takes without anybody reading it.
const maxPipe = 4096

// Pipe returns a pipe that holds the key and ends behind it: the standard input of a process. The key is in no other memory of ours,
// and what is not read is gone when the last reader closes the pipe.
func (k *Key) Pipe() (*os.File, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.memory == nil {
		return nil, fmt.Errorf("key is destroyed: %w", errdefs.ErrFailedPrecondition)
	}
	if k.size > maxPipe {
		return nil, fmt.Errorf("key of %d bytes does not fit into a pipe: %w", k.size, errdefs.ErrInvalidArgument)
	}
	// Not os.Pipe, whose ends are non-blocking: the process would see that.
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe for a key: %w", err)
	}
	defer unix.Close(ends[1])
	reader := os.NewFile(uintptr(ends[0]), "key")
	n, err := unix.Write(ends[1], k.memory)
	if err == nil && n != k.size {
		err = io.ErrShortWrite
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pipe for a key: %w", err), reader.Close())
	}
	return reader, nil
}

// Destroy overwrites the key and frees its memory. Afterwards nothing can be done with it; a second call does nothing.
func (k *Key) Destroy() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.memory == nil {
		return nil
	}
	clear(k.memory)
	memory := k.memory
	k.memory = nil
	// KeepAlive so that the compiler may not find that nobody reads what clear wrote.
	runtime.KeepAlive(memory)
	return unix.Munmap(memory)
}
