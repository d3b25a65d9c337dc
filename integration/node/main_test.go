//go:build node

package node

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// every is set by `make test-node KINDS=all`: tables that are generated are played in full, and not a sample of them.
var every = os.Getenv("SEALVOL_NODE") == "all"

// theNode is started once by TestMain: it takes seconds, and a real node
// too serves many pods.
var theNode *Node

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	root, err := filepath.Abs("../..")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	began := time.Now()
	theNode, err = Start(ctx, root, func(step string) {
		fmt.Printf("[%5.1fs] node: %s\n", time.Since(began).Seconds(), step)
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		fmt.Fprintln(os.Stderr, (&Node{dir: Dir}).Logs(40))
		return 1
	}
	status := m.Run()
	if err := theNode.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return status
}

// scene is one test's view of the node. Whatever it makes is removed at the
// end, and then the host must look as it did before.
type scene struct {
	*testing.T
	ctx  context.Context
	node *Node
}

func newScene(t *testing.T) *scene {
	t.Helper()
	limit := 8 * time.Minute
	if every {
		limit = 3 * time.Hour
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	before, err := theNode.Residue(ctx)
	if err != nil {
		t.Fatal(err)
	}
	console := len(theNode.ConsoleLog())
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("console of the sandboxes:\n" + lastLines(theNode.ConsoleLog()[console:], 120))
			t.Log(theNode.Logs(25))
		}
	})
	// The last to run: the other clean-ups are registered later.
	s := &scene{T: t, ctx: ctx, node: theNode}
	t.Cleanup(func() { s.wantResidue(before) })
	return s
}

// wantResidue demands that the host soon looks as it did.
func (s *scene) wantResidue(before []string) {
	s.Helper()
	var after []string
	if err := poll(s.ctx, "the pods' residue to go", func() bool {
		var err error
		after, err = s.node.Residue(s.ctx)
		return err == nil && slices.Equal(before, after)
	}, 20*time.Second); err != nil {
		s.Errorf("the pods are gone but the host does not look as before (%v)\nbefore: %s\nafter:  %s", err, strings.Join(before, "\n        "), strings.Join(after, "\n        "))
	}
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// disk gives a backing file on the host and the block device over it.
func (s *scene) disk(size int64) (file, device string) {
	s.Helper()
	file, device, undo, err := s.node.Disk(s.ctx, fmt.Sprintf("disk-%d", s.node.files.Add(1)), size)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		if err := undo(); err != nil {
			s.Errorf("giving the disk back: %v", err)
		}
	})
	return file, device
}

// pod runs a sandbox that is removed at the end of the test.
func (s *scene) pod(p Pod) string {
	s.Helper()
	id, err := s.node.RunPod(s.ctx, p)
	if err != nil {
		s.Fatalf("a pod's sandbox must come up: %v", err)
	}
	s.Cleanup(func() {
		if err := s.node.RemovePod(context.WithoutCancel(s.ctx), id); err != nil {
			s.Errorf("removing the pod: %v", err)
		}
	})
	return id
}

// start runs a container and fails the test if that fails.
func (s *scene) start(pod string, p Pod, c Container) string {
	s.Helper()
	id, err := s.node.RunContainer(s.ctx, pod, p, c)
	if err != nil {
		s.Fatalf("starting container %s: %v", c.Name, err)
	}
	return id
}

// exec runs a command in a container and fails the test if that fails.
func (s *scene) exec(container string, args ...string) string {
	s.Helper()
	out, err := s.node.Exec(s.ctx, container, args...)
	if err != nil {
		s.Fatal(err)
	}
	return out
}
