package author

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sealvol/sealvol/plugin/quantity"
	"github.com/sealvol/sealvol/policy"
)

// podTemplate is what kinds of objects that make pods have in common.
type podTemplate struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
	Spec     corev1.PodSpec    `json:"spec"`

	field string // of the object, that spec is
}

// podTemplate decodes the object's pod template. unknown are the fields that Kubernetes' types have not.
func (o object) podTemplate() (t podTemplate, unknown []string, err error) {
	value, ok := o.document.at(o.template).(map[string]any)
	if !ok {
		return t, nil, fmt.Errorf("%s: has no pod template: %w", o.name(), errdefs.ErrInvalidArgument)
	}
	t.field = o.template[len(o.path):].with("spec").String()
	unknown, err = decode(map[string]any{"metadata": value["metadata"], "spec": value["spec"]}, &t)
	if err != nil {
		return t, nil, fmt.Errorf("%s: %s: %w", o.name(), oneLine(err), errdefs.ErrInvalidArgument)
	}
	return t, unknown, nil
}

// checkFields refuses unknown fields of what the policy is made from, and warns of others, which a newer Kubernetes may know. Of a pod
// without sealed volumes only its volumes count: one of them may be meant to be sealed.
func checkFields(r *report, unknown []string, sealed bool) {
	parts := []string{`"spec.volumes`}
	if sealed {
		parts = append(parts, `"spec.containers`, `"spec.initContainers`, `"spec.ephemeralContainers`)
	}
	for _, u := range unknown {
		switch {
		case slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(u, part) }):
			r.refuse(errdefs.ErrInvalidArgument, "%s; Kubernetes has no such field", u)
		case sealed:
			r.warn("%s; it is left as it is", u)
		}
	}
}

// claim is a PersistentVolumeClaim, or the template of one.
type claim struct {
	Metadata metav1.ObjectMeta                `json:"metadata"`
	Spec     corev1.PersistentVolumeClaimSpec `json:"spec"`
}

// ephemeral reports whether the claim's annotation says that its data may go with the pod.
func (c claim) ephemeral() (bool, error) {
	r := &report{where: "its claim"}
	found := requests(r, c.Metadata.Annotations)
	if err := r.err(); err != nil {
		return false, err
	}
	q, ok := found[c.Metadata.Name]
	if len(found) > 1 || len(found) == 1 && !ok {
		return false, fmt.Errorf("its claim has an annotation for another volume; the one that counts is %s%s: %w", volumePrefix, c.Metadata.Name, errdefs.ErrInvalidArgument)
	}
	if ok && q != (request{Mode: "ephemeral"}) {
		return false, fmt.Errorf(`its claim's annotation says more than {"mode": "ephemeral"}; that belongs on the pod: %w`, errdefs.ErrInvalidArgument)
	}
	return ok, nil
}

// claims are those of a manifest, by namespace and name.
type claims map[[2]string]claim

func claimsOf(objects []object) (claims, error) {
	found := claims{}
	for _, o := range objects {
		if o.kind != "PersistentVolumeClaim" {
			continue
		}
		var c claim
		if _, err := decode(map[string]any{"metadata": o.value["metadata"], "spec": o.value["spec"]}, &c); err != nil {
			return nil, fmt.Errorf("%s: %s: %w", o.name(), oneLine(err), errdefs.ErrInvalidArgument)
		}
		key := [2]string{c.Metadata.Namespace, c.Metadata.Name}
		if _, twice := found[key]; twice {
			return nil, fmt.Errorf("%s: is in the manifest twice: %w", o.name(), errdefs.ErrInvalidArgument)
		}
		found[key] = c
	}
	return found, nil
}

// volume is a sealed volume of a pod.
type volume struct {
	name     string // in the policy
	of       string // the pod's name for it
	size     uint64 // asked for, in bytes
	emptyDir bool   // the pod has an emptyDir for it, not a claim
	mounts   []policy.Mount
}

const mebibyte = 1 << 20

