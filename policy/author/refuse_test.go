package author

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// sealedManifest is a pod with one sealed volume, of which the cases below change a line.
const sealedManifest = `apiVersion: v1
kind: Pod
metadata:
  name: p
  annotations: {}
spec:
  runtimeClassName: kata
  containers:
  - name: c
    image: i:1
    command: [run]
    volumeMounts:
    - {name: v, mountPath: /v}
  volumes:
  - name: v
    ephemeral: {volumeClaimTemplate: {spec: {storageClassName: coco-local-csi, resources: {requests: {storage: 1Mi}}}}}
`

// with replaces one line's text.
func with(t *testing.T, old, new string) []byte {
	t.Helper()
	if strings.Count(sealedManifest, old) != 1 {
		t.Fatalf("%q is not in the manifest, or more than once", old)
	}
	return []byte(strings.Replace(sealedManifest, old, new, 1))
}

func TestWhatTheGuestWouldRefuseIsRefusedNow(t *testing.T) {
	t.Parallel()
	const (
		spec      = "  runtimeClassName: kata\n"
		container = "    command: [run]\n"
		mount     = "    - {name: v, mountPath: /v}\n"
		source    = "    ephemeral: {volumeClaimTemplate: {spec: {storageClassName: coco-local-csi, resources: {requests: {storage: 1Mi}}}}}\n"
		notes     = "  annotations: {}\n"
	)
	for name, c := range map[string]struct {
		old, new string
		class    func(error) bool
		want     string // the error says
	}{
		"host processes":         {spec, spec + "  hostPID: true\n", errdefs.IsFailedPrecondition, "spec.hostPID: "},
		"shared processes":       {spec, spec + "  shareProcessNamespace: true\n", errdefs.IsFailedPrecondition, "spec.shareProcessNamespace: "},
		"user namespace":         {spec, spec + "  hostUsers: false\n", errdefs.IsFailedPrecondition, "spec.hostUsers: "},
		"claimed devices":        {spec, spec + "  resourceClaims: [{name: gpu}]\n", errdefs.IsFailedPrecondition, "spec.resourceClaims: "},
		"unsafe sysctl":          {spec, spec + "  securityContext: {sysctls: [{name: kernel.msgmax, value: '1'}]}\n", errdefs.IsFailedPrecondition, `sysctls: "kernel.msgmax" is not one of the safe ones`},
		"a group that is none":   {spec, spec + "  securityContext: {fsGroup: 4294967295}\n", errdefs.IsFailedPrecondition, "fsGroup: 4294967295 is no group"},
		"privileged":             {container, container + "    securityContext: {privileged: true}\n", errdefs.IsFailedPrecondition, `containers[0] "c": securityContext.privileged: `},
		"a capability":           {container, container + "    securityContext: {capabilities: {add: [CAP_SYS_ADMIN]}}\n", errdefs.IsFailedPrecondition, `"CAP_SYS_ADMIN" is not in CRI's default set`},
		"all capabilities":       {container, container + "    securityContext: {capabilities: {add: [ALL]}}\n", errdefs.IsFailedPrecondition, `"ALL" is not in CRI's default set`},
		"an unmasked /proc":      {container, container + "    securityContext: {procMount: Unmasked}\n", errdefs.IsFailedPrecondition, "securityContext.procMount: "},
		"a termination file":     {container, container + "    terminationMessagePath: /v/end\n", errdefs.IsFailedPrecondition, "terminationMessagePath: "},
		"a device plugin":        {container, container + "    resources: {limits: {nvidia.com/gpu: 1}}\n", errdefs.IsFailedPrecondition, `"nvidia.com/gpu" is a device of the node`},
		"a raw device":           {container, container + "    volumeDevices: [{name: other, devicePath: /dev/x}]\n", errdefs.IsFailedPrecondition, `volumeDevices: "other" would reach the container raw`},
		"subPath":                {mount, "    - {name: v, mountPath: /v, subPath: a}\n", errdefs.IsFailedPrecondition, "subPath and subPathExpr are not supported"},
		"subPathExpr":            {mount, "    - {name: v, mountPath: /v, subPathExpr: a}\n", errdefs.IsFailedPrecondition, "subPath and subPathExpr are not supported"},
		"propagation":            {mount, "    - {name: v, mountPath: /v, mountPropagation: HostToContainer}\n", errdefs.IsFailedPrecondition, "mountPropagation HostToContainer"},
		"twice in a container":   {mount, mount + "    - {name: v, mountPath: /w}\n", errdefs.IsFailedPrecondition, `mounts volume "v" twice`},
		"the root":               {mount, "    - {name: v, mountPath: /}\n", errdefs.IsInvalidArgument, `mountPath "/" is no place below the root`},
		"an unprintable path":    {mount, "    - {name: v, mountPath: \"/v\\e\"}\n", errdefs.IsInvalidArgument, "is no place below the root"},
		"a path of every pod":    {mount, "    - {name: v, mountPath: /dev/shm}\n", errdefs.IsInvalidArgument, "which every container has"},
		"mounted by nobody":      {mount, "    - {name: w, mountPath: /v}\n", errdefs.IsInvalidArgument, "no container mounts it"},
		"shadowed":               {mount, mount + "    - {name: w, mountPath: /v/in}\n", errdefs.IsFailedPrecondition, `"/v/in" lies on, above or below the sealed volume "v"`},
		"shadowed by dots":       {mount, mount + "    - {name: w, mountPath: /w/../v//in/}\n", errdefs.IsFailedPrecondition, "lies on, above or below the sealed volume"},
		"no size":                {source, strings.Replace(source, ", resources: {requests: {storage: 1Mi}}", "", 1), errdefs.IsInvalidArgument, "requests no storage"},
		"no size at all":         {source, strings.Replace(source, "1Mi", "0", 1), errdefs.IsInvalidArgument, "0 is not more than nothing"},
		"a negative size":        {source, strings.Replace(source, "1Mi", "-1Gi", 1), errdefs.IsInvalidArgument, "is not more than nothing"},
		"an endless size":        {source, strings.Replace(source, "1Mi", "1e30", 1), errdefs.IsInvalidArgument, "is more than a device can have"},
		"a size that is none":    {source, strings.Replace(source, "1Mi", "big", 1), errdefs.IsInvalidArgument, "quantities must match"},
		"a clone":                {source, strings.Replace(source, "resources:", "dataSource: {kind: PersistentVolumeClaim, name: a}, resources:", 1), errdefs.IsFailedPrecondition, "begins empty"},
		"a block device":         {source, strings.Replace(source, "resources:", "volumeMode: Block, resources:", 1), errdefs.IsFailedPrecondition, "say where its file system is to be"},
		"inline CSI of no size":  {source, "    csi: {driver: coco-local-csi}\n", errdefs.IsInvalidArgument, `csi.volumeAttributes.size ""`},
		"of a size that is none": {source, "    csi: {driver: coco-local-csi, volumeAttributes: {size: big}}\n", errdefs.IsInvalidArgument, `csi.volumeAttributes.size "big"`},
		"of less than nothing":   {source, "    csi: {driver: coco-local-csi, volumeAttributes: {size: -1Gi}}\n", errdefs.IsInvalidArgument, `"-1Gi" is no quantity of bytes`},
		"not as plugin reads it": {source, "    csi: {driver: coco-local-csi, volumeAttributes: {size: \"1E3\"}}\n", errdefs.IsInvalidArgument, `"1E3" is no quantity of bytes`},
		"unknown mount field":    {mount, "    - {name: v, mountpath: /v}\n", errdefs.IsInvalidArgument, `unknown field "spec.containers[0].volumeMounts[0].mountpath"`},
		"unknown volume field":   {source, "    ephemral: {}\n" + source, errdefs.IsInvalidArgument, `unknown field "spec.volumes[0].ephemral"`},
		"a field of other type":  {container, "    command: run\n", errdefs.IsInvalidArgument, "cannot unmarshal string"},
		"an argument of no text": {container, "    command: [run, yes]\n", errdefs.IsInvalidArgument, "cannot unmarshal bool"},
		"two of one name":        {"  volumes:\n", "  - {name: c, image: i, command: [x]}\n  volumes:\n", errdefs.IsInvalidArgument, `another container is called "c" too`},
		"a name that is none":    {"  - name: c\n", "  - name: C\n", errdefs.IsInvalidArgument, `spec.containers[0] "C": name "C": a lowercase RFC 1123 label`},
		"no image":               {"    image: i:1\n", "", errdefs.IsInvalidArgument, "has no image"},
		"an image that is none":  {"    image: i:1\n", "    image: 'I !'\n", errdefs.IsInvalidArgument, "image"},
		"a probe with dots":      {container, container + "    livenessProbe: {exec: {command: [run, ...]}}\n", errdefs.IsFailedPrecondition, `livenessProbe: the argument "..." stands for any rest`},
		"annotation unknown":     {notes, "  annotations: {sealvol.io/x: a}\n", errdefs.IsInvalidArgument, "is not known"},
		"annotation in capitals": {notes, "  annotations: {Volume.Sealvol.io/x: a}\n", errdefs.IsInvalidArgument, "is not known"},
		"annotation of nothing":  {notes, "  annotations: {volume.sealvol.io/x: '{\"emptyDir\": \"x\"}'}\n", errdefs.IsInvalidArgument, "the pod has no such volume"},
		"annotation persistent":  {notes, "  annotations: {volume.sealvol.io/x: '{\"mode\": \"persistent\"}'}\n", errdefs.IsFailedPrecondition, "persistent volumes come later"},
		"annotation of no JSON":  {notes, "  annotations: {volume.sealvol.io/x: a}\n", errdefs.IsInvalidArgument, "invalid character"},
		"annotation with a typo": {notes, "  annotations: {volume.sealvol.io/x: '{\"emptydir\": \"x\"}'}\n", errdefs.IsInvalidArgument, `unknown field "emptydir"`},
		"annotation, key twice":  {notes, "  annotations: {volume.sealvol.io/x: '{\"mode\": \"ephemeral\", \"mode\": \"ephemeral\"}'}\n", errdefs.IsInvalidArgument, `duplicate field "mode"`},
		"two for one device": {notes, "  annotations:\n    volume.sealvol.io/x: '{\"device\": \"/dev/x\", \"mountPath\": \"/x\", \"mode\": \"ephemeral\"}'\n" +
			"    volume.sealvol.io/y: '{\"device\": \"/dev/x\", \"mountPath\": \"/y\", \"mode\": \"ephemeral\"}'\n", errdefs.IsInvalidArgument, "ask for the same"},
		"a policy that is no base64": {notes, "  annotations: {io.katacontainers.config.agent.policy: '!'}\n", errdefs.IsInvalidArgument, "is not base64"},
		"a policy that is no Rego":   {notes, "  annotations: {io.katacontainers.config.agent.policy: eHh4}\n", errdefs.IsInvalidArgument, "policy"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			result, err := Annotate(t.Context(), with(t, c.old, c.new), Options{})
			if !c.class(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want an error with %q, got %v\n%s", c.want, err, result.Manifest)
			}
			if err != nil && !strings.HasPrefix(err.Error(), "Pod/p: ") {
				t.Errorf("must name the pod: %v", err)
			}
		})
	}
}

