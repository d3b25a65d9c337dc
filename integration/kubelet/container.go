package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// lentContainer is what a container gets, in the words of crictl.
type lentContainer struct {
	Mounts  []mount  `json:"mounts"`
	Devices []device `json:"devices"`
}

type mount struct {
	ContainerPath string `json:"container_path"`
	HostPath      string `json:"host_path"`
	Readonly      bool   `json:"readonly,omitempty"`
}

type device struct {
	ContainerPath string `json:"container_path"`
	HostPath      string `json:"host_path"`
	Permissions   string `json:"permissions"`
}

// container is what a container of the pod gets: its volumes, the file of hosts and that of its last words.
func (k *kubelet) container(c corev1.Container, volumes []*volume) (lentContainer, error) {
	find := func(name string) (*volume, error) {
		at := slices.IndexFunc(volumes, func(v *volume) bool { return v.name == name })
		if at < 0 {
			return nil, fmt.Errorf("cannot find volume %q", name)
		}
		return volumes[at], nil
	}
	var l lentContainer
	for _, m := range c.VolumeMounts {
		v, err := find(m.Name)
		if err != nil {
			return lentContainer{}, err
		}
		l.Mounts = append(l.Mounts, mount{ContainerPath: m.MountPath, HostPath: v.target(k.pod), Readonly: m.ReadOnly})
	}
	for _, d := range c.VolumeDevices {
		v, err := find(d.Name)
		if err != nil {
			return lentContainer{}, err
		}
		l.Devices = append(l.Devices, device{ContainerPath: d.DevicePath, HostPath: v.device(k.pod), Permissions: "mrw"})
	}
	hosts, message := podDir(k.pod, "etc-hosts"), podDir(k.pod, "containers", c.Name, "5d8f2a1c")
	if err := os.MkdirAll(filepath.Dir(message), 0o750); err != nil {
		return lentContainer{}, err
	}
	if err := os.WriteFile(hosts, []byte("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), 0o644); err != nil {
		return lentContainer{}, err
	}
	l.Mounts = append(l.Mounts, mount{ContainerPath: "/etc/hosts", HostPath: hosts}, mount{ContainerPath: "/dev/termination-log", HostPath: message})
	return l, os.WriteFile(message, nil, 0o666)
}