// sealed is the volume as the policy says it.
func (v volume) sealed(options Options, spec corev1.PodSpec) policy.Volume {
	sealed := policy.Volume{
		Mode: policy.Ephemeral, Layering: options.Layering, FSType: options.FSType,
		Suites:  []policy.Suite{policy.AEGIS128Random, policy.AESXTSRandomHMACSHA256},
		Options: []policy.Option{policy.NoSUID, policy.NoDev},
		Size:    policy.Size{Min: v.size, Max: (v.size + mebibyte - 1) / mebibyte * mebibyte},
		Mounts:  v.mounts,
	}
	if sealed.Layering == "" {
		sealed.Layering = policy.MemoryTags
	}
	if sealed.Layering == policy.LUKS2 {
		sealed.Suites = []policy.Suite{policy.AESXTSPlain64HMACSHA256}
	}
	if sealed.FSType == "" {
		sealed.FSType = policy.Ext4
	}
	if security := spec.SecurityContext; security != nil && security.FSGroup != nil && *security.FSGroup > 0 {
		sealed.FSGroup = &policy.FSGroup{GID: uint32(*security.FSGroup), ChangePolicy: policy.Always}
		if change := security.FSGroupChangePolicy; change != nil {
			sealed.FSGroup.ChangePolicy = policy.ChangePolicy(*change)
		}
	}
	return sealed
}

// finder looks for the sealed volumes of one pod template.
type finder struct {
	*report
	template podTemplate
	claims   claims
	// templates are the claims that a StatefulSet makes for each pod, by volume.
	templates map[string]claim
	namespace string
	options   Options
	requests  map[string]request
	// byDevice and byEmptyDir lead from a device's path and an emptyDir's name to the request that names it.
	byDevice, byEmptyDir map[string]string
	used                 map[string]bool // requests
	usedOptions          map[string]bool // as flags write them
}

// findVolumes finds the sealed volumes of a pod template and follows each to the containers that see it.
func findVolumes(r *report, o object, template podTemplate, claims claims, options Options, usedOptions map[string]bool) []volume {
	metadata, _ := o.value["metadata"].(map[string]any)
	namespace, _ := metadata["namespace"].(string)
	f := &finder{
		report: r, template: template, claims: claims, templates: map[string]claim{}, namespace: namespace, options: options,
		requests: requests(r, template.Metadata.Annotations), byDevice: map[string]string{}, byEmptyDir: map[string]string{},
		used: map[string]bool{}, usedOptions: usedOptions,
	}
	for _, name := range slices.Sorted(maps.Keys(f.requests)) {
		q := f.requests[name]
		for _, index := range []struct {
			names map[string]string
			key   string
		}{{f.byDevice, q.Device}, {f.byEmptyDir, q.EmptyDir}} {
			if other, twice := index.names[index.key]; index.key != "" && twice {
				r.refuse(errdefs.ErrInvalidArgument, "annotations %s%s and %s%s ask for the same", volumePrefix, other, volumePrefix, name)
			}
			index.names[index.key] = name
		}
	}
	pod := template.Spec.Volumes
	for _, t := range f.claimTemplates(o) {
		pod = append(pod[:len(pod):len(pod)], t)
	}
	named := map[string]int{}
	for _, v := range pod {
		named[v.Name]++
	}
	var volumes []volume
	for _, v := range pod {
		sealed, ok := f.find(v)
		if !ok {
			continue
		}
		if named[v.Name] > 1 { // told once
			delete(named, v.Name)
			r.refuse(errdefs.ErrInvalidArgument, "volume %q: another volume of the pod is called so too, and Kubernetes takes one of them (a StatefulSet's volumeClaimTemplates go before volumes); rename one", v.Name)
			continue
		}
		if slices.ContainsFunc(volumes, func(other volume) bool { return other.name == sealed.name }) {
			r.refuse(errdefs.ErrInvalidArgument, "volume %q: another sealed volume is called %q too; give the annotation another name", v.Name, sealed.name)
		}
		volumes = append(volumes, sealed)
	}
	for _, name := range slices.Sorted(maps.Keys(f.requests)) {
		if !f.used[name] {
			r.refuse(errdefs.ErrInvalidArgument, "annotation %s%s: the pod has no such volume; see the device or name in it", volumePrefix, name)
		}
	}
	return volumes
}