func TestEveryRefusalIsTold(t *testing.T) {
	t.Parallel()
	_, err := Annotate(t.Context(), with(t, "  runtimeClassName: kata\n", "  hostPID: true\n  shareProcessNamespace: true\n"), Options{})
	if err == nil || len(strings.Split(err.Error(), "\n")) != 2 {
		t.Errorf("the author would have to run the tool again and again: %v", err)
	}
}

func TestAnOptionThatNamesNothingIsAnError(t *testing.T) {
	t.Parallel()
	for name, options := range map[string]Options{
		"--claim data": {Claims: []string{"data"}},
		"--size v":     {Sizes: map[string]uint64{"v": 1}}, // its claim has a size
		"--size typo":  {Sizes: map[string]uint64{"typo": 1}},
	} {
		if _, err := Annotate(t.Context(), []byte(sealedManifest), options); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name+": ") {
			t.Errorf("%s: the author meant something else, got %v", name, err)
		}
	}
}

// Pods without sealed volumes pass through, whatever they are.
func TestOtherPodsOfAManifestStayAsTheyAre(t *testing.T) {
	t.Parallel()
	const other = `---
apiVersion: apps/v1
kind: Deployment
metadata: {name: other}
spec:
  template:
    spec:
      hostPID: true
      newField: 1
      containers:
      - {name: C, image: i, securityContext: {privileged: true}, newField: 2, volumeMounts: [{name: v, mountPath: /v, subPath: a}]}
      volumes: [{name: v, hostPath: {path: /}}]
`
	result, err := Annotate(t.Context(), []byte(sealedManifest+other), Options{})
	if err != nil || !strings.HasSuffix(string(result.Manifest), other) || len(result.Warnings) > 0 {
		t.Errorf("%v, %q\n%s", err, result.Warnings, result.Manifest)
	}
}

