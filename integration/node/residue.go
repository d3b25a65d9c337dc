package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Residue lists what pods have on the host at this moment: loop devices,
// direct-volume records, volumes and records of the CSI driver, kubelet's
// folders, state and sockets of shims and of Kata, bundles, mounts and
// processes. After the last pod was removed it is what it was before the first one.
func (n *Node) Residue(ctx context.Context) ([]string, error) {
	var found []string
	for _, pattern := range []string{
		"/run/kata-containers/shared/direct-volumes/*",
		"/run/kata-containers/shared/sandboxes/*",
		"/run/sealvol/shim/*",
		"/run/sealvol/direct/*",
		"/run/sealvol/published/*",
		CSIVolumes + "/*",
		CSIVolumes + "/.*",
		"/var/lib/kubelet/pods/*",
		"/var/lib/kubelet/plugins/kubernetes.io/csi/coco-local-csi/*",
		"/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/pvc-*",
		"/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/*/*",
		"/run/vc/sbs/*",
		"/run/vc/vm/*",
		filepath.Join(n.dir, "state/io.containerd.runtime.v2.task/k8s.io/*"),
		filepath.Join(n.dir, "s/*"),
	} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		found = append(found, paths...)
	}
	loops, err := n.run(ctx, "losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(loops) {
		found = append(found, "loop "+strings.TrimSpace(line))
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "kata") || strings.Contains(line, "sealvol/") || strings.Contains(line, "/kubelet/") {
			found = append(found, "mount "+strings.TrimSpace(line))
		}
	}
	processes, err := shimsAndVMs()
	if err != nil {
		return nil, err
	}
	found = append(found, processes...)
	slices.Sort(found)
	return found, nil
}

// shimsAndVMs lists the processes that belong to pods, by what they execute.
func shimsAndVMs() ([]string, error) {
	all, err := Processes()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, p := range all {
		if strings.HasPrefix(p.Program, "qemu-system") || strings.HasPrefix(p.Program, "containerd-shim-kata") {
			found = append(found, fmt.Sprintf("process %s %d", p.Program, p.PID))
		}
	}
	return found, nil
}

// Process is one process of the node.
type Process struct {
	PID int
	// Program is the last element of the path that it executes.
	Program string
}

// Processes lists what runs on the node at this moment.
func Processes() ([]Process, error) {
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var all []Process
	for _, path := range commands {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // The process has ended meanwhile.
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return nil, err
		}
		all = append(all, Process{pid, filepath.Base(strings.Split(string(text), "\x00")[0])})
	}
	return all, nil
}
