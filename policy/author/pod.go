package author

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
)

// defaultCapabilities are those of CRI, which containers of a sealed pod may have.
var defaultCapabilities = []string{
	"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID",
	"SETPCAP", "SETUID", "SYS_CHROOT",
}

// safeSysctls is Kubernetes' safe set (kubernetes.io/docs/tasks/administer-cluster/sysctl-cluster), which the guest allows.
var safeSysctls = []string{
	"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.ip_unprivileged_port_start",
	"net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes",
	"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem",
}

// checkPod says now what the guest would refuse when the pod runs.
func checkPod(r *report, template podTemplate, volumes []volume) {
	spec := template.Spec
	denied := func(field, why string) {
		r.refuse(errdefs.ErrFailedPrecondition, "%s.%s: %s", template.field, field, why)
	}
	if spec.HostPID {
		denied("hostPID", "the container would see the processes of others, and so their volumes; remove it")
	}
	if spec.ShareProcessNamespace != nil && *spec.ShareProcessNamespace {
		denied("shareProcessNamespace", "each container would see the processes of others, and so their volumes; remove it")
	}
	if spec.HostUsers != nil && !*spec.HostUsers {
		denied("hostUsers", "user namespaces are not for sealed pods; remove it")
	}
	if len(spec.ResourceClaims) > 0 {
		denied("resourceClaims", "devices of the node would reach the containers raw; remove them")
	}
	if spec.RuntimeClassName == nil {
		r.warn("%s.runtimeClassName is not there: without a class of Kata's the pod runs on the node itself, and nothing is sealed", template.field)
	}
	if security := spec.SecurityContext; security != nil {
		if g := security.FSGroup; g != nil && (*g < 0 || *g >= math.MaxUint32) {
			denied("securityContext.fsGroup", fmt.Sprintf("%d is no group", *g))
		}
		for _, s := range security.Sysctls {
			if !slices.Contains(safeSysctls, s.Name) {
				denied("securityContext.sysctls", fmt.Sprintf("%q is not one of the safe ones; remove it", s.Name))
			}
		}
	}
	for _, c := range template.containers() {
		checkContainer(r, c, spec, volumes)
	}
}

func checkContainer(r *report, c container, spec corev1.PodSpec, volumes []volume) {
	denied := func(field, why string) {
		r.refuse(errdefs.ErrFailedPrecondition, "%s: %s: %s", c.field, field, why)
	}
	if security := c.SecurityContext; security != nil {
		if security.Privileged != nil && *security.Privileged {
			denied("securityContext.privileged", "it would have every device and capability; remove it")
		}
		if security.ProcMount != nil && *security.ProcMount != corev1.DefaultProcMount {
			denied("securityContext.procMount", "an unmasked /proc is not for sealed pods; remove it")
		}
		if security.Capabilities != nil {
			for _, added := range security.Capabilities.Add {
				if !slices.Contains(defaultCapabilities, strings.TrimPrefix(strings.ToUpper(string(added)), "CAP_")) {
					denied("securityContext.capabilities", fmt.Sprintf("%q is not in CRI's default set; remove it", added))
				}
			}
		}
	}
	if p := c.TerminationMessagePath; p != "" && p != corev1.TerminationMessagePathDefault {
		denied("terminationMessagePath", fmt.Sprintf("%q would be a file of the node in the container; remove it", p))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Resources.Limits)) {
		if strings.Contains(string(name), "/") && !strings.HasPrefix(string(name), corev1.ResourceHugePagesPrefix) {
			denied("resources.limits", fmt.Sprintf("%q is a device of the node, which would reach the container raw; remove it", name))
		}
	}
	for _, d := range c.VolumeDevices {
		if !slices.ContainsFunc(volumes, func(v volume) bool { return v.of == d.Name }) {
			denied("volumeDevices", fmt.Sprintf("%q would reach the container raw; seal it with the annotation "+
				`%s%s: '{"device": %q, "mountPath": PATH, "mode": "ephemeral"}'`, d.Name, volumePrefix, d.Name, d.DevicePath))
		}
	}
	checkMounts(r, c, spec, volumes)
}

// checkMounts looks at what is mounted into a container beside sealed volumes.
func checkMounts(r *report, c container, spec corev1.PodSpec, volumes []volume) {
	for _, m := range c.VolumeMounts {
		if slices.ContainsFunc(volumes, func(v volume) bool { return v.of == m.Name }) {
			continue
		}
		for _, v := range volumes {
			for _, sealed := range v.mounts {
				if sealed.Container == c.Name && overlap(mountPath(m), sealed.Path) {
					r.refuse(errdefs.ErrFailedPrecondition, "%s: volumeMounts %q: %q lies on, above or below the sealed volume %q at %q; mount it elsewhere",
						c.field, m.Name, m.MountPath, v.name, sealed.Path)
				}
			}
		}
		r.warn("%s: volumeMounts %q: the guest refuses containers with mounts of the node's files (%s) beside sealed volumes; remove it", c.field, m.Name, sourceOf(spec, m.Name))
	}
}

// overlap reports whether one of two paths is the other or lies below it.
func overlap(a, b string) bool {
	a, b = strings.TrimRight(a, "/")+"/", strings.TrimRight(b, "/")+"/"
	return strings.HasPrefix(a, b) || strings.HasPrefix(b, a)
}

// sourceOf says what kind of volume a pod's volume is, in Kubernetes' word for it.
func sourceOf(spec corev1.PodSpec, name string) string {
	for _, v := range spec.Volumes {
		if v.Name != name {
			continue
		}
		switch {
		case v.EmptyDir != nil:
			return "emptyDir"
		case v.ConfigMap != nil:
			return "configMap"
		case v.Secret != nil:
			return "secret"
		case v.Projected != nil:
			return "projected"
		case v.DownwardAPI != nil:
			return "downwardAPI"
		case v.HostPath != nil:
			return "hostPath"
		case v.PersistentVolumeClaim != nil:
			return "persistentVolumeClaim"
		case v.Ephemeral != nil:
			return "ephemeral"
		}
		return "volume"
	}
	return "volume not declared"
}
