package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sealvol/sealvol/integration/node"
)

// rounds is how often each time is measured, interleaved.
const rounds = 3

// benchNode measures a node in a VM of its own.
func benchNode(root, benchmarks, output string) (err error) {
	measured, err := goBenchmarks(benchmarks, "BenchmarkRPC", "rpc_")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	n, err := node.Start(ctx, root, func(step string) { progress("%s", step) })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Stop()) }()

	for i := range rounds {
		progress("round %d of %d", i+1, rounds)
		for _, sealed := range []bool{false, true} {
			if err := round(ctx, n, sealed, measured.add); err != nil {
				return errors.Join(err, errors.New(n.Logs(30)))
			}
		}
	}
	results := measured.summarise()
	if err := write(output, results); err != nil {
		return err
	}
	printResults(results)
	return nil
}

// benchCSI gives what the CSI driver's benchmark measured, which ran before: the driver's protocol and that of Kata's agent cannot be in
// one program, since both register a csi.proto.
func benchCSI(benchmarks, output string) error {
	measured, err := goBenchmarks(benchmarks, "BenchmarkCSI", "csi_")
	if err != nil {
		return err
	}
	results := measured.summarise()
	if err := write(output, results); err != nil {
		return err
	}
	printResults(results)
	return nil
}

// goBenchmarks reads the metrics of a Go benchmark that have a name and a unit, of which it makes rows with a prefix: lines such as
//
//	BenchmarkRPC/StatsContainer/gate-2  9 21 ns/op  20.9 p50-µs  80.1 p99-µs
func goBenchmarks(file, benchmark, prefix string) (samples, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	measured := samples{}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || !strings.HasPrefix(fields[0], benchmark+"/") {
			continue
		}
		target, _, _ := strings.Cut(strings.TrimPrefix(fields[0], benchmark+"/"), "-")
		for i := 2; i+1 < len(fields); i += 2 {
			name, unit, ok := strings.Cut(fields[i+1], "-")
			if !ok {
				continue
			}
			v, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				return nil, fmt.Errorf("%s: %q: %w", file, line, err)
			}
			measured.add(prefix+name, target, unit, v)
		}
	}
	if len(measured) == 0 {
		return nil, fmt.Errorf("%s has no %s", file, benchmark)
	}
	return measured, nil
}

// round runs one pod with one container, and gives what it measured to add.
func round(ctx context.Context, n *node.Node, sealed bool, add func(bench, target, unit string, v float64)) (err error) {
	target := "without-volume"
	pod := node.Pod{Name: "bench", Policy: policyText(sealed)}
	container := node.Container{Name: "my-container", Args: []string{"sleep", "infinity"}}
	if sealed {
		target = "sealed-volume"
		_, device, undo, err := n.Disk(ctx, "bench.img", 1<<30)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, undo()) }()
		key, value := node.VolumeAnnotation("encrypted", "/dev/encrypted", "/mnt/encrypted")
		pod.Annotations = map[string]string{key: value}
		container.Devices = []node.Device{{HostPath: device, ContainerPath: "/dev/encrypted", Permissions: "rwm"}}
	}
	began := time.Now()
	id, err := n.RunPod(ctx, pod)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.RemovePod(context.WithoutCancel(ctx), id)) }()
	add("run_pod", target, "s", time.Since(began).Seconds())
	began = time.Now()
	if _, err := n.RunContainer(ctx, id, pod, container); err != nil {
		return err
	}
	add("run_container", target, "s", time.Since(began).Seconds())

	status, err := guestStatus(ctx, n, id)
	if err != nil {
		return err
	}
	for _, v := range status.Volumes {
		micros, err := strconv.ParseFloat(v.Counters.ReadyMicros, 64)
		if err != nil {
			return fmt.Errorf("ready_micros of volume %s: %w", v.Name, err)
		}
		add("seal_to_mounted", "memory-tags/"+v.Suite, "s", micros/1e6)
	}
	if !sealed {
		return nil
	}
	resident, err := strconv.ParseFloat(status.ResidentBytes, 64)
	if err != nil {
		return fmt.Errorf("resident_bytes: %w", err)
	}
	add("resident_memory", "sealvol-guest", "MiB", resident/(1<<20))
	for _, name := range []string{"sealvol-nri", "containerd-shim-kata-sealvol-v2"} {
		mib, err := residentMiB(name)
		if err != nil {
			return err
		}
		add("resident_memory", name, "MiB", mib)
	}
	return nil
}

func policyText(sealed bool) string {
	volumes := "{}"
	if sealed {
		volumes = `{"encrypted": {
    "mode": "ephemeral", "layering": "memory-tags",
    "suites": ["aegis128-random", "aes-xts-random+hmac-sha256"],
    "fs_type": "ext4", "options": ["nosuid", "nodev"],
    "size": {"min": 0, "max": 10737418240},
    "mounts": [{"container": "my-container", "path": "/mnt/encrypted", "read_only": false}]
  }}`
	}
	return `package agent_policy

sealed_pod := {
  "version": 1,
  "containers": {"my-container": {"args": ["sleep", "infinity"], "rootfs": "host"}},
  "volumes": ` + volumes + `
}
`
}

// status is the part of sealvol inspect's JSON that is measured. Protobuf's
// JSON has 64-bit numbers as strings.
type status struct {
	ResidentBytes string `json:"resident_bytes"`
	Volumes       []struct {
		Name, Suite string
		Counters    struct {
			ReadyMicros string `json:"ready_micros"`
		}
	}
}

func guestStatus(ctx context.Context, n *node.Node, sandbox string) (status, error) {
	text, err := n.Inspect(ctx, sandbox, "-o", "json")
	if err != nil {
		return status{}, err
	}
	var answer struct{ Status status }
	return answer.Status, json.Unmarshal([]byte(text), &answer)
}

// residentMiB gives the resident memory of the one process of that name.
func residentMiB(name string) (float64, error) {
	all, err := node.Processes()
	if err != nil {
		return 0, err
	}
	for _, p := range all {
		if p.Program != name {
			continue
		}
		return resident(strconv.Itoa(p.PID))
	}
	return 0, fmt.Errorf("no process %s", name)
}
