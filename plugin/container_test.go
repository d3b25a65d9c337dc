package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/sealvol/sealvol/plugin/published"
	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	key       = "volume.sealvol.io/encrypted"
	value     = `{"device": "/dev/encrypted", "mountPath": "/mnt/encrypted", "mode": "ephemeral"}`
	sandboxID = "c0ffee"
	podUID    = "0b1e5f3a-0000-4000-8000-000000000001"
	pods      = "/var/lib/kubelet/pods/" + podUID

	csiTarget = pods + "/volumes/kubernetes.io~csi/pvc-1/mount"
	csiFile   = "/var/lib/driver/pvc-1.img"
)

// testConfig is the default one, but with a folder of records that holds the
// volume pvc-1, published at csiTarget.
func testConfig(t *testing.T) config {
	t.Helper()
	c := defaultConfig()
	c.published = published.Dir(filepath.Join(t.TempDir(), "published"))
	if err := c.published.Write(published.Volume{Name: "pvc-1", Target: csiTarget, File: csiFile}); err != nil {
		t.Fatal(err)
	}
	return c
}

func testPod() *api.PodSandbox {
	return &api.PodSandbox{
		Id: sandboxID, Uid: podUID, Namespace: "default", Name: "web", RuntimeHandler: "kata",
		Annotations: map[string]string{key: value, "io.katacontainers.config.agent.policy": "cGFja2FnZQ=="},
	}
}

func testContainer() *api.Container {
	return &api.Container{
		Id: "ctr", PodSandboxId: sandboxID, Name: "app",
		Annotations: map[string]string{"io.kubernetes.cri.container-type": "container"},
		Mounts:      []*api.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/etc/hosts", Type: "bind"}},
		Linux: &api.LinuxContainer{Devices: []*api.LinuxDevice{
			{Path: "/dev/fuse", Type: "c", Major: 7, Minor: 1},
			{Path: "/dev/encrypted", Type: "b", Major: 7, Minor: 1},
		}},
	}
}

