package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What a pod gets of the node, so that every run gives the same.
const (
	nodeName = "node-1"
	nodeIP   = "192.0.2.10"
	podIP    = "10.244.1.23"
	kubelet  = "/var/lib/kubelet/pods"
	logs     = "/var/log/pods"

	// claimPrefix and a name make the name of a persistent volume.
	claimPrefix = "pvc-"

	nodeMemory = 8 << 30 // bytes, for the score by which the kernel kills
)

// A pod is a template with what an API server and a scheduler add.
type pod struct {
	template
	objects *manifest
	uid     string
	volumes map[string]corev1.Volume
	devices map[string]string // sealed volume → block device of the node

	emptyDirs map[string]bool // those that are sealed
}

// newPod does what the workload's controller and the admission of service accounts do.
func newPod(t template, objects *manifest) *pod {
	p := &pod{template: t, objects: objects, volumes: map[string]corev1.Volume{}, devices: map[string]string{}, emptyDirs: map[string]bool{}}
	suffix := "-x2x4z"
	switch t.kind {
	case "Pod":
		suffix = ""
	case "StatefulSet":
		suffix = "-0"
	case "Deployment":
		suffix = "-7d9f8c6b5d-x2x4z"
	case "CronJob":
		suffix = "-28805797-x2x4z"
	}
	p.meta.Name = strings.TrimSuffix(t.name, "-") + suffix
	if p.meta.Namespace == "" {
		p.meta.Namespace = "default"
	}
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(p.meta.Namespace+"/"+p.meta.Name)))
	p.uid = strings.Join([]string{sum[:8], sum[8:12], "4" + sum[13:16], "8" + sum[17:20], sum[20:32]}, "-")
	if p.spec.ServiceAccountName == "" {
		p.spec.ServiceAccountName = "default"
	}
	if p.spec.AutomountServiceAccountToken == nil || *p.spec.AutomountServiceAccountToken {
		const token = "kube-api-access-x2x4z"
		p.spec.Volumes = append(p.spec.Volumes, corev1.Volume{Name: token, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{}}})
		for _, containers := range [][]corev1.Container{p.spec.InitContainers, p.spec.Containers} {
			for i := range containers {
				containers[i].VolumeMounts = append(containers[i].VolumeMounts, corev1.VolumeMount{
					Name: token, MountPath: "/var/run/secrets/kubernetes.io/serviceaccount", ReadOnly: true,
				})
			}
		}
	}
	for _, v := range p.spec.Volumes {
		p.volumes[v.Name] = v
	}
	p.takeRequests()
	return p
}

func (p *pod) dir(parts ...string) string {
	return filepath.Join(append([]string{kubelet, p.uid}, parts...)...)
}

// takeRequests takes out of the pod's annotations what they say of claims and of emptyDir volumes: those are sealed too, but by the
// recorder's own plugin, which plays their driver.
func (p *pod) takeRequests() {
	p.meta.Annotations = maps.Clone(p.meta.Annotations)
	for key, value := range p.meta.Annotations {
		var request struct{ Device, EmptyDir string }
		if !strings.HasPrefix(key, "volume.sealvol.io/") || json.Unmarshal([]byte(value), &request) != nil || request.Device != "" {
			continue
		}
		p.emptyDirs[request.EmptyDir] = true
		delete(p.meta.Annotations, key)
	}
}

// sealed tells whether a volume is one of ours.
func (p *pod) sealed(v corev1.Volume) bool {
	return v.Ephemeral != nil || v.PersistentVolumeClaim != nil || p.emptyDirs[v.Name]
}

// volumePath is where kubelet has a volume on the node.
func (p *pod) volumePath(v corev1.Volume) (string, error) {
	plugin := ""
	switch {
	case p.sealed(v):
		return p.dir("volumes/kubernetes.io~csi", claimPrefix+v.Name, "mount"), nil
	case v.EmptyDir != nil:
		plugin = "empty-dir"
	case v.ConfigMap != nil:
		plugin = "configmap"
	case v.Secret != nil:
		plugin = "secret"
	case v.Projected != nil:
		plugin = "projected"
	default:
		return "", fmt.Errorf("volume %s is of a kind that is not recorded", v.Name)
	}
	return p.dir("volumes/kubernetes.io~"+plugin, v.Name), nil
}

