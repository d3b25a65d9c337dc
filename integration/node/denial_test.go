//go:build node

package node

import (
	"path/filepath"
	"strings"
	"testing"

	nri "github.com/containerd/nri/pkg/api"
)

// denialPolicy has a container without volumes, and others that never come as they are declared.
const denialPolicy = `package agent_policy

sealed_pod := {
	"version": 1,
	"containers": {
		"helper": {"args": ["sleep", "infinity"], "exec": [["true"]], "rootfs": "host"},
		"my-container": {"args": ["sleep", "infinity"]},
		"pinned": {"image": "registry.example.com/pinned:1"},
		"twice": {},
	},
	"volumes": {
		"encrypted": {"mode": "ephemeral", "size": {"max": 1073741824}, "mounts": [
			{"container": "my-container", "path": "/mnt/encrypted"},
			{"container": "twice", "path": "/mnt/encrypted"},
		]},
		"other": {"mode": "ephemeral", "size": {"max": 1073741824}, "mounts": [{"container": "twice", "path": "/mnt/other"}]},
	},
}
`

// A denial is what the person at crictl goes by: one line that names the container, the rule, what is wrong and what to do. The pod asks
// for no volume, so that the plugin lets everything pass to the guest.
func TestEachDenialIsOneLineThatSaysWhatToDo(t *testing.T) {
	s := newScene(t)
	pod := Pod{Name: "denied", Policy: denialPolicy}
	id := s.pod(pod)
	_, device := s.disk(16 * mib)
	direct, again := s.directVolume(device), s.directVolume(device)
	mount := func(destination, kind, source string, options ...string) func(*nri.ContainerAdjustment) {
		return func(a *nri.ContainerAdjustment) {
			a.AddMount(&nri.Mount{Destination: destination, Type: kind, Source: source, Options: options})
		}
	}
	tests := map[string]struct {
		rule      string    // that of the test's name unless it is given
		container Container // a Name and Args are helper's unless they are given
		hostile   func(*nri.ContainerAdjustment)
		culprit   string // what is wrong
		step      string // what to do
	}{
		"container_declared": {container: Container{Name: "stranger"}, culprit: "stranger", step: "add it to sealed_pod.containers"},
		"args":               {container: Container{Args: []string{"sleep", "1"}}, culprit: "sleep 1", step: "correct sealed_pod.containers or the pod"},
		"image":              {container: Container{Name: "pinned"}, culprit: BusyboxImage, step: "correct sealed_pod.containers or the pod"},
		"capabilities":       {container: Container{Capabilities: []string{"SYS_ADMIN"}}, culprit: "CAP_SYS_ADMIN", step: "drop it from the pod's security context"},
		"mounts":             {container: Container{Mounts: []Mount{{HostPath: filepath.Join(s.node.dir, "opt"), ContainerPath: "/host"}}}, culprit: "/host", step: "remove it from the pod"},
		"storages":           {container: Container{Mounts: []Mount{{HostPath: direct, ContainerPath: "/offered"}}}, culprit: "blk at /offered", step: "name it in sealed_pod.volumes"},
		"two volumes on one device": {
			rule: "volume_storage",
			container: Container{Name: "twice", Mounts: []Mount{
				{HostPath: direct, ContainerPath: "/mnt/encrypted"}, {HostPath: again, ContainerPath: "/mnt/other"},
			}},
			culprit: "encrypted at /mnt/encrypted", step: "see that plugin and shim run",
		},
		"volume_missing":  {container: Container{Name: "my-container"}, culprit: "encrypted at /mnt/encrypted", step: "ask for it in the pod"},
		"volume_storage":  {container: Container{Name: "my-container"}, hostile: mount("/mnt/encrypted", "tmpfs", "tmpfs", "rw"), culprit: "encrypted at /mnt/encrypted", step: "see that plugin and shim run"},
		"volume_shadowed": {container: Container{Name: "my-container"}, hostile: mount("/mnt", "tmpfs", "tmpfs", "rw"), culprit: "/mnt", step: "remove it from the pod"},
		"annotations":     {hostile: func(a *nri.ContainerAdjustment) { a.AddAnnotation("example.com/note", "y") }, culprit: "example.com/note", step: "do not pass it on"},
		"sysctl":          {hostile: func(a *nri.ContainerAdjustment) { a.SetLinuxSysctl("kernel.core_pattern", "|/x") }, culprit: "kernel.core_pattern", step: "remove it from the pod"},
		"namespaces": {
			hostile: func(a *nri.ContainerAdjustment) { a.RemoveNamespace(&nri.LinuxNamespace{Type: "mount"}) },
			culprit: "mount namespace", step: "must not change them",
		},
		"cgroup": {hostile: func(a *nri.ContainerAdjustment) { a.SetLinuxCgroupsPath("/sealvol/elsewhere") }, culprit: "/sealvol/elsewhere", step: "must not change it"},
		"device_nodes": {
			hostile: func(a *nri.ContainerAdjustment) {
				a.AddDevice(&nri.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229})
			},
			culprit: "/dev/fuse", step: "remove it from the pod",
		},
	}
	for name, test := range tests {
		s.Run(name, func(t *testing.T) {
			s := &scene{T: t, ctx: s.ctx, node: s.node}
			rule, c := test.rule, test.container
			if rule == "" {
				rule = name
			}
			if c.Name == "" {
				c.Name = "helper"
			}
			if c.Args == nil {
				c.Args = []string{"sleep", "infinity"}
			}
			if test.hostile != nil {
				s.hostilePlugin(test.hostile)
			}
			_, err := s.node.RunContainer(s.ctx, id, pod, c)
			s.wantDenial(err, rule, `container "`+c.Name+`"`, test.culprit, test.step)
		})
	}

	container := s.start(id, pod, Container{Name: "helper", Args: []string{"sleep", "infinity"}})
	s.Run("container_live", func(t *testing.T) {
		s := &scene{T: t, ctx: s.ctx, node: s.node}
		_, err := s.node.RunContainer(s.ctx, id, pod, Container{Name: "helper", Args: []string{"sleep", "infinity"}})
		s.wantDenial(err, "container_live", `container "helper"`, "running already", "remove it first")
	})
	s.Run("exec", func(t *testing.T) {
		s := &scene{T: t, ctx: s.ctx, node: s.node}
		_, err := s.node.Exec(s.ctx, container, "sh", "-c", "true")
		s.wantDenial(err, "exec", `container "helper"`, "sh -c true", "add it to the container's exec")
	})
}

