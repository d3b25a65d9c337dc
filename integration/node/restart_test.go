//go:build node

package node

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
)

// worker keeps 1 MiB and its checksum in its volume, counts its runs there, and ends when it is told to: a container in a crash loop, or one with
// restartPolicy OnFailure.
const worker = `cd /mnt/encrypted || exit 1
if [ -e sum ]; then sha256sum -c sum || exit 2; else head -c 1048576 /dev/urandom > bytes && sha256sum bytes > sum || exit 3; fi
echo worker >> runs && cat runs
until [ -e /tmp/end ]; do sleep 0.1; done`

// restartPolicy has a container that comes and goes, and one that has the same volume and another one.
const restartPolicy = `package agent_policy

sealed_pod := {
	"version": 1,
	"containers": {
		"worker": {"args": ["sh", "-c", ` + "`" + worker + "`" + `], "exec": [["touch", "/tmp/end"]], "rootfs": "host"},
		"beside": {"args": ["sleep", "infinity"], "exec": [["sh", "..."]], "rootfs": "host"},
	},
	"volumes": {
		"encrypted": {"mode": "ephemeral", "size": {"max": 1073741824}, "mounts": [
			{"container": "worker", "path": "/mnt/encrypted"},
			{"container": "beside", "path": "/mnt/encrypted"},
		]},
		"spare": {"mode": "ephemeral", "size": {"max": 1073741824}, "mounts": [{"container": "beside", "path": "/spare"}]},
	},
}
`

// TestAContainerFindsItsDataEachTimeItIsCreatedAgain has a container run three times in one pod, ten times with KINDS=all. Kata unplugs the disk
// whenever nobody has the volume, and plugs it in again where there is room: for some of the runs the slot is taken by the disk of a container
// that was created meanwhile.
func TestAContainerFindsItsDataEachTimeItIsCreatedAgain(t *testing.T) {
	alone, together, again := 1, 1, 1
	if every {
		alone, together, again = 3, 3, 4
	}
	s := newScene(t)
	_, device := s.disk(64 * mib)
	_, spare := s.disk(64 * mib)
	pod := sealedPod("restarts")
	pod.Policy = restartPolicy
	id := s.pod(pod)
	ours := sealedContainer(device)
	ours.Name, ours.Args = "worker", []string{"sh", "-c", worker}
	beside := sealedContainer(device)
	beside.Name = "beside"
	// The disk at /spare is plugged in first, since it lies less deep.
	beside.Mounts = []Mount{{HostPath: s.directVolume(spare), ContainerPath: "/spare"}}

	var runs, slots []string
	run := func() {
		container := s.start(id, pod, ours)
		runs = append(runs, "worker")
		slots = append(slots, s.slot(id, "encrypted"))
		s.exec(container, "touch", "/tmp/end")
		if code := s.awaitEnd(container); code != "0" {
			t.Errorf("run %d of the container must find what it left in its volume, it exited with %s", len(runs), code)
		}
		want := strings.Join(runs, "\n")
		if len(runs) > 1 {
			want = "bytes: OK\n" + want
		}
		if got, err := s.node.Crictl(s.ctx, "logs", container); err != nil || got != want {
			t.Fatalf("the container must see all that was written before, and nothing else: got %q, %v, want %q", got, err, want)
		}
		s.crictl("rm", container)
	}
	for range alone {
		run()
	}
	other := s.start(id, pod, beside)
	for range together {
		s.exec(other, "sh", "-c", "echo beside >> /mnt/encrypted/runs")
		runs = append(runs, "beside")
		run()
		if got, want := s.exec(other, "sh", "-c", "cat /mnt/encrypted/runs"), strings.Join(runs, "\n"); got != want {
			t.Errorf("both containers have one volume, and each must see what the other wrote: got %q, want %q", got, want)
		}
	}
	stranger := ours
	stranger.Name = "stranger"
	_, err := s.node.RunContainer(s.ctx, id, pod, stranger)
	s.wantRefusal(err, "stranger", "container_declared")
	s.crictl("rm", "-f", other)
	for range again {
		run()
	}

	want := slices.Concat(slices.Repeat([]string{"02/01"}, alone), slices.Repeat([]string{"02/02"}, together), slices.Repeat([]string{"02/01"}, again))
	if !slices.Equal(slots, want) {
		t.Errorf("the test is about a disk that comes back in other slots: it was in %v, not in %v", slots, want)
	}
}

// slot is the PCI path of the disk that an open volume is on.
func (s *scene) slot(sandbox, volume string) string {
	s.Helper()
	out, err := s.node.Inspect(s.ctx, sandbox, "-o", "json")
	if err != nil {
		s.Fatal(err)
	}
	var report struct {
		Status struct {
			Volumes []struct {
				Name string `json:"name"`
				Path string `json:"pci_path"`
			} `json:"volumes"`
		} `json:"status"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		s.Fatal(err)
	}
	for _, v := range report.Status.Volumes {
		if v.Name == volume {
			return v.Path
		}
	}
	s.Fatalf("inspect shows no volume %s:\n%s", volume, out)
	return ""
}

// awaitEnd waits until a container has ended, and gives its exit status.
func (s *scene) awaitEnd(container string) (code string) {
	s.Helper()
	if err := poll(s.ctx, "the container to end", func() bool {
		out, err := s.node.Crictl(s.ctx, "inspect", "-o", "go-template", "--template", "{{.status.state}} {{.status.exitCode}}", container)
		state, exit, _ := strings.Cut(out, " ")
		code = exit
		return err == nil && state == "CONTAINER_EXITED"
	}, time.Minute); err != nil {
		s.Error(err)
	}
	return code
}

// crictl runs crictl and fails the test if that fails.
func (s *scene) crictl(args ...string) string {
	s.Helper()
	out, err := s.node.Crictl(s.ctx, args...)
	if err != nil {
		s.Fatal(err)
	}
	return out
}