// makeVolumes makes what kubelet mounts before the pod's first container.
func (p *pod) makeVolumes() error {
	for _, v := range p.spec.Volumes {
		path, err := p.volumePath(v)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		files := map[string]string{}
		switch {
		case v.ConfigMap != nil:
			files = p.objects.configMaps[v.ConfigMap.Name].Data
		case v.Secret != nil:
			files = p.objects.secret(v.Secret.SecretName)
		case v.Projected != nil:
			files = map[string]string{"ca.crt": "", "namespace": p.meta.Namespace, "token": ""}
		}
		// Kubelet's files are links through a link, so that all of them change at once.
		if len(files) > 0 {
			if err := writeAtomically(path, files); err != nil {
				return err
			}
		}
	}
	return os.WriteFile(p.dir("etc-hosts"), []byte("127.0.0.1\tlocalhost\n"), 0o644)
}

func writeAtomically(dir string, files map[string]string) error {
	const stamp = "..2024_10_21_09_00_00.1234567890"
	if err := os.Mkdir(filepath.Join(dir, stamp), 0o755); err != nil {
		return err
	}
	if err := os.Symlink(stamp, filepath.Join(dir, "..data")); err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, stamp, name), []byte(text), 0o644); err != nil {
			return err
		}
		if err := os.Symlink("..data/"+name, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

func (m *manifest) secret(name string) map[string]string {
	s := m.secrets[name]
	data := maps.Clone(s.StringData)
	if data == nil {
		data = map[string]string{}
	}
	for key, value := range s.Data {
		data[key] = string(value)
	}
	return data
}

// sandbox is the pod as kubelet asks for it. It has the node's network, since the node has no CNI.
func (p *pod) sandbox() *cri.PodSandboxConfig {
	labels := map[string]string{
		"io.kubernetes.pod.name": p.meta.Name, "io.kubernetes.pod.namespace": p.meta.Namespace, "io.kubernetes.pod.uid": p.uid,
	}
	maps.Copy(labels, p.meta.Labels)
	annotations := map[string]string{"kubernetes.io/config.source": "api"}
	maps.Copy(annotations, p.meta.Annotations)
	hostname := p.spec.Hostname
	if hostname == "" {
		hostname = p.meta.Name
	}
	security := &cri.LinuxSandboxSecurityContext{
		NamespaceOptions: namespaces(),
		Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
	}
	if s := p.spec.SecurityContext; s != nil {
		security.RunAsUser, security.RunAsGroup, security.SupplementalGroups = number(s.RunAsUser), number(s.RunAsGroup), p.groups()
	}
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: p.meta.Name, Namespace: p.meta.Namespace, Uid: p.uid},
		Hostname:     hostname,
		LogDirectory: filepath.Join(logs, p.meta.Namespace+"_"+p.meta.Name+"_"+p.uid),
		DnsConfig: &cri.DNSConfig{
			Servers:  []string{"10.96.0.10"},
			Searches: []string{p.meta.Namespace + ".svc.cluster.local", "svc.cluster.local", "cluster.local"},
			Options:  []string{"ndots:5"},
		},
		Labels:      labels,
		Annotations: annotations,
		Linux:       &cri.LinuxPodSandboxConfig{CgroupParent: "/kubepods/pod" + p.uid, SecurityContext: security},
	}
}

func namespaces() *cri.NamespaceOption {
	return &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}
}

// groups are a pod's further groups; the volumes' group is one of them.
func (p *pod) groups() []int64 {
	s := p.spec.SecurityContext
	if s == nil {
		return nil
	}
	var groups []int64
	if s.FSGroup != nil {
		groups = append(groups, *s.FSGroup)
	}
	return append(groups, s.SupplementalGroups...)
}

func number(n *int64) *cri.Int64Value {
	if n == nil {
		return nil
	}
	return &cri.Int64Value{Value: *n}
}

