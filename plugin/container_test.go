package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	key       = "volume.sealvol.io/encrypted"
	value     = `{"device": "/dev/encrypted", "mountPath": "/mnt/encrypted", "mode": "ephemeral"}`
	sandboxID = "c0ffee"
)

func testPod() *api.PodSandbox {
	return &api.PodSandbox{
		Id: sandboxID, Namespace: "default", Name: "web", RuntimeHandler: "kata",
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
	got, err := adjust(defaultConfig().handlers, testPod(), testContainer())
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
	pod.Annotations = map[string]string{}
	for minor, name := range []string{"c", "a", "b"} {
		pod.Annotations["volume.sealvol.io/"+name] = `{"device":"/dev/` + name + `","mountPath":"/` + name + `","mode":"ephemeral"}`
		container.Linux.Devices = append(container.Linux.Devices, &api.LinuxDevice{Path: "/dev/" + name, Type: "b", Major: 8, Minor: int64(minor)})
	}
	got, err := adjust(defaultConfig().handlers, pod, container)
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
			if got, err := adjust(defaultConfig().handlers, pod, container); err != nil || got != nil {
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
	if got, err := adjust(defaultConfig().handlers, testPod(), container); err != nil || got == nil {
		t.Errorf("gives %v, %v", got, err)
	}
}

func TestAdjustNestsMounts(t *testing.T) {
	t.Parallel()
	for _, destination := range []string{"/mnt", "/mnt/encrypted/cache", "/mnt/encrypted2"} {
		container := testContainer()
		container.Mounts = append(container.Mounts, &api.Mount{Destination: destination})
		if got, err := adjust(defaultConfig().handlers, testPod(), container); err != nil || got == nil {
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
		"null":                        {set("null"), `device "" is not an absolute path`},
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
		"no mode":                     {annotate(`, "mode": "ephemeral"`, ``), `mode "" is not supported, write "ephemeral"`},
		"a mode to come":              {annotate("ephemeral", "persistent"), `mode "persistent" is not supported`},
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

		"a runtime that cannot":         {handler("runc"), `runtime handler "runc" is not in`},
		"the default runtime":           {handler(""), `runtime handler "" is not in`},
		"a device that is not there":    {annotate("/dev/encrypted", "/dev/other"), `the container has no device "/dev/other"`},
		"a device of the host":          {annotate("/dev/encrypted", "/dev/sda"), `the container has no device "/dev/sda"`},
		"a container without devices":   {func(_ *api.PodSandbox, c *api.Container) { c.Linux.Devices = nil }, "the container has no device"},
		"a container that is not Linux": {func(_ *api.PodSandbox, c *api.Container) { c.Linux = nil }, "the container has no device"},
		"a character device":            {annotate("/dev/encrypted", "/dev/fuse"), `device "/dev/fuse" is not a block device`},
		"a device of no type":           {device(func(d *api.LinuxDevice) { d.Type = "" }), "is not a block device"},
		"a negative number":             {device(func(d *api.LinuxDevice) { d.Minor = -1 }), "impossible number 7:-1"},
		"a number that overflows":       {device(func(d *api.LinuxDevice) { d.Major = 1<<32 + 7 }), "impossible number 4294967303:1"},
		"a number of no block device":   {device(func(d *api.LinuxDevice) { d.Major = 0 }), "no number of a block device"},
		"a device twice at its path":    {addDevice(&api.LinuxDevice{Path: "/dev/encrypted", Type: "b", Major: 9}), "two devices at"},
		"a device under another name":   {addDevice(&api.LinuxDevice{Path: "/dev/loop1", Type: "b", Major: 7, Minor: 1}), `as "/dev/loop1"`},
		"a mount at the path": {func(_ *api.PodSandbox, c *api.Container) {
			c.Mounts = append(c.Mounts, &api.Mount{Destination: "/mnt/./encrypted/"})
		}, `another mount at "/mnt/encrypted"`},
		"a device at the path": {annotate("/mnt/encrypted", "/dev/fuse"), `has a device at the volume's mountPath`},
		"two volumes on a path": {func(pod *api.PodSandbox, c *api.Container) {
			pod.Annotations["volume.sealvol.io/x"] = strings.Replace(value, "/dev/encrypted", "/dev/x", 1)
			c.Linux.Devices = append(c.Linux.Devices, &api.LinuxDevice{Path: "/dev/x", Type: "b", Major: 9})
		}, `mountPath "/mnt/encrypted" is also that of volume "encrypted"`},
		"two volumes on a device": {onPod("volume.sealvol.io/x", strings.Replace(value, "/mnt/encrypted", "/mnt/x", 1)),
			`device "7:1" is also that of volume "encrypted"`},
		"one bad volume beside a good one": {onPod("volume.sealvol.io/x", "{}"), `"volume.sealvol.io/x"`},
		"a sandbox id that is a path":      {func(pod *api.PodSandbox, _ *api.Container) { pod.Id = "../x" }, "source"},
		"no sandbox id":                    {func(pod *api.PodSandbox, _ *api.Container) { pod.Id = "" }, "source"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod, container := testPod(), testContainer()
			test.change(pod, container)
			got, err := adjust(defaultConfig().handlers, pod, container)
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
	} {
		f.Add(seed.name, seed.value)
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		v, err := parseVolume(name, value)
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
		container.Mounts = nil
		container.Linux.Devices = []*api.LinuxDevice{{Path: v.device, Type: "b", Major: 7}}
		got, err := adjust(defaultConfig().handlers, pod, container)
		if err != nil {
			if v.mountPath == v.device {
				return
			}
			t.Fatal(err)
		}
		request, err := hotplug.Parse([]byte(got.Annotations[hotplug.Annotation]))
		if err != nil {
			t.Fatal(err)
		}
		want := hotplug.Request{Volumes: []hotplug.Volume{{
			Name: name, MountPath: v.mountPath, Source: hotplug.Source(sandboxID, name), Backing: hotplug.Device{Major: 7},
		}}}
		if diff := cmp.Diff(want, request); diff != "" {
			t.Error(diff)
		}
	})
}
