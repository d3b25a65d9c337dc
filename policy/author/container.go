package author

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"

	"github.com/sealvol/sealvol/policy"
)

// container is a container of a pod and the field that declares it.
type container struct {
	corev1.Container
	field string
}

// containers are all containers that Kubernetes may run in the pod's guest, in the order of their start.
func (t podTemplate) containers() []container {
	var containers []container
	add := func(list string, i int, c corev1.Container) {
		containers = append(containers, container{c, fmt.Sprintf("%s.%s[%d] %q", t.field, list, i, c.Name)})
	}
	for i, c := range t.Spec.InitContainers {
		add("initContainers", i, c)
	}
	for i, c := range t.Spec.Containers {
		add("containers", i, c)
	}
	for i, c := range t.Spec.EphemeralContainers {
		add("ephemeralContainers", i, corev1.Container(c.EphemeralContainerCommon))
	}
	return containers
}

func writeContainer(r *report, c container, options Options) policy.Container {
	sealed := policy.Container{RootFS: policy.HostRootFS, Args: arguments(r, c, options.Images), Image: imageName(r, c, options.NormaliseImages)}
	add := func(argv []string) {
		if !slices.ContainsFunc(sealed.Exec, func(other []string) bool { return slices.Equal(argv, other) }) {
			sealed.Exec = append(sealed.Exec, argv)
		}
	}
	for _, hook := range hooks(c) {
		if slices.Contains(hook.argv, "...") {
			r.refuse(errdefs.ErrFailedPrecondition, `%s: %s: the argument "..." stands for any rest in a policy; write the command otherwise`, c.field, hook.field)
			continue
		}
		add(hook.argv)
	}
	for _, argv := range options.Exec {
		add(argv)
	}
	return sealed
}

// hook is a command that kubelet executes in a container.
type hook struct {
	field string
	argv  []string
}

// hooks are the commands of a container's probes and lifecycle handlers. Kubelet expands variables in the first, from the values that
// the container declares as they are written, and in the second not at all (pkg/kubelet/prober/prober.go and
// pkg/kubelet/lifecycle/handlers.go, Kubernetes 1.34).
func hooks(c container) []hook {
	var found []hook
	values := map[string]string{}
	for _, e := range c.Env {
		values[e.Name] = e.Value
	}
	for _, p := range []struct {
		field string
		probe *corev1.Probe
	}{{"startupProbe", c.StartupProbe}, {"livenessProbe", c.LivenessProbe}, {"readinessProbe", c.ReadinessProbe}} {
		if p.probe == nil || p.probe.Exec == nil || len(p.probe.Exec.Command) == 0 {
			continue
		}
		var argv []string
		for _, arg := range p.probe.Exec.Command {
			argv = append(argv, expand(arg, func(name string) string {
				if value, ok := values[name]; ok {
					return value
				}
				return "$(" + name + ")"
			}))
		}
		found = append(found, hook{p.field, argv})
	}
	if c.Lifecycle == nil {
		return found
	}
	for _, h := range []struct {
		field   string
		handler *corev1.LifecycleHandler
	}{{"lifecycle.postStart", c.Lifecycle.PostStart}, {"lifecycle.preStop", c.Lifecycle.PreStop}} {
		if h.handler != nil && h.handler.Exec != nil && len(h.handler.Exec.Command) > 0 {
			found = append(found, hook{h.field, h.handler.Exec.Command})
		}
	}
	return found
}

// arguments are what the container's process will have: the pod's command and args, and where it has none the image's, joined as
// containerd does (internal/cri/opts, WithProcessArgs, 2.4.2). Nil if they cannot be known.
func arguments(r *report, c container, images map[string]ImageConfig) []string {
	environment := environmentOf(c)
	command, ok := environment.expandAll(r, c.field+": command", c.Command)
	if !ok {
		return nil
	}
	args, ok := environment.expandAll(r, c.field+": args", c.Args)
	if !ok {
		return nil
	}
	if len(command) > 0 {
		return append(command, args...)
	}
	image, ok := imageConfig(c.Image, images)
	if !ok {
		r.warn("%s: has no command, and what image %q runs is not known, so the policy allows the container any arguments; write its command, or give --image-config", c.field, c.Image)
		return nil
	}
	if len(args) == 0 {
		args = image.Cmd
	}
	if !(len(image.Entrypoint) == 1 && image.Entrypoint[0] == "") {
		command = image.Entrypoint
	}
	all := append(slices.Clone(command), args...)
	if len(all) == 0 {
		r.refuse(errdefs.ErrInvalidArgument, "%s: neither the pod nor image %q says what to run; write its command", c.field, c.Image)
		return nil
	}
	return all
}