func TestAdjustTurnsTheAnnotationIntoARequest(t *testing.T) {
	t.Parallel()
	got, err := adjust(testConfig(t), testPod(), testContainer())
	if err != nil {
		t.Fatal(err)
	}
	source := "/run/sealvol/direct/c0ffee/encrypted"
	want := &api.ContainerAdjustment{}
	want.RemoveDevice("/dev/encrypted")
	want.AddMount(&api.Mount{Destination: "/mnt/encrypted", Type: "bind", Source: source, Options: []string{"rbind", "rw"}})
	want.AddAnnotation("hotplug.sealvol.io/request", `{"version":1,"volumes":[{"name":"encrypted","mountPath":"/mnt/encrypted",`+
		`"source":"/run/sealvol/direct/c0ffee/encrypted","device":{"major":7,"minor":1}}]}`)
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestAdjustTakesVolumesInOrderOfTheirNames(t *testing.T) {
	t.Parallel()
	pod, container := testPod(), testContainer()
	pod.Annotations, container.Linux.Devices = map[string]string{}, nil
	for minor, name := range []string{"c", "a", "b"} {
		pod.Annotations["volume.sealvol.io/"+name] = `{"device":"/dev/` + name + `","mountPath":"/` + name + `","mode":"ephemeral"}`
		container.Linux.Devices = append(container.Linux.Devices, &api.LinuxDevice{Path: "/dev/" + name, Type: "b", Major: 8, Minor: int64(minor)})
	}
	got, err := adjust(testConfig(t), pod, container)
	if err != nil {
		t.Fatal(err)
	}
	request, err := hotplug.Parse([]byte(got.Annotations[hotplug.Annotation]))
	if err != nil {
		t.Fatal(err)
	}
	var names, numbers []string
	for _, v := range request.Volumes {
		names, numbers = append(names, v.Name), append(numbers, v.Backing.String())
	}
	if diff := cmp.Diff([]string{"a", "b", "c", "8:1", "8:2", "8:0"}, append(names, numbers...)); diff != "" {
		t.Error(diff)
	}
}

// bind is a mount as containerd makes it of one of kubelet's.
func bind(source, destination, access string) *api.Mount {
	return &api.Mount{Destination: destination, Type: "bind", Source: source, Options: []string{"rbind", "rprivate", access}}
}

// TestAdjustTurnsMountsIntoRequests gives containers mounts of volumes as kubelet
// does, with the slash that a pod's author may have put behind a path.
func TestAdjustTurnsMountsIntoRequests(t *testing.T) {
	t.Parallel()
	const emptyDir = pods + "/volumes/kubernetes.io~empty-dir/scratch"
	for name, test := range map[string]struct {
		annotation string // of the volume "pages"
		mount      *api.Mount
		volume     string // and its backing in the request, or nothing
		backing    string
		access     string
	}{
		"a CSI volume":                     {"", bind(csiTarget, "/data", "rw"), "pvc-1", `"file":"` + csiFile + `"`, "rw"},
		"a CSI volume with a slash":        {"", bind(csiTarget, "/data/", "rw"), "pvc-1", `"file":"` + csiFile + `"`, "rw"},
		"a CSI volume that is read-only":   {"", bind(csiTarget, "/data", "ro"), "pvc-1", `"file":"` + csiFile + `"`, "ro"},
		"a CSI volume whose data may go":   {`{"mode":"ephemeral"}`, bind(csiTarget, "/data", "rw"), "pvc-1", `"file":"` + csiFile + `"`, "rw"},
		"a CSI volume of another driver":   {"", bind(pods+"/volumes/kubernetes.io~csi/pvc-2/mount", "/data", "rw"), "", "", ""},
		"an emptyDir":                      {`{"emptyDir":"scratch","size":"3Gi"}`, bind(emptyDir, "/data", "rw"), "pages", `"emptyDir":{"path":"` + emptyDir + `","size":3221225472}`, "rw"},
		"an emptyDir with a mode":          {`{"emptyDir":"scratch","size":"1","mode":"ephemeral"}`, bind(emptyDir, "/data", "rw"), "pages", `"emptyDir":{"path":"` + emptyDir + `","size":1048576}`, "rw"},
		"an emptyDir of decimal size":      {`{"emptyDir":"scratch","size":"1.5G"}`, bind(emptyDir, "/data/", "ro"), "pages", `"emptyDir":{"path":"` + emptyDir + `","size":1500512256}`, "ro"},
		"an emptyDir that nobody asks for": {`{"emptyDir":"other","size":"3Gi"}`, bind(emptyDir, "/data", "rw"), "", "", ""},
		"an emptyDir of another pod":       {`{"emptyDir":"scratch","size":"3Gi"}`, bind("/var/lib/kubelet/pods/2/volumes/kubernetes.io~empty-dir/scratch", "/data", "rw"), "", "", ""},
		"a kubelet with another root":      {`{"emptyDir":"scratch","size":"3Gi"}`, bind("/data"+emptyDir, "/data", "rw"), "pages", `"emptyDir":{"path":"/data` + emptyDir + `","size":3221225472}`, "rw"},
		"a folder with an emptyDir's name": {`{"emptyDir":"scratch","size":"3Gi"}`, bind("/srv/scratch", "/data", "rw"), "", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod, container := testPod(), testContainer()
			pod.Annotations = nil
			if test.annotation != "" {
				pod.Annotations = map[string]string{"volume.sealvol.io/pages": test.annotation}
			}
			container.Mounts = append(container.Mounts, test.mount)
			got, err := adjust(testConfig(t), pod, container)
			if err != nil {
				t.Fatal(err)
			}
			if test.volume == "" {
				if got != nil {
					t.Errorf("another's mount was changed: %v", got)
				}
				return
			}
			source := "/run/sealvol/direct/c0ffee/" + test.volume
			want := &api.ContainerAdjustment{}
			if test.mount.Destination != "/data" {
				want.RemoveMount(test.mount.Destination)
			}
			want.AddMount(&api.Mount{Destination: "/data", Type: "bind", Source: source, Options: []string{"rbind", test.access}})
			want.AddAnnotation("hotplug.sealvol.io/request", fmt.Sprintf(
				`{"version":1,"volumes":[{"name":%q,"mountPath":"/data","source":%q,%s}]}`, test.volume, source, test.backing))
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// containerd passes a source on with the links that lead to kubelet's root folder.
func TestAPublishedVolumeIsFoundBehindALink(t *testing.T) {
	t.Parallel()
	c, base := testConfig(t), t.TempDir()
	target := filepath.Join(base, "real/pods", podUID, "volumes/kubernetes.io~csi/pvc-2/mount")
	err := errors.Join(os.MkdirAll(target, 0o700), os.Symlink("real", filepath.Join(base, "link")),
		c.published.Write(published.Volume{Name: "pvc-2", Target: target, File: csiFile}))
	if err != nil {
		t.Fatal(err)
	}
	container := testContainer()
	container.Mounts = append(container.Mounts, bind(strings.Replace(target, "/real/", "/link/", 1), "/data", "rw"))
	got, err := adjust(c, testPod(), container)
	if err != nil || !strings.Contains(got.GetAnnotations()[hotplug.Annotation], `"name":"pvc-2"`) {
		t.Errorf("gives %v, %v", got, err)
	}
}

// Another driver's target is a mount, and looking at it may take for ever.
func TestATargetItselfIsNotLookedAt(t *testing.T) {
	t.Parallel()
	c, base := testConfig(t), t.TempDir()
	target := filepath.Join(base, "real/pods", podUID, "volumes/kubernetes.io~csi/pvc-2/mount")
	err := errors.Join(os.MkdirAll(filepath.Dir(target), 0o700), os.Symlink("real", filepath.Join(base, "link")), os.Symlink("mount", target),
		c.published.Write(published.Volume{Name: "pvc-2", Target: target, File: csiFile}))
	if err != nil {
		t.Fatal(err)
	}
	container := testContainer()
	container.Mounts = append(container.Mounts, bind(strings.Replace(target, "/real/", "/link/", 1), "/data", "rw"))
	got, err := adjust(c, testPod(), container)
	if err != nil || !strings.Contains(got.GetAnnotations()[hotplug.Annotation], `"name":"pvc-2"`) {
		t.Errorf("a target that is a link to itself was followed: %v, %v", got, err)
	}
}

// The folder behind a sealed volume is the node's: a part of it would be written in the clear.
func TestAPartOfAPublishedVolumeIsRefused(t *testing.T) {
	t.Parallel()
	for name, source := range map[string]string{
		"a subPath":                           pods + "/volume-subpaths/pvc-1/app/0",
		"a subPath's file":                    pods + "/volume-subpaths/pvc-1/app/0/file",
		"a folder below the target":           csiTarget + "/sub",
		"a folder below, in a roundabout way": csiTarget + "/x/../sub/",
		"what is like another pod's volume":   csiTarget + "/pods/2/volumes/kubernetes.io~csi/pvc-2/mount",
	} {
		for _, handler := range []string{"kata", "runc"} {
			pod, container := testPod(), testContainer()
			pod.Annotations, pod.RuntimeHandler = nil, handler
			container.Mounts = append(container.Mounts, bind(source, "/data", "rw"))
			got, err := adjust(testConfig(t), pod, container)
			if got != nil || !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), `volume "pvc-1": the container mounts a part of it at "/data"`) {
				t.Errorf("%s, %s: gives %v, %v", name, handler, got, err)
			}
		}
	}
	for name, source := range map[string]string{
		"a subPath of another driver's volume": pods + "/volume-subpaths/pvc-2/app/0",
		"a subPath of another pod's volume":    "/var/lib/kubelet/pods/2/volume-subpaths/pvc-1/app/0",
		"a folder that is no pod's":            "/srv/volume-subpaths/pvc-1/app/0",
	} {
		pod, container := testPod(), testContainer()
		pod.Annotations = nil
		container.Mounts = append(container.Mounts, bind(source, "/data", "rw"))
		if got, err := adjust(testConfig(t), pod, container); got != nil || err != nil {
			t.Errorf("%s: gives %v, %v", name, got, err)
		}
	}
}

// A folder of records that is not to be trusted stands in the way of CSI volumes, and of nobody else on the node.
func TestAFolderThatOthersMayEnterRefusesCSIVolumesAlone(t *testing.T) {
	t.Parallel()
	c := testConfig(t)
	if err := os.Chmod(string(c.published), 0o755); err != nil {
		t.Fatal(err)
	}
	pod, container := testPod(), testContainer()
	pod.Annotations, pod.RuntimeHandler = nil, "runc"
	container.Mounts = append(container.Mounts, bind("/etc/hosts", "/etc/hosts", "rw"), bind(pods+"/volumes/kubernetes.io~secret/token", "/token", "ro"))
	if got, err := adjust(c, pod, container); got != nil || err != nil {
		t.Errorf("a container that asks for nothing: %v, %v", got, err)
	}
	container.Mounts = append(container.Mounts, bind(csiTarget, "/data", "rw"))
	if got, err := adjust(c, pod, container); got != nil || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container with a published volume: %v, %v", got, err)
	}
}

// The guest's policy says which container must have which volume.
func TestAContainerWithoutTheVolumeIsLetThrough(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*api.Container){
		"it has no devices":         func(c *api.Container) { c.Linux.Devices = nil },
		"it is not Linux":           func(c *api.Container) { c.Linux = nil },
		"it has a character device": func(c *api.Container) { c.Linux.Devices = c.Linux.Devices[:1] },
	} {
		container := testContainer()
		change(container)
		if got, err := adjust(testConfig(t), testPod(), container); err != nil || got != nil {
			t.Errorf("%s: gives %v, %v", name, got, err)
		}
	}
}