// claimTemplates are the volumes that a StatefulSet gives its pods besides those in the template.
func (f *finder) claimTemplates(o object) []corev1.Volume {
	if o.kind != "StatefulSet" {
		return nil
	}
	spec, _ := o.value["spec"].(map[string]any)
	entries, _ := spec["volumeClaimTemplates"].([]any)
	var volumes []corev1.Volume
	for i, entry := range entries {
		var template claim
		if _, err := decode(entry, &template); err != nil {
			f.refuse(errdefs.ErrInvalidArgument, "spec.volumeClaimTemplates[%d]: %s", i, oneLine(err))
			continue
		}
		f.templates[template.Metadata.Name] = template
		volumes = append(volumes, corev1.Volume{Name: template.Metadata.Name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: template.Metadata.Name},
		}})
	}
	return volumes
}

// find makes a sealed volume of a pod's volume, if it is to be one.
func (f *finder) find(v corev1.Volume) (volume, bool) {
	switch {
	case v.EmptyDir != nil:
		return f.emptyDir(v)
	case v.Ephemeral != nil && v.Ephemeral.VolumeClaimTemplate != nil:
		return f.ephemeral(v)
	case v.PersistentVolumeClaim != nil:
		return f.claimed(v)
	case v.CSI != nil && slices.Contains(f.options.classes(), v.CSI.Driver):
		return f.inline(v), true
	}
	return volume{}, false
}

// ephemeral is a volume whose claim is made with the pod and goes with it.
func (f *finder) ephemeral(v corev1.Volume) (volume, bool) {
	template := v.Ephemeral.VolumeClaimTemplate
	if _, raw := f.raw(v.Name); raw == "" && !f.ofClass(template.Annotations, template.Spec) {
		return volume{}, false
	}
	return f.ofClaim(v.Name, &template.Spec, false), true
}

// inline is a volume that our driver makes with the pod, of the size that its attributes say.
func (f *finder) inline(v corev1.Volume) volume {
	sealed := volume{name: v.Name, of: v.Name}
	size, err := quantity.Bytes(v.CSI.VolumeAttributes["size"])
	if err != nil {
		f.refuse(errdefs.ErrInvalidArgument, `volume %q: csi.volumeAttributes.size %v; write how large it is to be, for example "10Gi"`, v.Name, err)
	}
	sealed.size = uint64(size)
	sealed.mounts = f.mounts(v.Name, v.CSI.ReadOnly != nil && *v.CSI.ReadOnly)
	return sealed
}

// claimed is a volume whose claim outlives the pod, so that its data must have been given up in so many words.
func (f *finder) claimed(v corev1.Volume) (volume, bool) {
	field, name := fmt.Sprintf("volume %q", v.Name), v.PersistentVolumeClaim.ClaimName
	c, here := f.templates[v.Name]
	if !here {
		c, here = f.claims[[2]string{f.namespace, name}]
	}
	var spec *corev1.PersistentVolumeClaimSpec
	if here {
		spec = &c.Spec
	}
	onClaim, err := c.ephemeral()
	if err != nil {
		f.refusals = append(f.refusals, fmt.Errorf("%s: %s: %w", f.where, field, err))
		return volume{}, false
	}
	onPod := f.requests[v.Name] == request{Mode: "ephemeral"}
	if onPod {
		f.used[v.Name] = true
	}
	named := slices.Contains(f.options.Claims, name)
	if named {
		f.usedOptions["--claim "+name] = true
	}
	_, raw := f.raw(v.Name)
	switch {
	case onClaim || onPod || raw != "":
		return f.ofClaim(v.Name, spec, v.PersistentVolumeClaim.ReadOnly), true
	case named || here && f.ofClass(c.Metadata.Annotations, c.Spec):
		f.refuse(errdefs.ErrFailedPrecondition, "%s: its claim outlives the pod, and persistent volumes come later; use an ephemeral volumeClaimTemplate, "+
			`or say with the annotation %s%s: '{"mode": "ephemeral"}' on the claim that its data goes with the pod`, field, volumePrefix, or(c.Metadata.Name, v.Name))
	case !here:
		f.warn("%s: PersistentVolumeClaim %q is not in the manifest; if it is to be sealed, name it with --claim", field, name)
	}
	return volume{}, false
}

