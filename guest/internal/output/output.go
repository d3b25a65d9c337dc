// Package output keeps what a program that we run says, for the message of an error.
//
// It is kept in a file in memory and not read from a pipe: a pipe has an end in every child that is just being started, so that a program that
// has ended would seem to be still saying something.
package output

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// maxBytes is how much of it a message has room for.
const maxBytes = 4096

// New makes an empty file, for a program's standard output and error.
func New() (*os.File, error) {
	fd, err := unix.MemfdCreate("output", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory for a program's output: %w", err)
	}
	return os.NewFile(uintptr(fd), "output"), nil
}

// Text is what was said, without the space around it, cut where it is long.
func Text(file *os.File) string {
	text := make([]byte, maxBytes)
	n, _ := file.ReadAt(text, 0) // it ends earlier, as a rule
	return string(bytes.TrimSpace(text[:n]))
}