// A mount whose record cannot be read may be a sealed volume: taken for another
// it would show the container a folder of the host.
func TestADamagedRecordRefusesTheContainer(t *testing.T) {
	t.Parallel()
	c, container := testConfig(t), testContainer()
	container.Mounts = append(container.Mounts, bind(csiTarget, "/data", "rw"))
	entries, err := filepath.Glob(filepath.Join(string(c.published), "*"))
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	if err := os.WriteFile(entries[0], []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := adjust(c, testPod(), container); got != nil || !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), `"/data"`) {
		t.Errorf("gives %v, %v", got, err)
	}
}

func TestAdjustLeavesOthersAlone(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*api.PodSandbox, *api.Container){
		"no annotation of ours": func(pod *api.PodSandbox, _ *api.Container) { delete(pod.Annotations, key) },
		"no annotations":        func(pod *api.PodSandbox, _ *api.Container) { pod.Annotations = nil },
		"no annotation of ours, another runtime": func(pod *api.PodSandbox, _ *api.Container) {
			delete(pod.Annotations, key)
			pod.RuntimeHandler = "runc"
		},
		"a domain that ends like ours": func(pod *api.PodSandbox, _ *api.Container) {
			pod.Annotations = map[string]string{"notsealvol.io/volume": "x", "example.com/volume.sealvol.io": "x"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod, container := testPod(), testContainer()
			change(pod, container)
			if got, err := adjust(testConfig(t), pod, container); err != nil || got != nil {
				t.Errorf("gives %v, %v", got, err)
			}
		})
	}
}

