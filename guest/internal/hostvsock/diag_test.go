package hostvsock

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	t.Parallel()
	message := make([]byte, messageSize)
	message[0], message[1], message[2] = unix.AF_VSOCK, unix.SOCK_STREAM, stateListen
	binary.NativeEndian.PutUint32(message[8:], 1026)
	if port, listens, err := parse(message); err != nil || !listens || port != 1026 {
		t.Errorf("got %d, %v, %v", port, listens, err)
	}
	message[2] = 1 // established
	if _, listens, err := parse(message); err != nil || listens {
		t.Errorf("got %v, %v", listens, err)
	}
	message[0] = unix.AF_INET
	if _, _, err := parse(message); err == nil {
		t.Error("another family was taken")
	}
	if _, _, err := parse(message[:messageSize-1]); err == nil {
		t.Error("a short message was taken")
	}
}
