// Command demo plays the session of sealvol's talk on a real node, and says
// with its exit status whether everything in it was so. It runs in a VM of its
// own: make demo.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/sealvol/sealvol/integration/node"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := play(ctx, os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: not so: %v\n", err)
		os.Exit(1)
	}
	fmt.Println("\ndemo: all of it was so")
}

const (
	secret   = "weights = load('mine alone')"
	diskSize = 256 << 20

	policyText = `package agent_policy

sealed_pod := {
  "version": 1,
  "containers": {"my-container": {
    "args": ["sleep", "infinity"],
    "exec": [["sh", "..."], ["df", "..."], ["cat", "..."]],
    "rootfs": "host"
  }},
  "volumes": {"encrypted": {
    "mode": "ephemeral",
    "layering": "memory-tags",
    "suites": ["aegis128-random", "aes-xts-random+hmac-sha256"],
    "fs_type": "ext4",
    "options": ["nosuid", "nodev"],
    "size": {"min": 0, "max": 10737418240},
    "mounts": [{"container": "my-container", "path": "/mnt/encrypted", "read_only": false}]
  }}
}
`
)

// stage prints the session: a line for each long step, then what was typed
// and what it gave.
type stage struct {
	node  *node.Node
	began time.Time
}

func (s *stage) progress(step string) {
	fmt.Printf("[%6.1fs] %s\n", time.Since(s.began).Seconds(), step)
}

func (s *stage) show(title, text string) {
	fmt.Printf("\n--- %s\n%s\n", title, strings.TrimSpace(text))
}

func play(ctx context.Context, root string) (err error) {
	s := &stage{began: time.Now()}
	s.node, err = node.Start(ctx, root, s.progress)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.node.Stop()) }()

	file, device, undo, err := s.node.Disk(ctx, "lent.img", diskSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, undo()) }()
	return s.session(ctx, file, device)
}

// session is the talk: a pod, its volume seen from inside, and the same
// volume seen from the host.
func (s *stage) session(ctx context.Context, file, device string) (err error) {
	key, value := node.VolumeAnnotation("encrypted", "/dev/encrypted", "/mnt/encrypted")
	pod := node.Pod{Name: "confidential", Annotations: map[string]string{key: value}, Policy: policyText}
	container := node.Container{
		Name: "my-container", Args: []string{"sleep", "infinity"},
		Devices: []node.Device{{HostPath: device, ContainerPath: "/dev/encrypted", Permissions: "rwm"}},
	}
	podJSON, containerJSON, err := node.Describe(pod, container)
	if err != nil {
		return err
	}
	s.show("the policy that travels with the pod", policyText)
	s.show("the pod, as crictl reads it", podJSON)
	s.show("its container", containerJSON)
	fmt.Println()

	s.progress("booting the pod's VM")
	sandbox, err := s.node.RunPod(ctx, pod)
	if err != nil {
		return s.withLogs(err)
	}
	removed := false
	remove := func() error {
		removed = true
		s.progress("removing the pod")
		return s.node.RemovePod(context.WithoutCancel(ctx), sandbox)
	}
	defer func() {
		if !removed {
			err = errors.Join(err, remove())
		}
	}()
	s.progress("starting the container: hot-plug, seal, mount")
	id, err := s.node.RunContainer(ctx, sandbox, pod, container)
	if err != nil {
		return s.withLogs(err)
	}
	s.progress("the container runs")

	if err := s.inside(ctx, id); err != nil {
		return s.withLogs(err)
	}
	if err := s.inspect(ctx, sandbox); err != nil {
		return s.withLogs(err)
	}
	if err := s.outside(file); err != nil {
		return err
	}
	fmt.Println()
	if err := remove(); err != nil {
		return err
	}
	return s.gone(ctx, device)
}

func (s *stage) inside(ctx context.Context, id string) error {
	df, err := s.node.Exec(ctx, id, "sh", "-c", "df -hTP | grep encrypted")
	if err != nil {
		return err
	}
	s.show("$ crictl exec my-container df -hTP | grep encrypted", df)
	if !strings.HasPrefix(df, "/dev/mapper/encrypted_disk_") {
		return errors.New("the volume is not mounted from /dev/mapper/encrypted_disk_*")
	}
	if _, err := s.node.Exec(ctx, id, "sh", "-c", fmt.Sprintf("echo %q > /mnt/encrypted/ai_model.py && sync", secret)); err != nil {
		return err
	}
	got, err := s.node.Exec(ctx, id, "cat", "/mnt/encrypted/ai_model.py")
	if err != nil {
		return err
	}
	s.show("$ crictl exec my-container cat /mnt/encrypted/ai_model.py", got)
	if got != secret {
		return fmt.Errorf("the container wrote %q and read %q", secret, got)
	}
	return nil
}

func (s *stage) inspect(ctx context.Context, sandbox string) error {
	out, err := s.node.Inspect(ctx, sandbox)
	if err != nil {
		return err
	}
	s.show("$ sealvol inspect "+sandbox[:13], out)
	for _, want := range []string{"encrypted_disk_", "_dif", "/mnt/encrypted"} {
		if !strings.Contains(out, want) {
			return fmt.Errorf("inspect does not show %q", want)
		}
	}
	return nil
}

// outside looks at the volume as the host does.
func (s *stage) outside(file string) error {
	disk, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	written := 0
	for at := 0; at < len(disk); at += 4096 {
		if len(bytes.Trim(disk[at:at+4096], "\x00")) > 0 {
			written++
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d blocks were written, all of them ciphertext\n", written, len(disk)/4096)
	for _, trace := range []string{secret, "ai_model.py", "lost+found"} {
		n := bytes.Count(disk, []byte(trace))
		fmt.Fprintf(&b, "grep -c %-30q %d\n", trace, n)
		if n > 0 {
			err = errors.Join(err, fmt.Errorf("the host's disk shows %q", trace))
		}
	}
	s.show("the backing disk, from the host", b.String())
	if written == 0 {
		err = errors.Join(err, errors.New("nothing was written to the host's disk"))
	}
	return err
}

// gone says whether the host holds anything of the pod, but for its disk.
func (s *stage) gone(ctx context.Context, device string) error {
	residue, err := s.node.Residue(ctx)
	if err != nil {
		return err
	}
	var left []string
	for _, r := range residue {
		if !strings.HasPrefix(r, "loop "+device+" ") {
			left = append(left, r)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("the pod is gone, and left %s", strings.Join(left, "; "))
	}
	s.progress("nothing of it is left on the host")
	return nil
}

func (s *stage) withLogs(err error) error {
	fmt.Fprintln(os.Stderr, s.node.Logs(40))
	return err
}