// A runtime whose pod_annotations pass ours on puts them on each container too.
func TestAdjustTakesCopiesOfThePodsAnnotations(t *testing.T) {
	t.Parallel()
	container := testContainer()
	container.Annotations[key] = value
	if got, err := adjust(testConfig(t), testPod(), container); err != nil || got == nil {
		t.Errorf("gives %v, %v", got, err)
	}
}

func TestAdjustNestsMounts(t *testing.T) {
	t.Parallel()
	for _, destination := range []string{"/mnt", "/mnt/encrypted/cache", "/mnt/encrypted2"} {
		container := testContainer()
		container.Mounts = append(container.Mounts, &api.Mount{Destination: destination})
		if got, err := adjust(testConfig(t), testPod(), container); err != nil || got == nil {
			t.Errorf("beside %s: %v, %v", destination, got, err)
		}
	}
}

func TestAdjustRefuses(t *testing.T) {
	t.Parallel()
	// annotate changes the annotation's JSON.
	annotate := func(old, new string) func(*api.PodSandbox, *api.Container) {
		if !strings.Contains(value, old) {
			t.Fatalf("%s is not in the annotation", old)
		}
		return func(pod *api.PodSandbox, _ *api.Container) {
			pod.Annotations[key] = strings.Replace(value, old, new, 1)
		}
	}
	set := func(text string) func(*api.PodSandbox, *api.Container) { return annotate(value, text) }
	onPod := func(key, text string) func(*api.PodSandbox, *api.Container) {
		return func(pod *api.PodSandbox, _ *api.Container) { pod.Annotations[key] = text }
	}
	onContainer := func(key, text string) func(*api.PodSandbox, *api.Container) {
		return func(_ *api.PodSandbox, c *api.Container) { c.Annotations[key] = text }
	}
	device := func(change func(d *api.LinuxDevice)) func(*api.PodSandbox, *api.Container) {
		return func(_ *api.PodSandbox, c *api.Container) { change(c.Linux.Devices[1]) }
	}
	addDevice := func(d *api.LinuxDevice) func(*api.PodSandbox, *api.Container) {
		return func(_ *api.PodSandbox, c *api.Container) { c.Linux.Devices = append(c.Linux.Devices, d) }
	}
	handler := func(name string) func(*api.PodSandbox, *api.Container) {
		return func(pod *api.PodSandbox, _ *api.Container) { pod.RuntimeHandler = name }
	}
	for name, test := range map[string]struct {
		change func(*api.PodSandbox, *api.Container)
		want   string
	}{
		"an empty annotation":         {set(""), "unexpected end"},
		"a path as annotation":        {set("/dev/encrypted"), "invalid character"},
		"null":                        {set("null"), `mode "" is not supported`},
		"an array":                    {set("[]"), "cannot unmarshal array"},
		"trailing data":               {set(value + value), "after top-level value"},
		"bytes that are not UTF-8":    {annotate("/mnt/encrypted", "/mnt/\xff"), "not UTF-8"},
		"an annotation without end":   {set(value + strings.Repeat(" ", hotplug.MaxSize)), "more than 65536"},
		"an unknown key":              {annotate(`"mode"`, `"fsType": "xfs", "mode"`), `unknown field "fsType"`},
		"two unknown keys":            {annotate(`"mode"`, `"a": 1, "b": 2, "mode"`), `unknown field "a", unknown field "b"`},
		"a key in another case":       {annotate(`"device"`, `"Device"`), `unknown field "Device"`},
		"a key twice":                 {annotate(`"mode"`, `"device": "/dev/sda", "mode"`), `duplicate field "device"`},
		"a device that is no string":  {annotate(`"/dev/encrypted"`, `["/dev/encrypted"]`), "cannot unmarshal array"},
		"no device":                   {annotate(`"device": "/dev/encrypted", `, ``), `device "" is not an absolute path`},
		"a relative device":           {annotate("/dev/encrypted", "dev/encrypted"), `device "dev/encrypted" is not an absolute path`},
		"a dirty device":              {annotate("/dev/encrypted", "/dev/../dev/encrypted"), `not a clean path, write "/dev/encrypted"`},
		"no mount path":               {annotate(`"mountPath": "/mnt/encrypted", `, ``), `mountPath "" is not an absolute path`},
		"a relative mount path":       {annotate("/mnt/encrypted", "mnt"), `mountPath "mnt" is not an absolute path`},
		"a mount path that climbs":    {annotate("/mnt/encrypted", "/mnt/../../etc"), "is not a clean path"},
		"a mount path with a slash":   {annotate("/mnt/encrypted", "/mnt/encrypted/"), "is not a clean path"},
		"the root as mount path":      {annotate("/mnt/encrypted", "/"), "is the root"},
		"a newline in the mount path": {annotate("/mnt/encrypted", `/mnt\n`), "unprintable"},
		"no mode":                     {annotate(`, "mode": "ephemeral"`, ``), `mode "" is not supported: persistent volumes come later`},
		"a mode to come":              {annotate("ephemeral", "persistent"), `mode "persistent" is not supported: persistent volumes come later`},
		"a mode in another case":      {annotate("ephemeral", "Ephemeral"), `mode "Ephemeral" is not supported`},

		"a volume without name":              {onPod("volume.sealvol.io/", value), `volume name ""`},
		"a volume in capitals":               {onPod("volume.sealvol.io/Data", value), `volume name "Data"`},
		"a volume with a path for name":      {onPod("volume.sealvol.io/../x", value), `volume name "../x"`},
		"a prefix with an s too many":        {onPod("volumes.sealvol.io/encrypted", value), "not known"},
		"a prefix in another case":           {onPod("Volume.SealVol.io/encrypted", value), "not known"},
		"a key that is a prefix":             {onPod("volume.sealvol.io", value), "not known"},
		"a key of the bare domain":           {onPod("sealvol.io/volume", value), "not known"},
		"a key in a domain below":            {onPod("x.volume.sealvol.io/encrypted", value), "not known"},
		"a request on the pod":               {onPod(hotplug.Annotation, "{}"), "not known"},
		"a request on the container":         {onContainer(hotplug.Annotation, "{}"), "belong on the pod"},
		"a volume on the container":          {onContainer("volume.sealvol.io/x", value), "belong on the pod"},
		"another text on the container":      {onContainer(key, "{}"), "belong on the pod"},
		"a container annotation in capitals": {onContainer("HOTPLUG.sealvol.io/request", "{}"), "belong on the pod"},
		"a request without any volume": {func(pod *api.PodSandbox, c *api.Container) {
			delete(pod.Annotations, key)
			c.Annotations[hotplug.Annotation] = "{}"
		}, "belong on the pod"},

		"a runtime that cannot":       {handler("runc"), `runtime handler "runc" is not in`},
		"the default runtime":         {handler(""), `runtime handler "" is not in`},
		"a device of the host":        {annotate("/dev/encrypted", "/dev/sda"), `block device "/dev/encrypted" (7:1), which no annotation of the pod names`},
		"a character device":          {annotate("/dev/encrypted", "/dev/fuse"), `device "/dev/fuse" is not a block device`},
		"a device of no type":         {device(func(d *api.LinuxDevice) { d.Type = "" }), "is not a block device"},
		"a negative number":           {device(func(d *api.LinuxDevice) { d.Minor = -1 }), "impossible number 7:-1"},
		"a number that overflows":     {device(func(d *api.LinuxDevice) { d.Major = 1<<32 + 7 }), "impossible number 4294967303:1"},
		"a number of no block device": {device(func(d *api.LinuxDevice) { d.Major = 0 }), "no number of a block device"},
		"a device twice at its path":  {addDevice(&api.LinuxDevice{Path: "/dev/encrypted", Type: "b", Major: 9}), "two devices at"},
		"a device under another name": {addDevice(&api.LinuxDevice{Path: "/dev/loop1", Type: "b", Major: 7, Minor: 1}), `block device "/dev/loop1" (7:1), which no annotation of the pod names`},
		"a mount at the path": {func(_ *api.PodSandbox, c *api.Container) {
			c.Mounts = append(c.Mounts, &api.Mount{Destination: "/mnt/./encrypted/"})
		}, `another mount at "/mnt/encrypted"`},
		"a device at the path": {annotate("/mnt/encrypted", "/dev/fuse"), `has a device at the volume's path`},
		"two volumes on a path": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Annotations["volume.sealvol.io/x"] = strings.Replace(value, "/dev/encrypted", "/dev/x", 1)
			c.Linux.Devices = append(c.Linux.Devices, &api.LinuxDevice{Path: "/dev/x", Type: "b", Major: 9})
		}, `mountPath "/mnt/encrypted" is also that of volume "encrypted"`},
		"two volumes on a device": {onPod("volume.sealvol.io/x", strings.Replace(value, "/mnt/encrypted", "/mnt/x", 1)),
			`asks for the same /dev/encrypted as that of volume "encrypted"`},
		"two volumes on a device of two names": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Annotations["volume.sealvol.io/x"] = `{"device":"/dev/x","mountPath":"/mnt/x","mode":"ephemeral"}`
			c.Linux.Devices = append(c.Linux.Devices, &api.LinuxDevice{Path: "/dev/x", Type: "b", Major: 7, Minor: 1})
		}, `device "7:1" is also that of volume "encrypted"`},
		"another block device": {addDevice(&api.LinuxDevice{Path: "/dev/sda", Type: "b", Major: 8}), `block device "/dev/sda" (8:0), which no annotation of the pod names`},

		"a size for a device":      {annotate(`"mode"`, `"size": "1Gi", "mode"`), "size is that of an emptyDir"},
		"an emptyDir on a device":  {annotate(`"mode"`, `"emptyDir": "a", "size": "1Gi", "mode"`), "remove device and mountPath"},
		"an emptyDir and no size":  {set(`{"emptyDir":"scratch"}`), "emptyDir needs a size"},
		"an emptyDir that is kept": {set(`{"emptyDir":"scratch","size":"1Gi","mode":"persistent"}`), "persistent volumes come later"},
		"an emptyDir that climbs":  {set(`{"emptyDir":"..","size":"1Gi"}`), `emptyDir ".." is no name`},
		"an emptyDir twice": {func(pod *api.PodSandbox, _ *api.Container) {
			pod.Annotations["volume.sealvol.io/a"] = `{"emptyDir":"scratch","size":"1Gi"}`
			pod.Annotations["volume.sealvol.io/b"] = `{"emptyDir":"scratch","size":"2Gi"}`
		}, `asks for the same scratch as that of volume "a"`},
		"a size of nothing":            {set(`{"emptyDir":"scratch","size":"0"}`), "is not between 1 and"},
		"a size that is negative":      {set(`{"emptyDir":"scratch","size":"-1Gi"}`), "no quantity of bytes"},
		"a size of no known unit":      {set(`{"emptyDir":"scratch","size":"1GB"}`), "no quantity of bytes"},
		"a size in thousandths":        {set(`{"emptyDir":"scratch","size":"1m"}`), "no quantity of bytes"},
		"a size that no disk has":      {set(`{"emptyDir":"scratch","size":"2Ei"}`), "is not between 1 and"},
		"a size that fills the memory": {set(`{"emptyDir":"scratch","size":"1e999999999"}`), "no quantity of bytes"},
		"a size of digits without end": {set(`{"emptyDir":"scratch","size":"1` + strings.Repeat("0", 1000) + `"}`), "no quantity of bytes"},
		"a part of an emptyDir": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Annotations[key] = `{"emptyDir":"scratch","size":"1Gi"}`
			c.Mounts = append(c.Mounts, bind(pods+"/volume-subpaths/scratch/app/0", "/data", "rw"))
		}, "sealed volumes have no subPath"},
		"a CSI volume twice": {func(_ *api.PodSandbox, c *api.Container) {
			c.Mounts = append(c.Mounts, bind(csiTarget, "/data", "rw"), bind(csiTarget, "/more", "rw"))
		}, "mounts it twice"},
		"a CSI volume of another pod": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Uid = "2"
			c.Mounts = append(c.Mounts, bind(csiTarget, "/data", "rw"))
		}, "is not this pod's"},
		"a CSI volume of a pod without an identity": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Uid = ""
			c.Mounts = append(c.Mounts, bind(csiTarget, "/data", "rw"))
		}, "is not this pod's"},
		"a CSI volume at the root": {func(_ *api.PodSandbox, c *api.Container) {
			c.Mounts = append(c.Mounts, bind(csiTarget, "/", "rw"))
		}, "is the root"},
		"a CSI volume on another mount": {func(_ *api.PodSandbox, c *api.Container) {
			c.Mounts = append(c.Mounts, bind("/srv", "/data/", "rw"), bind(csiTarget, "/data", "rw"))
		}, `another mount at "/data"`},
		"a CSI volume on another volume": {func(_ *api.PodSandbox, c *api.Container) {
			c.Mounts = append(c.Mounts, bind(csiTarget, "/mnt/encrypted/", "rw"))
		}, `another mount at "/mnt/encrypted"`},
		"a CSI volume in a runtime that cannot": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Annotations, pod.RuntimeHandler, c.Linux = nil, "runc", nil
			c.Mounts = append(c.Mounts, bind(csiTarget, "/data", "rw"))
		}, `runtime handler "runc" is not in`},
		"an annotation with a CSI volume's name": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Annotations["volume.sealvol.io/pvc-1"] = pod.Annotations[key]
			delete(pod.Annotations, key)
			c.Mounts = append(c.Mounts, bind(csiTarget, "/data", "rw"))
		}, `name "pvc-1" is also that of volume "pvc-1"`},
		"one bad volume beside a good one": {onPod("volume.sealvol.io/x", "{}"), `"volume.sealvol.io/x"`},
		"a sandbox id that is a path":      {func(pod *api.PodSandbox, _ *api.Container) { pod.Id = "../x" }, "source"},
		"no sandbox id":                    {func(pod *api.PodSandbox, _ *api.Container) { pod.Id = "" }, "source"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod, container := testPod(), testContainer()
			test.change(pod, container)
			got, err := adjust(testConfig(t), pod, container)
			if got != nil || err == nil {
				t.Fatalf("gives %v, %v", got, err)
			}
			if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q is not a line with %q", err, test.want)
			}
			if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("error %v has no class", err)
			}
		})
	}
}

