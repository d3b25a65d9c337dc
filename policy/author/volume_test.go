package author

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// claimManifest is a pod with a claim that is in the manifest.
const claimManifest = `apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, annotations: {NOTES}}
spec: {storageClassName: coco-local-csi, resources: {requests: {storage: 1Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers:
  - {name: c, image: i, command: [run], volumeMounts: [{name: v, mountPath: /v}]}
  volumes: [{name: v, persistentVolumeClaim: {claimName: data}}]
`

func TestAClaimOutlivesItsPodUnlessItSaysOtherwise(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ notes, want string }{
		"nothing said":      {"", "its claim outlives the pod, and persistent volumes come later"},
		"ephemeral":         {`volume.sealvol.io/data: '{"mode": "ephemeral"}'`, ""},
		"persistent":        {`volume.sealvol.io/data: '{"mode": "persistent"}'`, "persistent volumes come later"},
		"of another volume": {`volume.sealvol.io/v: '{"mode": "ephemeral"}'`, "the one that counts is volume.sealvol.io/data"},
		"more than a mode":  {`volume.sealvol.io/data: '{"mode": "ephemeral", "device": "/dev/a", "mountPath": "/a"}'`, "says more than"},
		"others":            {`example.com/a: b`, "its claim outlives the pod"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Annotate(t.Context(), []byte(strings.Replace(claimManifest, "NOTES", c.notes, 1)), Options{})
			if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("want %q, got %v", c.want, err)
			}
		})
	}
}