// container is a container as kubelet asks for it; image is the id of its image.
func (p *pod) container(c corev1.Container, image string) (*cri.ContainerConfig, error) {
	env, values := p.environment(c)
	config := &cri.ContainerConfig{
		Metadata:   &cri.ContainerMetadata{Name: c.Name},
		Image:      &cri.ImageSpec{Image: image, UserSpecifiedImage: c.Image},
		Command:    expandAll(c.Command, values),
		Args:       expandAll(c.Args, values),
		WorkingDir: c.WorkingDir,
		Envs:       env,
		Labels: map[string]string{
			"io.kubernetes.container.name": c.Name, "io.kubernetes.pod.name": p.meta.Name, "io.kubernetes.pod.namespace": p.meta.Namespace, "io.kubernetes.pod.uid": p.uid,
		},
		Annotations: map[string]string{
			"io.kubernetes.container.hash":                     "5f8d2a1c",
			"io.kubernetes.container.restartCount":             "0",
			"io.kubernetes.container.terminationMessagePath":   "/dev/termination-log",
			"io.kubernetes.container.terminationMessagePolicy": "File",
			"io.kubernetes.pod.terminationGracePeriod":         "30",
		},
		LogPath:   c.Name + "/0.log",
		Stdin:     c.Stdin,
		StdinOnce: c.StdinOnce,
		Tty:       c.TTY,
		Linux:     &cri.LinuxContainerConfig{Resources: resources(c.Resources), SecurityContext: p.security(c.SecurityContext)},
	}
	for _, m := range c.VolumeMounts {
		v := p.volumes[m.Name]
		path, err := p.volumePath(v)
		if err != nil {
			return nil, err
		}
		if m.SubPath != "" || m.SubPathExpr != "" || m.MountPropagation != nil {
			return nil, fmt.Errorf("container %s: subPath and mountPropagation are not recorded", c.Name)
		}
		// What kubelet writes itself is never the container's to change.
		kubelets := v.ConfigMap != nil || v.Secret != nil || v.Projected != nil
		config.Mounts = append(config.Mounts, &cri.Mount{ContainerPath: m.MountPath, HostPath: path, Readonly: m.ReadOnly || kubelets})
	}
	for _, d := range c.VolumeDevices {
		config.Devices = append(config.Devices, &cri.Device{ContainerPath: d.DevicePath, HostPath: p.devices[d.Name], Permissions: "mrw"})
	}
	message := p.dir("containers", c.Name, "5d8f2a1c")
	if err := os.MkdirAll(filepath.Dir(message), 0o750); err != nil {
		return nil, err
	}
	config.Mounts = append(config.Mounts,
		&cri.Mount{ContainerPath: "/etc/hosts", HostPath: p.dir("etc-hosts")},
		&cri.Mount{ContainerPath: "/dev/termination-log", HostPath: message})
	return config, os.WriteFile(message, nil, 0o666)
}

// security is what a container's own security context and its pod's come to.
func (p *pod) security(own *corev1.SecurityContext) *cri.LinuxContainerSecurityContext {
	s := &cri.LinuxContainerSecurityContext{
		NamespaceOptions:   namespaces(),
		SupplementalGroups: p.groups(),
		// Kubelet's default for procMount.
		MaskedPaths: []string{
			"/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
			"/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
		},
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		Seccomp:       &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined},
	}
	if of := p.spec.SecurityContext; of != nil {
		s.RunAsUser, s.RunAsGroup = number(of.RunAsUser), number(of.RunAsGroup)
		if of.SeccompProfile != nil {
			s.Seccomp.ProfileType = cri.SecurityProfile_RuntimeDefault
		}
	}
	if own == nil {
		return s
	}
	if own.RunAsUser != nil {
		s.RunAsUser = number(own.RunAsUser)
	}
	if own.RunAsGroup != nil {
		s.RunAsGroup = number(own.RunAsGroup)
	}
	if own.SeccompProfile != nil {
		s.Seccomp.ProfileType = cri.SecurityProfile_RuntimeDefault
	}
	s.ReadonlyRootfs = own.ReadOnlyRootFilesystem != nil && *own.ReadOnlyRootFilesystem
	s.NoNewPrivs = own.AllowPrivilegeEscalation != nil && !*own.AllowPrivilegeEscalation
	if c := own.Capabilities; c != nil {
		s.Capabilities = &cri.Capability{}
		for _, name := range c.Add {
			s.Capabilities.AddCapabilities = append(s.Capabilities.AddCapabilities, string(name))
		}
		for _, name := range c.Drop {
			s.Capabilities.DropCapabilities = append(s.Capabilities.DropCapabilities, string(name))
		}
	}
	return s
}

// resources are a container's in the kernel's units.
func resources(r corev1.ResourceRequirements) *cri.LinuxContainerResources {
	milli := func(list corev1.ResourceList) int64 { return list.Cpu().MilliValue() }
	request, limit := milli(r.Requests), milli(r.Limits)
	if request == 0 {
		request = limit // the API server's default
	}
	memory := r.Requests.Memory().Value()
	if memory == 0 {
		memory = r.Limits.Memory().Value()
	}
	out := &cri.LinuxContainerResources{
		CpuPeriod:          100000,
		CpuQuota:           limit * 100,
		CpuShares:          max(2, request*1024/1000),
		MemoryLimitInBytes: r.Limits.Memory().Value(),
		OomScoreAdj:        1000,
	}
	if len(r.Requests)+len(r.Limits) > 0 {
		out.OomScoreAdj = min(999, max(3, 1000-1000*memory/nodeMemory))
	}
	return out
}