func FuzzAnnotation(f *testing.F) {
	for _, seed := range []struct{ name, value string }{
		{"encrypted", value},
		{"", "{}"},
		{"a", "null"},
		{"A", value},
		{"a", `{"device":"/dev/a","device":"/dev/b","mountPath":"/","mode":""}`},
		{"a", `{"Device":"/dev/a"}`},
		{"a", `{"device":"/dev/<&>\"\\","mountPath":"/mnt/ä","mode":"ephemeral"}`},
		{"a", value + value},
		{"a", `{"mode":"ephemeral"}`},
		{"a", `{"emptyDir":"scratch","size":"1.5Gi"}`},
		{"a", `{"emptyDir":"a","size":"1e99"}`},
	} {
		f.Add(seed.name, seed.value)
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		a, err := parseAsk(name, value)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Fatalf("error %v has no class", err)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Fatalf("error %q is more than a line", err)
			}
			return
		}
		// What is accepted must come out as a request that the shim accepts.
		pod, container := testPod(), testContainer()
		pod.Annotations = map[string]string{volumePrefix + name: value}
		container.Mounts, container.Linux.Devices = nil, nil
		want := hotplug.Volume{Name: name, MountPath: a.mountPath, Source: hotplug.Source(sandboxID, name), Backing: hotplug.Device{Major: 7}}
		switch {
		case a.device != "":
			container.Linux.Devices = []*api.LinuxDevice{{Path: a.device, Type: "b", Major: 7}}
		case a.emptyDir != "":
			folder := pods + "/volumes/kubernetes.io~empty-dir/" + a.emptyDir
			container.Mounts = []*api.Mount{bind(folder, "/data/", "rw")}
			want.MountPath, want.Backing = "/data", hotplug.EmptyDir{Path: folder, Size: a.size}
		}
		c := defaultConfig()
		c.published = "/nowhere"
		got, err := adjust(c, pod, container)
		if err != nil {
			if a.device != "" && a.mountPath == a.device {
				return
			}
			t.Fatal(err)
		}
		if a.device == "" && a.emptyDir == "" {
			if got != nil {
				t.Fatalf("a claim that is not mounted gives %v", got)
			}
			return
		}
		request, err := hotplug.Parse([]byte(got.Annotations[hotplug.Annotation]))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(hotplug.Request{Volumes: []hotplug.Volume{want}}, request); diff != "" {
			t.Error(diff)
		}
	})
}

