package main

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Host and guest speak over one virtio-serial port. The host sends one request as JSON; the guest sends
// frames: kind, length of the payload (big endian), payload. The last one says how the command ended.

const portName = "vmrun"

type request struct {
	Args    []string
	Dir     string // working directory
	Env     []string
	Shares  []share
	Modules string // lib/modules of the kernel, in the host's files
	Nested  bool
	Drivers []string // lists of modules that the disks need
}

// A share is a folder that the machine has read-write.
type share struct {
	Tag  string // of the 9p file system
	Path string // where it is mounted
}

type kind uint8

const (
	kindStdout kind = 1 + iota
	kindStderr
	kindExit  // payload: exit status, one byte
	kindError // payload: why the command could not be started
)

const maxPayload = 64 << 10

func writeFrame(w io.Writer, k kind, payload []byte) error {
	frame := make([]byte, 5, 5+len(payload))
	frame[0] = byte(k)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	_, err := w.Write(append(frame, payload...))
	return err
}

func readFrame(r io.Reader) (kind, []byte, error) {
	var header [5]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(header[1:])
	if n > maxPayload {
		return 0, nil, fmt.Errorf("frame of %d bytes", n)
	}
	payload := make([]byte, n)
	_, err := io.ReadFull(r, payload)
	return kind(header[0]), payload, err
}
