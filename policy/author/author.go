// Package author writes a pod's policy from the YAML that the pod's author already has, and explains policies to people.
//
// It works on text alone: a manifest goes in, and the same manifest comes out with Kata's policy annotation in each pod template that uses
// a sealed volume. What is not that annotation survives byte for byte. The package runs where manifests are written, never in the guest,
// and decides nothing there: package policy reads its output like anyone's.
package author

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/sealvol/sealvol/policy"
)

const (
	// Annotation is the key of the annotation that carries a policy to Kata, as base64 of Rego text.
	Annotation = "io.katacontainers.config.agent.policy"

	// DefaultClass is the storage class whose volumes are sealed unless others are named.
	DefaultClass = "coco-local-csi"

	// MaxManifest bounds a manifest, in bytes.
	MaxManifest = 4 << 20

	// maxAnnotations is what Kubernetes allows all annotations of an object together, in bytes
	// (k8s.io/apimachinery/pkg/api/validation, TotalAnnotationSizeLimitB).
	maxAnnotations = 256 << 10
)

// Options are what a manifest does not say.
type Options struct {
	// Classes are the storage classes whose volumes are sealed. None: DefaultClass.
	Classes []string
	// Claims are names of PersistentVolumeClaims that are sealed though the manifest does not hold them.
	Claims []string
	// Sizes are the sizes, in bytes, of volumes that the manifest gives no size, by the volume's name in the pod.
	Sizes map[string]uint64
	// Exec are commands that may be executed in every container; a last "..." stands for any rest.
	Exec [][]string
	// Images are the configurations of images, by their names with registry and tag (docker.io/library/busybox:latest). "" is that of
	// every image that is not named.
	Images map[string]ImageConfig
	// NormaliseImages pins image names as CRI clients other than kubelet make containerd give them: with registry and tag.
	NormaliseImages bool
	// Layering of all volumes. Empty: policy.MemoryTags.
	Layering policy.Layering
	// FSType of all volumes. Empty: policy.Ext4.
	FSType policy.FSType
}

func (o Options) classes() []string {
	if len(o.Classes) == 0 {
		return []string{DefaultClass}
	}
	return o.Classes
}

// Result is an annotated manifest.
type Result struct {
	// Manifest is the manifest's text with the annotations.
	Manifest []byte
	// Pods are the pod templates that got one, in the order of the text.
	Pods []Pod
	// Warnings are for the author: what was left open, and what will not work.
	Warnings []string
}

// Pod is a pod template with a policy.
type Pod struct {
	// Name is the kind and name of the object that holds the template, "Deployment/my-app".
	Name string
	// Policy is the Rego text.
	Policy []byte
}

// Annotate writes the policies of a manifest. Its error names every field that stands against it: errdefs.ErrInvalidArgument for what is
// malformed, errdefs.ErrFailedPrecondition for what sealed pods cannot have (yet), errdefs.ErrNotFound if no pod uses a sealed volume.
func Annotate(ctx context.Context, manifest []byte, options Options) (Result, error) {
	result, err := annotate(ctx, manifest, options)
	if err != nil {
		return Result{}, err
	}
	for _, pod := range result.Pods {
		// The author hears it now if the guest would refuse the text.
		if _, err := policy.Load(ctx, pod.Policy); err != nil {
			return Result{}, fmt.Errorf("%s: %w", pod.Name, err)
		}
	}
	return result, nil
}

func annotate(ctx context.Context, manifest []byte, options Options) (Result, error) {
	documents, err := parse(manifest)
	if err != nil {
		return Result{}, err
	}
	var objects []object
	for _, d := range documents {
		found, err := d.objects()
		if err != nil {
			return Result{}, err
		}
		objects = append(objects, found...)
	}
	claims, err := claimsOf(objects)
	if err != nil {
		return Result{}, err
	}

	var result Result
	var refusals []error
	var unknown []string
	edits := map[*document][]change{}
	used := map[string]bool{}
	for _, o := range objects {
		if o.template == nil {
			if at := podSpec(o.value); at != nil {
				unknown = append(unknown, o.name())
				result.Warnings = append(result.Warnings, fmt.Sprintf("%s: has a pod's specification (%s) and is of a kind that is not known here; its pods get no policy", o.name(), at))
			}
			continue
		}
		pod, warnings, err := writePod(ctx, o, claims, options, used)
		if err != nil {
			refusals = append(refusals, err)
			continue
		}
		result.Warnings = append(result.Warnings, warnings...)
		if pod.Policy == nil {
			continue
		}
		edits[o.document] = append(edits[o.document], change{o.template, base64.StdEncoding.EncodeToString(pod.Policy)})
		result.Pods = append(result.Pods, pod)
	}
	refusals = append(refusals, unused(options, used)...)
	if err := errors.Join(refusals...); err != nil {
		return Result{}, err
	}
	if len(result.Pods) == 0 {
		passed := ""
		if len(unknown) > 0 {
			passed = " (not looked at, for its kind is not known here: " + strings.Join(unknown, ", ") + ")"
		}
		return Result{}, fmt.Errorf("no pod here uses a sealed volume, so there is nothing to write%s: "+
			"give a volume the storage class %s, or name yours with --class: %w", passed, strings.Join(options.classes(), " or "), errdefs.ErrNotFound)
	}
	result.Manifest, err = rewrite(manifest, documents, edits)
	return result, err
}