// environment is the container's: what its manifest says, then the API server's service; as a list and by name.
func (p *pod) environment(c corev1.Container) ([]*cri.KeyValue, map[string]string) {
	const host, port = "10.96.0.1", "443"
	service := map[string]string{
		"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port, "KUBERNETES_SERVICE_PORT_HTTPS": port,
		"KUBERNETES_PORT": "tcp://" + host + ":" + port, "KUBERNETES_PORT_443_TCP": "tcp://" + host + ":" + port,
		"KUBERNETES_PORT_443_TCP_PROTO": "tcp", "KUBERNETES_PORT_443_TCP_PORT": port, "KUBERNETES_PORT_443_TCP_ADDR": host,
	}
	known := maps.Clone(service)
	var env []*cri.KeyValue
	set := func(name, value string) {
		known[name] = value
		env = slices.DeleteFunc(env, func(v *cri.KeyValue) bool { return v.Key == name })
		env = append(env, &cri.KeyValue{Key: name, Value: []byte(value)})
	}
	for _, from := range c.EnvFrom {
		data := map[string]string{}
		if from.SecretRef != nil {
			data = p.objects.secret(from.SecretRef.Name)
		}
		if from.ConfigMapRef != nil {
			data = p.objects.configMaps[from.ConfigMapRef.Name].Data
		}
		for _, name := range slices.Sorted(maps.Keys(data)) {
			set(from.Prefix+name, data[name])
		}
	}
	for _, v := range c.Env {
		if v.ValueFrom == nil {
			set(v.Name, expand(v.Value, known))
		} else if value, ok := p.valueFrom(c, v.ValueFrom); ok {
			set(v.Name, value)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(service)) {
		if known[name] == service[name] {
			env = append(env, &cri.KeyValue{Key: name, Value: []byte(service[name])})
		}
	}
	return env, known
}

// valueFrom gives a value that is written elsewhere, and false for one that is optional and not there.
func (p *pod) valueFrom(c corev1.Container, from *corev1.EnvVarSource) (string, bool) {
	switch {
	case from.SecretKeyRef != nil:
		value, ok := p.objects.secret(from.SecretKeyRef.Name)[from.SecretKeyRef.Key]
		return value, ok
	case from.ConfigMapKeyRef != nil:
		value, ok := p.objects.configMaps[from.ConfigMapKeyRef.Name].Data[from.ConfigMapKeyRef.Key]
		return value, ok
	case from.ResourceFieldRef != nil:
		return strconv.FormatInt(c.Resources.Limits.Memory().Value(), 10), true
	}
	switch path := from.FieldRef.FieldPath; path {
	case "metadata.name":
		return p.meta.Name, true
	case "metadata.namespace":
		return p.meta.Namespace, true
	case "metadata.uid":
		return p.uid, true
	case "spec.nodeName":
		return nodeName, true
	case "status.hostIP":
		return nodeIP, true
	case "status.podIP":
		return podIP, true
	default:
		key, _ := strings.CutPrefix(path, "metadata.annotations['")
		return p.meta.Annotations[strings.TrimSuffix(key, "']")], true
	}
}

func expandAll(list []string, values map[string]string) []string {
	var out []string
	for _, s := range list {
		out = append(out, expand(s, values))
	}
	return out
}

// expand puts values in the place of $(NAME). $$ is a dollar; a name without a value stays as it is written.
func expand(s string, values map[string]string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(s, "$")
		b.WriteString(before)
		if !found {
			return b.String()
		}
		name, rest, closed := strings.Cut(strings.TrimPrefix(after, "("), ")")
		value, known := values[name]
		switch {
		case strings.HasPrefix(after, "$"):
			b.WriteString("$")
			s = after[1:]
		case strings.HasPrefix(after, "(") && closed && known:
			b.WriteString(value)
			s = rest
		case strings.HasPrefix(after, "(") && closed:
			b.WriteString("$(" + name + ")")
			s = rest
		default:
			b.WriteString("$")
			s = after
		}
	}
}