func TestAPolicyWithoutItsVolumesIsToldOf(t *testing.T) {
	t.Parallel()
	first, err := Annotate(t.Context(), []byte(sealedManifest), Options{})
	if err != nil {
		t.Fatal(err)
	}
	stale := strings.Replace(string(first.Manifest), DefaultClass, "other", 1)
	result, err := Annotate(t.Context(), []byte(stale+"---\n"+strings.Replace(sealedManifest, "name: p", "name: q", 1)), Options{})
	if err != nil || len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], "none of them any more") {
		t.Errorf("the pod would not start, got %v, %q", err, result.Warnings)
	}
}

// A pod of a kind that the tool does not know would run without a policy, and its author would not know why.
func TestPodsOfUnknownKindsAreToldOf(t *testing.T) {
	t.Parallel()
	const rollout = `---
apiVersion: argoproj.io/v1alpha1
kind: Rollout
metadata: {name: other}
spec:
  template:
    spec:
      containers: [{name: c, image: i}]
`
	const config = `---
apiVersion: v1
kind: ConfigMap
metadata: {name: text}
data: {containers: "[{image: i}]"}
`
	result, err := Annotate(t.Context(), []byte(sealedManifest+rollout+config), Options{})
	if err != nil || len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], "Rollout/other: has a pod's specification (spec.template.spec)") {
		t.Errorf("want a warning for the Rollout alone, got %q, %v", result.Warnings, err)
	}
	_, err = Annotate(t.Context(), []byte(rollout), Options{})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "its kind is not known here: Rollout/other") {
		t.Errorf("the error must name what was passed over, got %v", err)
	}
}