// ofClaim is the sealed volume behind a claim; spec is nil if the manifest has it not.
func (f *finder) ofClaim(name string, spec *corev1.PersistentVolumeClaimSpec, readOnly bool) volume {
	field := fmt.Sprintf("volume %q", name)
	if spec != nil && (spec.DataSource != nil || spec.DataSourceRef != nil || spec.VolumeName != "") {
		f.refuse(errdefs.ErrFailedPrecondition, "%s: an ephemeral sealed volume begins empty; remove dataSource, dataSourceRef and volumeName from its claim", field)
	}
	block := spec != nil && spec.VolumeMode != nil && *spec.VolumeMode == corev1.PersistentVolumeBlock
	sealed := volume{name: name, of: name}
	var err error
	if sealed.size, err = f.size(name, spec); err != nil {
		f.refuse(errdefs.ErrInvalidArgument, "%s: %v", field, err)
	}
	device, raw := f.raw(name)
	switch {
	case raw != "":
		f.used[raw] = true
		sealed.name = raw
		if spec != nil && !block {
			f.refuse(errdefs.ErrInvalidArgument, "%s: is a device of a container, so its claim needs volumeMode: Block", field)
		}
		sealed.mounts = f.devices(name, device, f.requests[raw], readOnly)
	case block:
		f.refuse(errdefs.ErrFailedPrecondition, `%s: is a raw block device, which the containers would see unsealed; say where its file system is to be with the annotation `+
			`%s%s: '{"device": DEVICEPATH, "mountPath": PATH, "mode": "ephemeral"}'`, field, volumePrefix, name)
	default:
		sealed.mounts = f.mounts(name, readOnly)
	}
	return sealed
}

// ofClass reports whether a claim has one of the sealed classes. Its class is what the old annotation says, if it is there, as for
// Kubernetes (k8s.io/component-helpers/storage/volume, GetPersistentVolumeClaimClass).
func (f *finder) ofClass(annotations map[string]string, spec corev1.PersistentVolumeClaimSpec) bool {
	class, old := annotations[corev1.BetaStorageClassAnnotation]
	if !old && spec.StorageClassName != nil {
		class = *spec.StorageClassName
	}
	return slices.Contains(f.options.classes(), class)
}

// raw is the request for one of the devices that containers make of a volume.
func (f *finder) raw(name string) (device, request string) {
	for _, c := range f.template.containers() {
		for _, d := range c.VolumeDevices {
			if request, ok := f.byDevice[d.DevicePath]; ok && d.Name == name {
				return d.DevicePath, request
			}
		}
	}
	return "", ""
}

// emptyDir is a volume that an annotation asks to be sealed.
func (f *finder) emptyDir(v corev1.Volume) (volume, bool) {
	name, ok := f.byEmptyDir[v.Name]
	if !ok {
		return volume{}, false
	}
	f.used[name] = true
	field := fmt.Sprintf("volume %q", v.Name)
	sealed := volume{name: name, of: v.Name, emptyDir: true, size: f.requests[name].size}
	if v.EmptyDir.Medium != corev1.StorageMediumDefault {
		f.refuse(errdefs.ErrFailedPrecondition, "%s: an emptyDir in memory is sealed by the guest's own memory; remove its medium or the annotation", field)
	}
	if sealed.size == 0 {
		f.refuse(errdefs.ErrInvalidArgument, "%s: has no size; give the annotation %s%s one, since the node does not see a sizeLimit", field, volumePrefix, name)
	}
	if limit := v.EmptyDir.SizeLimit; limit != nil && limit.CmpInt64(int64(sealed.size)) <= 0 {
		f.warn("%s: its sizeLimit %s is not above its size; a full volume takes a little more of the node's disk than its size, and then kubelet evicts the pod", field, limit)
	}
	sealed.mounts = f.mounts(v.Name, false)
	return sealed, true
}

// size is what a claim asks for, in bytes.
func (f *finder) size(name string, spec *corev1.PersistentVolumeClaimSpec) (uint64, error) {
	if spec == nil {
		if size, ok := f.options.Sizes[name]; ok {
			f.usedOptions["--size "+name] = true
			return size, nil
		}
		return 0, fmt.Errorf("its claim is not in the manifest, so say how large it is with --size %s=10Gi", name)
	}
	request, ok := spec.Resources.Requests[corev1.ResourceStorage]
	if !ok {
		return 0, errors.New("its claim requests no storage; give resources.requests.storage")
	}
	return bytesOf(request)
}

