package hotplug

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

const (
	emptyDir = `/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/scratch`

	source  = `/run/sealvol/direct/0123abc/a`
	volumeA = `{"name":"a","mountPath":"/mnt/a","source":"/run/sealvol/direct/0123abc/a","device":{"major":7,"minor":0}}`
	volumeC = `{"name":"c","mountPath":"/mnt/c","source":"/run/sealvol/direct/0123abc/c","emptyDir":{"path":"` + emptyDir + `","size":1048576}}`
	volumeB = `{"name":"b","mountPath":"/mnt/b","source":"/run/sealvol/direct/0123abc/b","file":"/var/lib/b.img"}`
)

func request(volumes ...string) string {
	return `{"version":1,"volumes":[` + strings.Join(volumes, ",") + `]}`
}

func TestParseGivesTheRequest(t *testing.T) {
	t.Parallel()
	got, err := Parse([]byte(request(volumeA, volumeB, volumeC)))
	if err != nil {
		t.Fatal(err)
	}
	want := Request{Volumes: []Volume{
		{Name: "a", MountPath: "/mnt/a", Source: Source("0123abc", "a"), Backing: Device{7, 0}},
		{Name: "b", MountPath: "/mnt/b", Source: Source("0123abc", "b"), Backing: File("/var/lib/b.img")},
		{Name: "c", MountPath: "/mnt/c", Source: Source("0123abc", "c"), Backing: EmptyDir{Path: emptyDir, Size: 1 << 20}},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	data, err := got.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if string(data) != request(volumeA, volumeB, volumeC) {
		t.Errorf("Encode gives\n%s, not\n%s", data, request(volumeA, volumeB, volumeC))
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	// edit is volumeA with one thing changed.
	edit := func(old, new string) string {
		if !strings.Contains(volumeA, old) {
			t.Fatalf("%s is not in the volume", old)
		}
		return request(strings.Replace(volumeA, old, new, 1))
	}
	editC := func(old, new string) string {
		if !strings.Contains(volumeC, old) {
			t.Fatalf("%s is not in the volume", old)
		}
		return request(strings.Replace(volumeC, old, new, 1))
	}
	for name, test := range map[string]struct{ data, want string }{
		"nothing":                           {"", "unexpected end"},
		"null":                              {"null", "version 0"},
		"another type":                      {"[]", "cannot unmarshal"},
		"no version":                        {`{"volumes":[` + volumeA + `]}`, "version 0"},
		"a version to come":                 {`{"version":2,"volumes":[` + volumeA + `]}`, "version 2, not 1"},
		"no volumes":                        {request(), "no volumes"},
		"a null volume":                     {request("null"), "0 of device, file and emptyDir are there"},
		"trailing data":                     {request(volumeA) + "{}", "after top-level value"},
		"bytes that are not UTF-8":          {edit("/mnt/a", "/mnt/\xff"), "not UTF-8"},
		"more than fits":                    {request(volumeA) + strings.Repeat(" ", MaxSize), "more than 65536"},
		"an unknown key":                    {`{"version":1,"volumes":[` + volumeA + `],"x":1}`, `unknown field "x"`},
		"an unknown key in a volume":        {edit(`"name"`, `"fsType":"xfs","name"`), `unknown field "volumes[0].fsType"`},
		"an unknown key in a device":        {edit(`"minor"`, `"path":"/dev/sda","minor"`), `unknown field "volumes[0].device.path"`},
		"a key in another case":             {edit(`"mountPath"`, `"mountpath"`), `unknown field "volumes[0].mountpath"`},
		"a repeated key":                    {edit(`"name":"a"`, `"name":"b","name":"a"`), `duplicate field "volumes[0].name"`},
		"a repeated version":                {`{"version":1,"version":1,"volumes":[` + volumeA + `]}`, `duplicate field "version"`},
		"an empty name":                     {edit(`"name":"a"`, `"name":""`), "volume name"},
		"a name in capitals":                {edit(`"name":"a"`, `"name":"A"`), "volume name"},
		"a name that is a path":             {edit(`"name":"a"`, `"name":".."`), "volume name"},
		"a name with a newline":             {edit(`"name":"a"`, `"name":"a\n"`), "volume name"},
		"a name that ends in a hyphen":      {edit(`"name":"a"`, `"name":"a-"`), "volume name"},
		"a name that is too long":           {edit(`"name":"a"`, `"name":"`+strings.Repeat("a", 64)+`"`), "volume name"},
		"no mount path":                     {edit(`"mountPath":"/mnt/a",`, ``), `mountPath "" is not an absolute path`},
		"a relative mount path":             {edit("/mnt/a", "mnt/a"), "not an absolute path"},
		"a mount path that climbs":          {edit("/mnt/a", "/mnt/../etc"), `not a clean path, write "/etc"`},
		"a mount path with a slash":         {edit("/mnt/a", "/mnt/a/"), "not a clean path"},
		"the root as mount path":            {edit("/mnt/a", "/"), "is the root"},
		"a NUL in the mount path":           {edit("/mnt/a", `/mnt/\u0000`), "unprintable characters"},
		"a newline in the mount path":       {edit("/mnt/a", `/mnt/a\nb`), "unprintable characters"},
		"a mount path that reads backwards": {edit("/mnt/a", "/mnt/\u202ea"), "unprintable characters"},
		"a mount path beyond PATH_MAX":      {edit("/mnt/a", "/"+strings.Repeat("a", 4095)), "longer than 4095"},
		"no source":                         {edit(source, ""), "source"},
		"a source elsewhere":                {edit(source, "/etc/shadow"), "source"},
		"a source of another volume":        {edit(source, "/run/sealvol/direct/0123abc/b"), "source"},
		"a source without sandbox":          {edit(source, "/run/sealvol/direct/a"), "source"},
		"a source that climbs":              {edit(source, "/run/sealvol/direct/../a"), "source"},
		"a source one level too deep":       {edit(source, "/run/sealvol/direct/x/0123abc/a"), "source"},
		"a source that is not clean":        {edit(source, "/run/sealvol/direct/0123abc//a"), "source"},
		"a sandbox that is too long":        {edit("0123abc", strings.Repeat("a", 77)), "source"},
		"no backing":                        {edit(`,"device":{"major":7,"minor":0}`, ``), "0 of device, file and emptyDir are there"},
		"two backings":                      {edit(`"device"`, `"file":"/a","device"`), "2 of device, file and emptyDir are there"},
		"a null device":                     {edit(`{"major":7,"minor":0}`, `null`), "0 of device, file and emptyDir are there"},
		"a device without minor":            {edit(`,"minor":0`, ``), "major and minor are both needed"},
		"a device without major":            {edit(`"major":7,`, ``), "major and minor are both needed"},
		"a negative minor":                  {edit(`"minor":0`, `"minor":-1`), "cannot unmarshal"},
		"a fractional minor":                {edit(`"minor":0`, `"minor":0.5`), "cannot unmarshal"},
		"the major of no device":            {edit(`"major":7`, `"major":0`), "no number of a block device"},
		"a major that overflows":            {edit(`"major":7`, `"major":4096`), "no number of a block device"},
		"a minor that overflows":            {edit(`"minor":0`, `"minor":1048576`), "no number of a block device"},
		"a relative file":                   {edit(`"device":{"major":7,"minor":0}`, `"file":"a.img"`), "file \"a.img\" is not an absolute path"},
		"a file that climbs":                {edit(`"device":{"major":7,"minor":0}`, `"file":"/a/../b"`), "not a clean path"},
		"an empty file":                     {edit(`"device":{"major":7,"minor":0}`, `"file":""`), "not an absolute path"},
		"a file and an emptyDir":            {editC(`"emptyDir"`, `"file":"/a","emptyDir"`), "2 of device, file and emptyDir are there"},
		"an unknown key in an emptyDir":     {editC(`"size"`, `"mode":"0777","size"`), `unknown field "volumes[0].emptyDir.mode"`},
		"an emptyDir that is no object":     {editC(`{"path":"`+emptyDir+`","size":1048576}`, `"`+emptyDir+`"`), "cannot unmarshal"},
		"an emptyDir without a path":        {editC(emptyDir, ""), "emptyDir \"\" is not an absolute path"},
		"an emptyDir that climbs":           {editC("/scratch", "/../kubernetes.io~empty-dir/scratch"), "not a clean path"},
		"an emptyDir that is not kubelet's": {editC(emptyDir, "/etc/cron.d"), "is not kubelet's"},
		"a folder in an emptyDir":           {editC("/scratch", "/scratch/sub"), "is not kubelet's"},
		"an emptyDir of no pod":             {editC("/var/lib/kubelet/pods/1", ""), "is not kubelet's"},
		"an emptyDir without a size":        {editC(`,"size":1048576`, ``), "emptyDir of 0 bytes"},
		"an emptyDir of negative size":      {editC("1048576", "-1"), "cannot unmarshal"},
		"an emptyDir of half a sector":      {editC("1048576", "1048832"), "not a multiple of 512"},
		"an emptyDir that no disk has":      {editC("1048576", "1152921504606847488"), "between 512 and"},
		"an emptyDir twice": {request(volumeC, strings.NewReplacer(`"c"`, `"d"`, "/mnt/c", "/mnt/d", "abc/c", "abc/d", "1048576", "2097152").Replace(volumeC)),
			`emptyDir "` + emptyDir + `" is also that of volume "c"`},
		"a name twice": {request(volumeA, volumeA),
			`volumes[1] "a": name "a" is also that of volume "a"`},
		"a mount path twice": {request(volumeA, strings.Replace(volumeB, "/mnt/b", "/mnt/a", 1)),
			`mountPath "/mnt/a" is also that of volume "a"`},
		"a device twice": {request(volumeA, strings.Replace(volumeB, `"file":"/var/lib/b.img"`, `"device":{"major":7,"minor":0}`, 1)),
			`device "7:0" is also that of volume "a"`},
		"a file twice": {request(volumeB, strings.NewReplacer(`"b"`, `"c"`, "/mnt/b", "/mnt/c", "abc/b", "abc/c").Replace(volumeB)),
			`file "/var/lib/b.img" is also that of volume "b"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Parse([]byte(test.data))
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, not an invalid argument with %q", err, test.want)
			}
			if got.Volumes != nil {
				t.Errorf("a refused request gave %v", got)
			}
		})
	}
}

func TestEncodeRefusesWhatParseWould(t *testing.T) {
	t.Parallel()
	good := Volume{Name: "a", MountPath: "/mnt/a", Source: source, Backing: Device{7, 0}}
	for name, volumes := range map[string][]Volume{
		"no volumes":      nil,
		"no backing":      {{Name: "a", MountPath: "/mnt/a", Source: source}},
		"a relative file": {{Name: "a", MountPath: "/mnt/a", Source: source, Backing: File("a")}},
		"a bad name":      {{Name: "A", MountPath: "/mnt/a", Source: source, Backing: Device{7, 0}}},
		"a volume twice":  {good, good},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if data, err := (Request{volumes}).Encode(); !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("gives %s, %v", data, err)
			}
		})
	}
}

func TestEncodeRefusesMoreThanParseReads(t *testing.T) {
	t.Parallel()
	var volumes []Volume
	for i := range 20 {
		name := strings.Repeat("a", i+1)
		volumes = append(volumes, Volume{
			Name: name, MountPath: "/" + strings.Repeat("b", 4000) + name,
			Source: Source("s", name), Backing: Device{7, uint32(i)},
		})
	}
	if _, err := (Request{volumes}).Encode(); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("error %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		request(volumeA), request(volumeA, volumeB, volumeC), request(strings.Replace(volumeA, "/mnt/a", "/<&>\u2028", 1)), request(volumeA, volumeA), request(), "", "null",
		`{"version":1,"volumes":[{"name":"a","name":"a"}]}`,
		`{"Version":1}`,
		`{"version":1,"volumes":[{"device":{"major":0,"minor":-1}}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		first, err := Parse(data)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatalf("error %v is no invalid argument", err)
			}
			return
		}
		encoded, err := first.Encode()
		if err != nil {
			t.Fatalf("a parsed request does not encode: %v", err)
		}
		second, err := Parse(encoded)
		if err != nil {
			t.Fatalf("an encoded request does not parse: %v", err)
		}
		if diff := cmp.Diff(first, second); diff != "" {
			t.Error(diff)
		}
	})
}
