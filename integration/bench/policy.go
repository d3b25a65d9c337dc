package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/sealvol/sealvol/policy"
)

// How often: each of policyRuns is one value of a row, and a decision's percentiles are of policyDecisions in a row.
const (
	policyRuns      = 5
	policyDecisions = 500
)

// benchPolicy measures what the guest does at SetPolicy and at each CreateContainer, for pods of one container and 1, 10 and 100 volumes,
// and the memory of a process that has the evaluator loaded. It needs no machine of its own.
func benchPolicy(output string) error {
	measured := samples{}
	for _, volumes := range []int{1, 10, 100} {
		progress("policy with %d volumes", volumes)
		for range policyRuns {
			if err := measurePolicy(volumes, measured.add); err != nil {
				return fmt.Errorf("%d volumes: %w", volumes, err)
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

// measurePolicy gives what it measured, once, to add.
func measurePolicy(volumes int, add func(bench, target, unit string, v float64)) error {
	ctx := context.Background()
	target := fmt.Sprintf("volumes-%d", volumes)
	text := []byte(manyVolumes(volumes))
	began := time.Now()
	p, err := policy.Load(ctx, text)
	if err != nil {
		return err
	}
	add("set_policy", target, "ms", time.Since(began).Seconds()*1e3)

	req, state := createManyVolumes(volumes)
	times := make([]time.Duration, policyDecisions)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range times {
		began := time.Now()
		if _, err := p.Decide(ctx, "CreateContainer", req, state); err != nil {
			return err
		}
		times[i] = time.Since(began)
	}
	runtime.ReadMemStats(&after)
	slices.Sort(times)
	at := func(q float64) float64 { return float64(times[int(q*float64(len(times)-1))].Nanoseconds()) / 1e3 }
	add("decide_p50", target, "µs", at(0.5))
	add("decide_p99", target, "µs", at(0.99))
	add("decide_allocs", target, "allocations", float64(after.Mallocs-before.Mallocs)/policyDecisions)

	debug.FreeOSMemory()
	mib, err := resident("self")
	if err != nil {
		return err
	}
	add("resident_memory", "evaluator-"+target, "MiB", mib)
	runtime.KeepAlive(p)
	return nil
}

// manyVolumes is the policy of a pod with one container that has all volumes.
func manyVolumes(n int) string {
	var b strings.Builder
	b.WriteString("package agent_policy\n\nsealed_pod := {\"version\": 1, \"containers\": {\"app\": {\"args\": [\"sleep\", \"infinity\"]}}, \"volumes\": {\n")
	for i := range n {
		fmt.Fprintf(&b, "  \"v%d\": {\"mode\": \"ephemeral\", \"size\": {\"min\": 1073741824, \"max\": 1073741824}, \"mounts\": [{\"container\": \"app\", \"path\": \"/mnt/v%d\"}]},\n", i, i)
	}
	b.WriteString("}}\n")
	return b.String()
}

// createManyVolumes is the request for that container, as Kata's runtime sends it, in a sandbox whose disks are there.
func createManyVolumes(n int) (*agent.CreateContainerRequest, policy.State) {
	const (
		share = "/run/kata-containers/shared/containers/"
		id    = "2222222222222222222222222222222222222222222222222222222222222222"
	)
	capabilities := strings.Fields("CAP_CHOWN CAP_DAC_OVERRIDE CAP_FSETID CAP_FOWNER CAP_MKNOD CAP_NET_RAW CAP_SETGID CAP_SETUID CAP_SETFCAP " +
		"CAP_SETPCAP CAP_NET_BIND_SERVICE CAP_SYS_CHROOT CAP_KILL CAP_AUDIT_WRITE")
	mount := func(destination, kind, source, options string) *agent.Mount {
		return &agent.Mount{Destination: destination, Type: kind, Source: source, Options: strings.Split(options, ",")}
	}
	req := &agent.CreateContainerRequest{
		ContainerId: id, ExecId: id,
		OCI: &agent.Spec{
			Version: "1.3.0",
			Process: &agent.Process{
				User: &agent.User{AdditionalGids: []uint32{0}}, Args: []string{"sleep", "infinity"}, Env: []string{"PATH=/bin", "HOSTNAME=node"}, Cwd: "/",
				Capabilities: &agent.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
			},
			Root: &agent.Root{Path: share + id + "/rootfs"},
			Mounts: []*agent.Mount{
				mount("/proc", "proc", "proc", "nosuid,noexec,nodev"),
				mount("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
				mount("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
				mount("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
				mount("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
				mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid,noexec,nodev,relatime,ro"),
				mount("/etc/hostname", "bind", share+id+"-hostname", "rbind,rprivate,rw"),
				mount("/etc/hosts", "bind", share+id+"-hosts", "rbind,rprivate,rw"),
				mount("/etc/resolv.conf", "bind", share+id+"-resolv.conf", "rbind,rprivate,rw"),
				mount("/dev/shm", "bind", "/run/kata-containers/sandbox/shm", "rbind"),
			},
			Annotations: map[string]string{
				"io.katacontainers.pkg.oci.container_type": "pod_container", "io.kubernetes.cri.container-type": "container",
				"io.kubernetes.cri.container-name": "app", "io.kubernetes.cri.image-name": "docker.io/library/busybox:latest",
				"io.kubernetes.cri.sandbox-id": "1111111111111111111111111111111111111111111111111111111111111111",
			},
			Linux: &agent.Linux{
				Resources: &agent.LinuxResources{}, CgroupsPath: "/k8s.io/" + id,
				Namespaces: []*agent.LinuxNamespace{{Type: "ipc"}, {Type: "uts"}, {Type: "mount"}},
			},
		},
	}
	state := policy.State{Containers: map[string]string{"1": ""}, Devices: map[string]policy.Device{}}
	for i := range n {
		slot := fmt.Sprintf("%02x/%02x", i/32+1, i%32)
		point := fmt.Sprintf("/run/kata-containers/sandbox/storage/%d", i)
		req.Storages = append(req.Storages, &agent.Storage{Driver: "blk", Source: slot, Fstype: "ext4", MountPoint: point})
		req.OCI.Mounts = append(req.OCI.Mounts, mount(fmt.Sprintf("/mnt/v%d", i), "bind", point, "rbind,rprivate,rw"))
		state.Devices[slot] = policy.Device{Plain: true, Bytes: 1 << 30}
	}
	return req, state
}

// resident gives the resident memory of a process, in MiB.
func resident(pid string) (float64, error) {
	text, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib float64
		if _, err := fmt.Sscanf(line, "VmRSS: %f kB", &kib); err == nil {
			return kib / 1024, nil
		}
	}
	return 0, fmt.Errorf("process %s has no VmRSS", pid)
}