func TestAVolumeOfOurDriverIsSealed(t *testing.T) {
	t.Parallel()
	_, manifest, _ := strings.Cut(claimManifest, "---\n")
	of := func(source string) string {
		return strings.Replace(manifest, "persistentVolumeClaim: {claimName: data}", source, 1)
	}
	for name, c := range map[string]struct{ source, want string }{
		"writable":  {`csi: {driver: coco-local-csi, volumeAttributes: {size: 1Mi}}`, `"read_only": false`},
		"read-only": {`csi: {driver: coco-local-csi, readOnly: true, volumeAttributes: {size: 1Mi}}`, `"read_only": true`},
	} {
		result, err := Annotate(t.Context(), []byte(of(c.source)), Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range []string{`"size": {"min": 1048576, "max": 1048576}`, c.want} {
			if !strings.Contains(string(result.Pods[0].Policy), want) {
				t.Errorf("%s: no %s in\n%s", name, want, result.Pods[0].Policy)
			}
		}
	}
	if _, err := Annotate(t.Context(), []byte(of(`csi: {driver: inline.example, volumeAttributes: {size: 1Mi}}`)), Options{}); !errdefs.IsNotFound(err) {
		t.Errorf("another driver's volume is sealed (%v)", err)
	}
}

func TestClaimsElsewhereAreNamedWithTheirSize(t *testing.T) {
	t.Parallel()
	_, manifest, _ := strings.Cut(claimManifest, "---\n")
	if _, err := Annotate(t.Context(), []byte(manifest), Options{Claims: []string{"data"}}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a claim that is named outlives its pod all the same, got %v", err)
	}
	manifest = strings.Replace(manifest, "{name: p}", `{name: p, annotations: {volume.sealvol.io/v: '{"mode": "ephemeral"}'}}`, 1)
	if _, err := Annotate(t.Context(), []byte(manifest), Options{}); err == nil || !strings.Contains(err.Error(), "--size v=10Gi") {
		t.Errorf("want to be asked for the size, got %v", err)
	}
	result, err := Annotate(t.Context(), []byte(manifest), Options{Sizes: map[string]uint64{"v": 5}})
	if err != nil || !strings.Contains(string(result.Pods[0].Policy), `"size": {"min": 5, "max": 1048576}`) {
		t.Errorf("%v\n%+v", err, result)
	}
}

func TestClaimsAreThoseOfTheirNamespace(t *testing.T) {
	t.Parallel()
	claim, rest, _ := strings.Cut(strings.Replace(claimManifest, "NOTES", `volume.sealvol.io/data: '{"mode": "ephemeral"}'`, 1), "---\n")
	claim = strings.Replace(claim, "{name: data,", "{namespace: a, name: data,", 1)
	if _, err := Annotate(t.Context(), []byte(claim+"---\n"+rest), Options{}); !errdefs.IsNotFound(err) {
		t.Errorf("the claim is another namespace's, got %v", err)
	}
	rest = strings.Replace(rest, "{name: p}", "{namespace: a, name: p}", 1)
	other := strings.Replace(claim, "namespace: a", "namespace: b", 1)
	if _, err := Annotate(t.Context(), []byte(claim+"---\n"+other+"---\n"+rest), Options{}); err != nil {
		t.Error(err)
	}
	if _, err := Annotate(t.Context(), []byte(claim+"---\n"+claim+"---\n"+rest), Options{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("which of two claims is meant? got %v", err)
	}
}

func TestAnnotationsThatAskForNoVolume(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{}`:                                                                                `mode "" is not supported`,
		`{"mode": "Ephemeral"}`:                                                             `mode "Ephemeral" is not supported`,
		`{"emptyDir": "a", "mode": "memory"}`:                                               `mode "memory" is not supported`,
		`{"emptyDir": "a", "device": "/dev/a"}`:                                             "remove device and mountPath",
		`{"device": "/dev/a", "mode": "ephemeral"}`:                                         "device and mountPath go together",
		`{"mountPath": "/a", "mode": "ephemeral"}`:                                          "device and mountPath go together",
		`{"device": "dev/a", "mountPath": "/a", "mode": "ephemeral"}`:                       `device "dev/a" is not a clean`,
		`{"device": "/dev/a", "mountPath": "/a/../b", "mode": "ephemeral"}`:                 `mountPath "/a/../b" is not a clean`,
		`{"device": "/dev/a", "mountPath": "/a", "mode": "ephemeral", "size": "1Gi"}`:       "size is that of an emptyDir",
		`{"emptyDir": "a", "size": "big"}`:                                                  `size "big"`,
		`{"emptyDir": "a", "size": "-1"}`:                                                   `size "-1" is no quantity`,
		`{"emptyDir": "a"} {}`:                                                              "invalid character",
		`{"device": "/dev/a", "mountPath": "/a", "mode": "ephemeral", "layering": "luks2"}`: `unknown field "layering"`,
	} {
		if q, err := parseRequest(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: want an error with %q, got %+v, %v", text, want, q, err)
		}
	}
}

// deviceManifest is a pod with a raw block device for two containers.
const deviceManifest = `apiVersion: v1
kind: Pod
metadata:
  name: p
  annotations: {volume.sealvol.io/sealed: '{"device": "/dev/x", "mountPath": "/x", "mode": "ephemeral"}'}
spec:
  runtimeClassName: kata
  containers:
  - {name: a, image: i, command: [run], volumeDevices: [{name: v, devicePath: /dev/x}]}
  ephemeralContainers:
  - {name: b, image: i, command: [run], B}
  volumes:
  - name: v
    V
`

func TestRawDevicesAreFollowed(t *testing.T) {
	t.Parallel()
	const (
		claimed = "ephemeral: {volumeClaimTemplate: {spec: {volumeMode: Block, resources: {requests: {storage: 1Mi}}}}}"
		device  = "volumeDevices: [{name: v, devicePath: /dev/x}]"
	)
	for name, c := range map[string]struct{ b, v, want string }{
		"both":                         {device, claimed, ""},
		"one has it not":               {"tty: true", claimed, ""},
		"a claim that is elsewhere":    {device, "persistentVolumeClaim: {claimName: c}", "its claim is not in the manifest"},
		"a file system":                {device, strings.Replace(claimed, "volumeMode: Block, ", "", 1), "needs volumeMode: Block"},
		"by another path":              {"volumeDevices: [{name: v, devicePath: /dev/y}]", claimed, `has volume "v" as "/dev/y" and not as "/dev/x"`},
		"another volume at its path":   {"volumeDevices: [{name: w, devicePath: /dev/x}]", claimed, `is volume "w" here and "v" elsewhere`},
		"mounted too":                  {"volumeMounts: [{name: v, mountPath: /v}]", claimed, "the volume is a block device"},
		"no device":                    {device, "hostPath: {path: /dev/sda}", "the pod has no such volume"},
		"a device that is an emptyDir": {device, "emptyDir: {}", "the pod has no such volume"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			result, err := Annotate(t.Context(), []byte(strings.NewReplacer("B}", c.b+"}", "    V\n", "    "+c.v+"\n").Replace(deviceManifest)), Options{})
			if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Fatalf("want %q, got %v", c.want, err)
			}
			if err != nil {
				return
			}
			text := string(result.Pods[0].Policy)
			if !strings.Contains(text, `{"container": "a", "path": "/x", "read_only": false}`) {
				t.Errorf("container a has it:\n%s", text)
			}
			if has := strings.Contains(text, `{"container": "b", "path": "/x", "read_only": false}`); has != (c.b == device) || has == (len(result.Warnings) > 0) {
				t.Errorf("container b has it or the author is warned: %q\n%s", result.Warnings, text)
			}
		})
	}
}

func TestTwoVolumesOfOneNameAreRefused(t *testing.T) {
	t.Parallel()
	manifest := strings.NewReplacer("annotations: {}", `annotations: {volume.sealvol.io/v: '{"emptyDir": "w", "size": "1Mi"}'}`,
		"    - {name: v, mountPath: /v}\n", "    - {name: v, mountPath: /v}\n    - {name: w, mountPath: /w}\n",
		"  - name: v\n", "  - name: w\n    emptyDir: {}\n  - name: v\n").Replace(sealedManifest)
	result, err := Annotate(t.Context(), []byte(manifest), Options{})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `is called "v" too`) {
		t.Errorf("one of them would be lost, got %v\n%s", err, result.Manifest)
	}
}

func TestEmptyDirsAreSealedOnRequest(t *testing.T) {
	t.Parallel()
	const source = "ephemeral: {volumeClaimTemplate: {spec: {storageClassName: coco-local-csi, resources: {requests: {storage: 1Mi}}}}}"
	for name, c := range map[string]struct{ annotation, source, want string }{
		"with a size":       {`{"emptyDir": "v", "size": "1Gi"}`, "emptyDir: {}", ""},
		"with a limit":      {`{"emptyDir": "v"}`, "emptyDir: {sizeLimit: 1Gi}", "the node does not see a sizeLimit"},
		"with both":         {`{"emptyDir": "v", "size": "1Gi"}`, "emptyDir: {sizeLimit: 3Gi}", ""},
		"with a tight one":  {`{"emptyDir": "v", "size": "1Gi"}`, "emptyDir: {sizeLimit: 1Gi}", ""},
		"without a size":    {`{"emptyDir": "v"}`, "emptyDir: {}", "has no size"},
		"in memory":         {`{"emptyDir": "v", "size": "1Gi"}`, "emptyDir: {medium: Memory}", "remove its medium"},
		"that is none":      {`{"emptyDir": "v", "size": "1Gi"}`, "hostPath: {path: /}", "the pod has no such volume"},
		"that is not there": {`{"emptyDir": "w", "size": "1Gi"}`, "emptyDir: {}", "the pod has no such volume"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			manifest := strings.NewReplacer("annotations: {}", "annotations: {volume.sealvol.io/s: '"+c.annotation+"'}", source, c.source).Replace(sealedManifest)
			result, err := Annotate(t.Context(), []byte(manifest), Options{})
			if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Fatalf("want %q, got %v", c.want, err)
			}
			if warned := strings.Contains(strings.Join(result.Warnings, "\n"), "then kubelet evicts the pod"); warned != (name == "with a tight one") {
				t.Errorf("warnings are %q", result.Warnings)
			}
			if err == nil && !strings.Contains(string(result.Pods[0].Policy), `"size": {"min": 1073741824, "max": 1073741824}`) {
				t.Errorf("%s", result.Pods[0].Policy)
			}
		})
	}
}

// Kubernetes goes by the old annotation before the field.
func TestAClassByTheOldAnnotation(t *testing.T) {
	t.Parallel()
	const field = "spec: {storageClassName: coco-local-csi, "
	annotation := func(class, rest string) []byte {
		return with(t, field, "metadata: {annotations: {volume.beta.kubernetes.io/storage-class: "+class+"}}, "+rest)
	}
	if result, err := Annotate(t.Context(), annotation("coco-local-csi", "spec: {"), Options{}); err != nil || len(result.Pods) != 1 {
		t.Errorf("the volume is of the class, got %v, %v", result.Pods, err)
	}
	if _, err := Annotate(t.Context(), annotation("other", field), Options{}); !errdefs.IsNotFound(err) {
		t.Errorf("the volume is of another class, got %v", err)
	}
}
