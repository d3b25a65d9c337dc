//go:build vm

package keyring

import (
	"errors"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func find(description string) error {
	_, err := unix.KeyctlSearch(unix.KEY_SPEC_THREAD_KEYRING, "logon", description, 0)
	return err
}

func TestKernelFindsALentKeyOnThisThreadAlone(t *testing.T) {
	const description = "sealvol:test"
	key, err := New(32)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	failure := errors.New("failure of the caller's")
	err = key.Lend(description, func() error {
		id, err := unix.KeyctlSearch(unix.KEY_SPEC_THREAD_KEYRING, "logon", description, 0)
		if err != nil {
			t.Errorf("lent key: %v", err)
		}
		if _, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, make([]byte, 32), 0); err == nil {
			t.Error("a process can read the key back")
		}
		elsewhere := make(chan error)
		go func() {
			runtime.LockOSThread() // until the goroutine's end, which ends the thread
			elsewhere <- find(description)
		}()
		if err := <-elsewhere; err == nil {
			t.Error("another thread finds the key")
		}
		return failure
	})
	if !errors.Is(err, failure) {
		t.Error(err)
	}
	if err := find(description); err == nil {
		t.Error("the key is found after it was taken back")
	}
}