// unused says which options name what the manifest has not.
func unused(options Options, used map[string]bool) []error {
	var flags []string
	for _, name := range options.Claims {
		flags = append(flags, "--claim "+name)
	}
	for _, name := range slices.Sorted(maps.Keys(options.Sizes)) {
		flags = append(flags, "--size "+name)
	}
	var refusals []error
	for _, f := range flags {
		if !used[f] {
			refusals = append(refusals, fmt.Errorf("%s: no pod here has such a volume without a claim in the manifest; leave it out: %w", f, errdefs.ErrInvalidArgument))
		}
	}
	return refusals
}

// writePod makes the policy of one pod template. It is empty for a template that uses no sealed volume.
func writePod(ctx context.Context, o object, claims claims, options Options, used map[string]bool) (Pod, []string, error) {
	r := &report{where: o.name()}
	template, unknown, err := o.podTemplate()
	if err != nil {
		return Pod{}, nil, err
	}
	volumes := findVolumes(r, o, template, claims, options, used)
	checkFields(r, unknown, len(volumes) > 0)
	there, err := existing(template.Metadata.Annotations)
	if err != nil {
		return Pod{}, nil, fmt.Errorf("%s: %w", o.name(), err)
	}
	if len(volumes) == 0 {
		if strings.Contains(there, blockBegin) {
			r.warn("has a policy for sealed volumes but none of them any more; remove annotation %s", Annotation)
		}
		return Pod{}, r.warnings, r.err()
	}
	checkPod(r, template, volumes)
	sealed := seal(r, template, volumes, options)
	if err := r.err(); err != nil {
		return Pod{}, nil, err
	}
	if there, err = allowSealed(there, volumes, sealed.Volumes); err != nil {
		return Pod{}, nil, fmt.Errorf("%s: %w", o.name(), err)
	}
	text, err := merge(ctx, there, sealed)
	if err != nil {
		return Pod{}, nil, fmt.Errorf("%s: %w", o.name(), err)
	}
	if base64.StdEncoding.EncodedLen(len(text)) > maxAnnotations {
		return Pod{}, nil, fmt.Errorf("%s: the policy of %d bytes is longer than Kubernetes allows an annotation: %w", o.name(), len(text), errdefs.ErrInvalidArgument)
	}
	return Pod{Name: o.name(), Policy: []byte(text)}, r.warnings, nil
}

// seal makes sealed_pod: all containers of the pod, and its sealed volumes.
func seal(r *report, template podTemplate, volumes []volume, options Options) sealedPod {
	sealed := sealedPod{Containers: map[string]policy.Container{}, Volumes: map[string]policy.Volume{}}
	for _, c := range template.containers() {
		if wrong := validation.IsDNS1123Label(c.Name); len(wrong) > 0 {
			r.refuse(errdefs.ErrInvalidArgument, "%s: name %q: %s", c.field, c.Name, strings.Join(wrong, ", "))
		}
		if _, twice := sealed.Containers[c.Name]; twice {
			r.refuse(errdefs.ErrInvalidArgument, "%s: another container is called %q too", c.field, c.Name)
		}
		sealed.Containers[c.Name] = writeContainer(r, c, options)
	}
	for _, v := range volumes {
		sealed.Volumes[v.name] = v.sealed(options, template.Spec)
	}
	return sealed
}

// existing is the policy that a template has already; empty if it has none.
func existing(annotations map[string]string) (string, error) {
	value, ok := annotations[Annotation]
	if !ok {
		return "", nil
	}
	text, err := base64.StdEncoding.Strict().DecodeString(value)
	switch {
	case err != nil:
		return "", fmt.Errorf("annotation %s: is not base64: %w: %w", Annotation, err, errdefs.ErrInvalidArgument)
	case len(text) > policy.MaxText:
		return "", fmt.Errorf("annotation %s: %d bytes are more than %d: %w", Annotation, len(text), policy.MaxText, errdefs.ErrInvalidArgument)
	case !utf8.Valid(text):
		return "", fmt.Errorf("annotation %s: is not UTF-8: %w", Annotation, errdefs.ErrInvalidArgument)
	}
	return string(text), nil
}

// report collects what is to be said about one pod template.
type report struct {
	where    string
	refusals []error
	warnings []string
}

// refuse says why there will be no policy. class is of errdefs.
func (r *report) refuse(class error, format string, args ...any) {
	r.refusals = append(r.refusals, fmt.Errorf("%s: %s: %w", r.where, fmt.Sprintf(format, args...), class))
}

func (r *report) warn(format string, args ...any) {
	r.warnings = append(r.warnings, r.where+": "+fmt.Sprintf(format, args...))
}

func (r *report) err() error { return errors.Join(r.refusals...) }