// Kubernetes takes the StatefulSet's template for the volume, whatever the pod's own says.
func TestAVolumeAndAClaimTemplateOfOneNameAreRefused(t *testing.T) {
	t.Parallel()
	const manifest = `apiVersion: apps/v1
kind: StatefulSet
metadata: {name: s}
spec:
  template:
    spec:
      runtimeClassName: kata
      containers: [{name: c, image: i, command: [run], volumeMounts: [{name: v, mountPath: /v}]}]
      volumes: [{name: v, VOLUME}]
  volumeClaimTemplates:
  - {metadata: {name: v, annotations: {ANNOTATION}}, spec: {storageClassName: other, resources: {requests: {storage: 1Mi}}}}
`
	for name, c := range map[string][2]string{
		"the pod's own would be sealed": {"ephemeral: {volumeClaimTemplate: {spec: {storageClassName: coco-local-csi, resources: {requests: {storage: 1Mi}}}}}", ""},
		"the template's would be":       {"emptyDir: {}", `volume.sealvol.io/v: '{"mode": "ephemeral"}'`},
		"both would be": {"ephemeral: {volumeClaimTemplate: {spec: {storageClassName: coco-local-csi, resources: {requests: {storage: 1Mi}}}}}",
			`volume.sealvol.io/v: '{"mode": "ephemeral"}'`},
	} {
		_, err := Annotate(t.Context(), []byte(strings.NewReplacer("VOLUME", c[0], "ANNOTATION", c[1]).Replace(manifest)), Options{})
		if !errdefs.IsInvalidArgument(err) || strings.Count(err.Error(), "another volume of the pod is called so too") != 1 {
			t.Errorf("%s: want one refusal, got %v", name, err)
		}
	}
}