// bytesOf is a quantity in bytes.
func bytesOf(q resource.Quantity) (uint64, error) {
	if q.Sign() <= 0 {
		return 0, fmt.Errorf("%s is not more than nothing", q.String())
	}
	if q.CmpInt64(1<<60) > 0 {
		return 0, fmt.Errorf("%s is more than a device can have", q.String())
	}
	return uint64(q.Value()), nil
}

// mounts follows a volume to the containers that mount it.
func (f *finder) mounts(name string, readOnly bool) []policy.Mount {
	var mounts []policy.Mount
	for _, c := range f.template.containers() {
		for _, d := range c.VolumeDevices {
			if d.Name == name {
				f.refuse(errdefs.ErrInvalidArgument, "%s: volumeDevices %q: the volume is no block device", c.field, name)
			}
		}
		for _, m := range c.VolumeMounts {
			if m.Name != name {
				continue
			}
			f.checkMount(c, m)
			if slices.ContainsFunc(mounts, func(other policy.Mount) bool { return other.Container == c.Name }) {
				f.refuse(errdefs.ErrFailedPrecondition, "%s: mounts volume %q twice; a container sees a sealed volume at one path", c.field, name)
				continue
			}
			mounts = append(mounts, policy.Mount{Container: c.Name, Path: mountPath(m), ReadOnly: readOnly || m.ReadOnly})
		}
	}
	if len(mounts) == 0 {
		f.refuse(errdefs.ErrInvalidArgument, "volume %q: no container mounts it", name)
	}
	return mounts
}

// checkMount refuses what a sealed volume's mount cannot have.
func (f *finder) checkMount(c container, m corev1.VolumeMount) {
	field := fmt.Sprintf("%s: volumeMounts %q", c.field, m.Name)
	switch {
	case m.SubPath != "" || m.SubPathExpr != "":
		f.refuse(errdefs.ErrFailedPrecondition, "%s: subPath and subPathExpr are not supported, since a folder of the volume would be the host's to choose; mount the whole volume", field)
	case m.MountPropagation != nil && *m.MountPropagation != corev1.MountPropagationNone:
		f.refuse(errdefs.ErrFailedPrecondition, "%s: mountPropagation %s would let mounts of the guest and the container reach each other; remove it", field, *m.MountPropagation)
	case m.MountPath == "" || !clean(mountPath(m)):
		f.refuse(errdefs.ErrInvalidArgument, "%s: mountPath %q is no place below the root", field, m.MountPath)
	}
}

// mountPath is where the container has the mount: kubelet makes the path absolute, and the guest compares clean ones.
func mountPath(m corev1.VolumeMount) string { return path.Clean("/" + m.MountPath) }

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}

// devices follows a raw block volume to the containers that have its device.
func (f *finder) devices(name, device string, q request, readOnly bool) []policy.Mount {
	var mounts []policy.Mount
	for _, c := range f.template.containers() {
		for _, m := range c.VolumeMounts {
			if m.Name == name {
				f.refuse(errdefs.ErrInvalidArgument, "%s: volumeMounts %q: the volume is a block device", c.field, name)
			}
		}
		has := false
		for _, d := range c.VolumeDevices {
			switch {
			case d.Name == name && d.DevicePath == device:
				has = true
			case d.Name == name:
				f.refuse(errdefs.ErrFailedPrecondition, "%s: has volume %q as %q and not as %q, so it would see it unsealed; use one devicePath", c.field, name, d.DevicePath, device)
			case d.DevicePath == device:
				f.refuse(errdefs.ErrFailedPrecondition, "%s: device %q is volume %q here and %q elsewhere; use one devicePath for each", c.field, device, d.Name, name)
			}
		}
		if !has {
			// plugin/container.go refuses the container.
			f.warn("%s: has no device %q; the plugin refuses containers of an annotated pod that have not its devices; add volume %q to its volumeDevices", c.field, device, name)
			continue
		}
		mounts = append(mounts, policy.Mount{Container: c.Name, Path: q.MountPath, ReadOnly: readOnly})
	}
	return mounts
}
