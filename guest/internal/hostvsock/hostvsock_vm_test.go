//go:build vm

package hostvsock_test

import (
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/sealvol/sealvol/guest/internal/hostvsock"
)

func TestListenersAreListed(t *testing.T) {
	l, err := vsock.ListenContextID(vsock.Local, 1026, nil)
	if err != nil {
		t.Fatal(err)
	}
	ports, err := hostvsock.Listeners()
	if err != nil || !slices.Contains(ports, 1026) {
		t.Errorf("got %v, %v", ports, err)
	}
	// A connection is no listener.
	c, err := vsock.Dial(vsock.Local, 1026, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	again, err := hostvsock.Listeners()
	if err != nil || len(again) != len(ports) {
		t.Errorf("with a connection: %v, %v", again, err)
	}
	l.Close()
	after, err := hostvsock.Listeners()
	if err != nil || slices.Contains(after, 1026) {
		t.Errorf("after closing: %v, %v", after, err)
	}
}

// A container in the guest dials the gate's port by loopback.
func TestPeersOtherThanTheHostAreClosed(t *testing.T) {
	var log strings.Builder
	l, err := hostvsock.Listen(1024, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}()
	for range 3 {
		c, err := vsock.Dial(vsock.Local, 1024, nil)
		if err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("the peer was served: %d, %v", n, err)
		}
		c.Close()
	}
	select {
	case err := <-accepted:
		t.Errorf("Accept returned %v", err)
	default:
	}
	l.Close()
	if err := <-accepted; err == nil {
		t.Error("accepted")
	}
	if !strings.Contains(log.String(), "not the host") {
		t.Errorf("log: %s", log.String())
	}
}