// FuzzMounts gives a container mounts of all kinds in kubelet's forms. Whatever
// becomes of them, the shim takes it, and no path is written in two ways.
func FuzzMounts(f *testing.F) {
	for _, seed := range [][2]string{
		{pods + "/volumes/kubernetes.io~empty-dir/scratch", "/data"},
		{pods + "/volumes/kubernetes.io~empty-dir/scratch", "/data//"},
		{pods + "/volumes/kubernetes.io~empty-dir/scratch/", "/data"},
		{"/pods/" + podUID + "/volumes/kubernetes.io~empty-dir/scratch", "/data"},
		{pods + "/volumes/kubernetes.io~empty-dir/../scratch", "/data"},
		{pods + "/volume-subpaths/scratch/app/0", "/data"},
		{"scratch", ""},
		{"/", "/"},
	} {
		f.Add(seed[0], seed[1])
	}
	c := defaultConfig()
	c.published = "/nowhere"
	f.Fuzz(func(t *testing.T, source, destination string) {
		pod, container := testPod(), testContainer()
		pod.Annotations = map[string]string{"volume.sealvol.io/pages": `{"emptyDir":"scratch","size":"1Gi"}`}
		container.Mounts = []*api.Mount{bind(source, destination, "rw")}
		got, err := adjust(c, pod, container)
		if err != nil || got == nil {
			return
		}
		request, err := hotplug.Parse([]byte(got.Annotations[hotplug.Annotation]))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(source, "/pods/"+podUID+"/volumes/kubernetes.io~empty-dir/scratch") || request.Volumes[0].Backing != (hotplug.EmptyDir{Path: source, Size: 1 << 30}) {
			t.Errorf("%q is taken for the emptyDir: %v", source, request)
		}
		if path := request.Volumes[0].MountPath; path != filepath.Clean(destination) {
			t.Errorf("%q becomes %q", destination, path)
		}
	})
}