// imageConfig finds the configuration of an image.
func imageConfig(name string, images map[string]ImageConfig) (ImageConfig, bool) {
	if named, err := reference.ParseDockerRef(name); err == nil {
		if config, ok := images[named.String()]; ok {
			return config, true
		}
	}
	config, ok := images[""]
	return config, ok
}

// imageName is the image as containerd's annotation io.kubernetes.cri.image-name will give it. Kubelet makes that the pod's own words
// (ImageSpec.user_specified_image, which containerd 2 prefers: internal/cri/server/container_create.go); for other clients it is the
// normalised name.
func imageName(r *report, c container, normalise bool) string {
	if c.Image == "" {
		r.refuse(errdefs.ErrInvalidArgument, "%s: has no image", c.field)
		return ""
	}
	named, err := reference.ParseDockerRef(c.Image)
	if err != nil {
		r.refuse(errdefs.ErrInvalidArgument, "%s: image %q: %v", c.field, c.Image, err)
		return ""
	}
	if normalise {
		return named.String()
	}
	return c.Image
}

// expand replaces references $(NAME) as kubelet does: $$ is a dollar sign, and what is no reference stays. mapping is asked for each
// name (third_party/forked/golang/expansion, Kubernetes 1.34).
func expand(s string, mapping func(name string) string) string {
	var b strings.Builder
	for len(s) > 0 {
		before, after, found := strings.Cut(s, "$")
		b.WriteString(before)
		if !found {
			break
		}
		name, rest, closed := "", "", false
		if strings.HasPrefix(after, "(") {
			name, rest, closed = strings.Cut(after[1:], ")")
		}
		switch {
		case closed:
			b.WriteString(mapping(name))
			s = rest
		case strings.HasPrefix(after, "$"):
			b.WriteString("$")
			s = after[1:]
		default:
			b.WriteString("$")
			s = after
		}
	}
	return b.String()
}

// environment is what is known of a container's variables.
type environment struct {
	values map[string]string
	// dynamic are the variables whose value only the cluster knows.
	dynamic map[string]bool
	// imported says that there are variables whose very names only the cluster knows.
	imported bool
}

// environmentOf follows kubelet's makeEnvironmentVariables: a value may refer to the variables before it.
func environmentOf(c container) environment {
	e := environment{values: map[string]string{}, dynamic: map[string]bool{}, imported: len(c.EnvFrom) > 0}
	for _, v := range c.Env {
		value, known := "", v.ValueFrom == nil
		if known {
			value, known = e.expand(v.Value)
		}
		e.values[v.Name], e.dynamic[v.Name] = value, !known
	}
	return e
}

// expand is ok if the result is the same in every cluster.
func (e environment) expand(s string) (value string, ok bool) {
	ok = true
	value = expand(s, func(name string) string {
		if value, declared := e.values[name]; declared {
			ok = ok && !e.dynamic[name]
			return value
		}
		ok = ok && !e.imported && !ofService(name)
		return "$(" + name + ")"
	})
	return value, ok
}

// expandAll expands the words of a command. It warns of a word that it cannot expand, and then is not ok.
func (e environment) expandAll(r *report, field string, words []string) ([]string, bool) {
	var values []string
	for i, word := range words {
		value, ok := e.expand(word)
		if !ok {
			r.warn("%s[%d] %q depends on what only the cluster knows, so the policy allows the container any arguments; write the value out", field, i, word)
			return nil, false
		}
		values = append(values, value)
	}
	return values, true
}

// ofService reports whether kubelet may set a variable for a service of the pod's namespace.
func ofService(name string) bool {
	return strings.HasSuffix(name, "_SERVICE_HOST") || strings.Contains(name, "_SERVICE_PORT") || strings.Contains(name, "_PORT_") || strings.HasSuffix(name, "_PORT")
}