func TestContainersThatSeeEachOthersProcessesAreRefused(t *testing.T) {
	s := newScene(t)
	pod := Pod{Name: "shared", Policy: denialPolicy, SharedProcesses: true}
	_, err := s.node.RunContainer(s.ctx, s.pod(pod), pod, Container{Name: "helper", Args: []string{"sleep", "infinity"}})
	s.wantDenial(err, "pid_namespace", `container "helper"`, "processes of other containers", "shareProcessNamespace: false")
}

// wantDenial says that a line of the error holds all that a person needs, and that the denial does not go on in another one.
func (s *scene) wantDenial(err error, rule, subject, culprit, step string) {
	s.Helper()
	if err == nil {
		s.Fatalf("rule %s must deny this, but it went through", rule)
	}
	for line := range strings.Lines(err.Error()) {
		_, denial, found := strings.Cut(line, "policy denies ")
		if !found {
			continue
		}
		for _, want := range []string{subject, "(rule " + rule + ")", culprit, step, "permission denied"} {
			// crictl quotes what it was told once more.
			if !strings.Contains(strings.ReplaceAll(denial, `\"`, `"`), want) {
				s.Errorf("the line must say %q: %s", want, line)
			}
		}
		return
	}
	s.Fatalf("rule %s must deny this in a line of its own, crictl says: %v", rule, err)
}
