//go:build vm

package main

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// wantNothing demands that nothing of any volume is left on the node.
func wantNothing(t *testing.T, dir string) {
	t.Helper()
	for _, pattern := range []string{"volumes/*/*", "volumes/.*", "published/*", "published/.*", "mount", "block", "inline"} {
		if found, err := filepath.Glob(filepath.Join(dir, pattern)); err != nil || len(found) > 0 {
			t.Errorf("there is still %q (%v)", found, err)
		}
	}
	for _, backing := range loops(t) {
		text, err := os.ReadFile(backing)
		if err == nil && strings.HasPrefix(string(text), dir) {
			t.Errorf("there is still a loop device of %s", text)
		}
	}
}

// The driver is killed after each call. Another one goes on where it was: each
// call of kubelet's can be made again, and ends where it would have ended.
func TestVMADriverThatIsKilledBetweenCallsIsFollowedByAnother(t *testing.T) {
	dir := disk(t)
	socket, kill := startDriver(t, dir, unix.SIGKILL)
	c := connect(t, socket, true)
	for _, v := range volumes(dir) {
		for i, call := range append(v.up(c), v.down(c)...) {
			if err := call(t.Context()); err != nil {
				t.Fatalf("call %d of %s: %v", i, v.id, err)
			}
			kill()
			_, kill = startDriver(t, dir, unix.SIGKILL)
			if err := call(t.Context()); err != nil {
				t.Errorf("call %d of %s, made again: %v", i, v.id, err)
			}
		}
		wantNothing(t, dir)
	}
}

// The driver is killed while callers do all of it at once, at whatever step. When
// the callers have then made their calls again, nothing is left.
func TestVMADriverThatIsKilledAtWorkLeavesNothing(t *testing.T) {
	dir := disk(t)
	for round := range 4 {
		socket, kill := startDriver(t, dir, unix.SIGKILL)
		c := connect(t, socket, false)
		var work sync.WaitGroup
		var killed atomic.Bool
		started := make(chan struct{}, 6)
		for _, v := range volumes(dir) {
			work.Go(func() {
				defer func() { started <- struct{}{} }() // if it ends too early, so does the test
				for i := 0; ; i++ {
					for _, call := range append(v.up(c), v.down(c)...) {
						err := call(t.Context())
						if err != nil && !(status.Code(err) == codes.Unavailable && killed.Load()) {
							t.Errorf("%s: %v", v.id, err)
						}
						if err != nil {
							return
						}
					}
					if i == round { // each round a little later
						started <- struct{}{}
					}
				}
			})
		}
		<-started
		killed.Store(true)
		kill()
		work.Wait()

		socket, kill = startDriver(t, dir, unix.SIGTERM)
		c = connect(t, socket, false)
		for _, v := range volumes(dir) {
			for i, call := range v.down(c) {
				if err := call(t.Context()); err != nil {
					t.Errorf("%s: call %d after a kill: %v", v.id, i, err)
				}
			}
		}
		if response, err := c.ListVolumes(t.Context(), &csi.ListVolumesRequest{}); err != nil || len(response.Entries) > 0 {
			t.Errorf("there are volumes %v (%v)", response, err)
		}
		if _, err := kill(); err != nil {
			t.Errorf("the driver ended with %v", err)
		}
		wantNothing(t, dir)
	}
}
