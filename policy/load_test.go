package policy

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
)

// text is a policy with this sealed_pod, in JSON.
func text(pod string) []byte { return []byte("package agent_policy\n\nsealed_pod := " + pod + "\n") }

// volumeText is a policy with one container, c, and one volume, v.
func volumeText(volume string) []byte {
	return text(`{"version": 1, "containers": {"c": {}}, "volumes": {"v": ` + volume + `}}`)
}

func TestLoadReadsEveryKey(t *testing.T) {
	t.Parallel()
	p, err := Load(t.Context(), text(`{
		"version": 1,
		"containers": {
			"my-container": {"args": ["sleep", "infinity"], "image": "docker.io/library/busybox:latest", "exec": [["sh"], ["df", "..."]], "rootfs": "host"},
			"other": {},
		},
		"volumes": {"encrypted": {
			"mode": "ephemeral", "layering": "memory-tags", "suites": ["aes-xts-plain64+hmac-sha256", "aegis128-random"], "fs_type": "ext4",
			"options": ["dev", "noexec", "noatime"], "size": {"min": 4096, "max": 10 * 1024 * 1024 * 1024},
			"mounts": [{"container": "my-container", "path": "/mnt/encrypted", "read_only": true}, {"container": "other", "path": "/data"}],
			"fs_group": {"gid": 2000, "change_policy": "OnRootMismatch"}, "max_tag_memory": 83886080, "preallocate_tags": true,
		}},
	}`))
	if err != nil {
		t.Fatal(err)
	}
	wantContainers := map[string]Container{
		"my-container": {
			Args: []string{"sleep", "infinity"}, Image: "docker.io/library/busybox:latest",
			Exec: [][]string{{"sh"}, {"df", "..."}}, RootFS: HostRootFS,
		},
		"other": {RootFS: HostRootFS},
	}
	if diff := cmp.Diff(wantContainers, p.Containers()); diff != "" {
		t.Error(diff)
	}
	wantVolumes := map[string]Volume{"encrypted": {
		Mode: Ephemeral, Layering: MemoryTags, Suites: []Suite{AESXTSPlain64HMACSHA256, AEGIS128Random}, FSType: Ext4,
		Options: []Option{NoExec, NoATime, NoSUID}, Size: Size{Min: 4096, Max: 10 << 30},
		Mounts:  []Mount{{Container: "my-container", Path: "/mnt/encrypted", ReadOnly: true}, {Container: "other", Path: "/data"}},
		FSGroup: &FSGroup{GID: 2000, ChangePolicy: OnRootMismatch}, MaxTagMemory: 80 << 20, PreallocateTags: true,
	}}
	if diff := cmp.Diff(wantVolumes, p.Volumes()); diff != "" {
		t.Error(diff)
	}
	if !p.Sealed() {
		t.Error("the policy is not sealed")
	}
}

func TestLoadFillsIn(t *testing.T) {
	t.Parallel()
	for layering, suites := range map[string][]Suite{
		``:                           {AEGIS128Random, AESXTSRandomHMACSHA256},
		`"layering": "memory-tags",`: {AEGIS128Random, AESXTSRandomHMACSHA256},
		`"layering": "luks2",`:       {AESXTSPlain64HMACSHA256},
	} {
		p, err := Load(t.Context(), volumeText(`{`+layering+`"mode": "ephemeral", "size": {"max": 4096}, "mounts": [{"container": "c", "path": "/v"}], "fs_type": "xfs", "fs_group": {"gid": 7}}`))
		if err != nil {
			t.Fatal(err)
		}
		v := p.Volumes()["v"]
		if diff := cmp.Diff(suites, v.Suites); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]Option{NoSUID, NoDev}, v.Options); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(&FSGroup{GID: 7, ChangePolicy: Always}, v.FSGroup); diff != "" {
			t.Error(diff)
		}
		if v.FSType != XFS || v.MaxTagMemory != 0 || v.PreallocateTags || v.Size != (Size{Max: 4096}) || v.Mounts[0].ReadOnly {
			t.Errorf("unexpected %+v", v)
		}
	}
}

func TestLoadTakesMoreThanData(t *testing.T) {
	t.Parallel()
	for name, source := range map[string]string{
		"rules of Kata's own policy": "package agent_policy\nimport future.keywords.in\nimport input\ndefault ExecProcessRequest := false\n" +
			`CreateContainerRequest := {"ops": [], "allowed": true} if { print("x"); some c in input.OCI.Mounts; regex.match("^a$", c); data.pstate }`,
		"rego.v1":         "package agent_policy\nimport rego.v1\n",
		"a computed pod":  "package agent_policy\nn := \"c\"\nsealed_pod := {\"version\": 1, \"containers\": {n: {}}}",
		"a pod in pieces": "package agent_policy\nsealed_pod.version := 1\nsealed_pod.containers := {\"c\": {}}",
		"no rule at all":  "package agent_policy",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := Load(t.Context(), []byte(source))
			if err != nil {
				t.Fatal(err)
			}
			if p.Sealed() != strings.Contains(source, "sealed_pod") {
				t.Errorf("sealed: %t", p.Sealed())
			}
		})
	}
}

func TestLoadRefuses(t *testing.T) {
	t.Parallel()
	volume := func(change string) []byte { // a key said again overrides the one before
		fields := map[string]string{"mode": `"ephemeral"`, "size": `{"max": 4096}`, "mounts": `[{"container": "c", "path": "/v"}]`}
		if key, value, ok := strings.Cut(change, "="); ok {
			fields[key] = value
		} else {
			delete(fields, change)
		}
		var list []string
		for key, value := range fields {
			list = append(list, fmt.Sprintf("%q: %s", key, value))
		}
		return volumeText("{" + strings.Join(list, ", ") + "}")
	}
	container := func(c string) []byte { return text(`{"version": 1, "containers": {"c": ` + c + `}}`) }
	path := func(p string) []byte { return volume(`mounts=[{"container": "c", "path": ` + p + `}]`) }
	luks2 := func(key string) []byte {
		return volumeText(`{"mode": "ephemeral", "layering": "luks2", "size": {"max": 4096}, "mounts": [{"container": "c", "path": "/v"}], ` + key + `}`)
	}
	other := func(a, b string) []byte {
		const v = `{"mode": "ephemeral", "size": {"max": 4096}, "mounts": [{"container": "c", "path": %q}]}`
		return text(fmt.Sprintf(`{"version": 1, "containers": {"c": {}}, "volumes": {"a": `+v+`, "b": `+v+`}}`, a, b))
	}
	tests := map[string]struct {
		text  []byte
		wants string // piece of the message
	}{
		"a text that is too long":            {[]byte("package agent_policy\n" + strings.Repeat("#", MaxText)), "longer than"},
		"a text of many numbers":             {[]byte("package agent_policy\nx := [" + strings.Repeat("0,", maxWords) + "0]\n"), "more than 100000 words"},
		"a text of many empty texts":         {[]byte("package agent_policy\nx := [" + strings.Repeat(`"",`, maxWords/2) + "0]\n"), "more than 100000 words"},
		"a text of many brackets":            {[]byte("package agent_policy\nx := [" + strings.Repeat("[],", maxWords) + "0]\n"), "more than 100000 words"},
		"a text of many comments":            {[]byte("package agent_policy\n" + strings.Repeat("#\n", maxWords)), "more than 100000 words"},
		"no Rego":                            {[]byte("{}"), "policy.rego"},
		"an empty text":                      {nil, "empty"},
		"bytes that are no text":             {[]byte("package agent_policy\n\xff"), "policy.rego"},
		"a text that plays with a terminal":  {[]byte("package agent_policy\n\x1b[2J := 1\n"), "policy.rego"},
		"another package":                    {[]byte("package policy\n"), "agent_policy"},
		"a package below":                    {[]byte("package agent_policy.x\n"), "agent_policy"},
		"a name that is nowhere":             {[]byte("package agent_policy\nx := y\n"), "y is unsafe"},
		"network":                            {text(`http.send({"method": "get", "url": "http://x"})`), "http.send"},
		"a look-up":                          {text(`net.lookup_ip_addr("x")`), "net.lookup_ip_addr"},
		"the runtime":                        {text(`opa.runtime()`), "opa.runtime"},
		"the clock":                          {text(`time.now_ns()`), "time.now_ns"},
		"chance":                             {text(`rand.intn("x", 2)`), "rand.intn"},
		"network beside the pod":             {[]byte("package agent_policy\nx := http.send({})\n"), "http.send"},
		"a pod that depends on the request":  {text(`input.pod`), "must not depend"},
		"a pod under a false condition":      {[]byte("package agent_policy\nsealed_pod := {} if 1 == 2\n"), "must not depend"},
		"a pod with two values":              {[]byte("package agent_policy\nsealed_pod := {\"version\": x} if some x in [1, 2]\n"), "evaluating"},
		"a pod that is a function":           {[]byte("package agent_policy\nsealed_pod(x) := x\n"), "sealed_pod"},
		"a built-in that fails":              {text(`{"version": to_number("x")}`), "evaluating"},
		"a set":                              {text(`{"version": 1, "containers": {"c": {"args": {"a", "b"}}}}`), "write an array"},
		"no object":                          {text(`[]`), "sealed_pod: must be an object"},
		"an unknown key":                     {text(`{"version": 1, "containers": {}, "volume": {}}`), `sealed_pod: unknown key "volume"`},
		"no version":                         {text(`{"containers": {}}`), "sealed_pod.version"},
		"another version":                    {text(`{"version": 2, "containers": {}}`), "sealed_pod.version"},
		"a version in quotes":                {text(`{"version": "1", "containers": {}}`), "sealed_pod.version"},
		"no containers":                      {text(`{"version": 1}`), "sealed_pod.containers: must be an object"},
		"a container's bad name":             {text(`{"version": 1, "containers": {"C": {}}}`), `sealed_pod.containers: bad name "C"`},
		"a container that is a list":         {container(`[]`), "sealed_pod.containers.c: must be an object"},
		"a container's unknown key":          {container(`{"arg": []}`), `sealed_pod.containers.c: unknown key "arg"`},
		"args that are text":                 {container(`{"args": "sh"}`), "sealed_pod.containers.c.args: must be an array"},
		"args with a number":                 {container(`{"args": ["sleep", 1]}`), "sealed_pod.containers.c.args[1]: must be a string"},
		"empty args":                         {container(`{"args": []}`), "sealed_pod.containers.c.args: must not be empty"},
		"null args":                          {container(`{"args": null}`), "sealed_pod.containers.c.args: must be an array"},
		"an empty image":                     {container(`{"image": ""}`), "sealed_pod.containers.c.image"},
		"exec that is one command":           {container(`{"exec": ["sh"]}`), "sealed_pod.containers.c.exec[0]: must be an array"},
		"an empty command":                   {container(`{"exec": [["sh"], []]}`), "sealed_pod.containers.c.exec[1]: must not be empty"},
		"a rest that is not last":            {container(`{"exec": [["df", "...", "/"]]}`), "sealed_pod.containers.c.exec[0]"},
		"two rests":                          {container(`{"exec": [["df", "...", "..."]]}`), "sealed_pod.containers.c.exec[0]"},
		"an unknown rootfs":                  {container(`{"rootfs": "nfs"}`), "sealed_pod.containers.c.rootfs: unknown"},
		"volumes as a list":                  {text(`{"version": 1, "containers": {}, "volumes": []}`), "sealed_pod.volumes: must be an object"},
		"a volume's bad name":                {text(`{"version": 1, "containers": {}, "volumes": {"../x": {}}}`), `sealed_pod.volumes: bad name "../x"`},
		"a volume's name that is too long":   {text(`{"version": 1, "containers": {}, "volumes": {"` + strings.Repeat("a", 64) + `": {}}}`), "bad name"},
		"a volume's unknown key":             {volume(`fstype="ext4"`), `sealed_pod.volumes.v: unknown key "fstype"`},
		"no mode":                            {volume(`mode`), "sealed_pod.volumes.v.mode: must be a string"},
		"an unknown mode":                    {volume(`mode="temporary"`), "sealed_pod.volumes.v.mode: unknown"},
		"an unknown layering":                {volume(`layering="luks1"`), "sealed_pod.volumes.v.layering: unknown"},
		"an unknown suite":                   {volume(`suites=["aegis128-random", "null"]`), `sealed_pod.volumes.v.suites[1]: layering memory-tags has no suite "null"`},
		"a suite twice":                      {volume(`suites=["aegis128-random", "aegis128-random"]`), "sealed_pod.volumes.v.suites[1]"},
		"no suites":                          {volume(`suites=[]`), "sealed_pod.volumes.v.suites"},
		"an unknown file system":             {volume(`fs_type="btrfs"`), "sealed_pod.volumes.v.fs_type: unknown"},
		"an unknown option":                  {volume(`options=["nosuid", "data=journal"]`), "sealed_pod.volumes.v.options[1]: unknown"},
		"an option that read_only says":      {volume(`options=["ro"]`), "sealed_pod.volumes.v.options[0]: unknown"},
		"an option twice":                    {volume(`options=["nodev", "nodev"]`), "sealed_pod.volumes.v.options[1]"},
		"options that disagree":              {volume(`options=["nosuid", "suid"]`), "sealed_pod.volumes.v.options[1]: suid after nosuid"},
		"times that disagree":                {volume(`options=["noatime", "relatime"]`), "sealed_pod.volumes.v.options[1]"},
		"no size":                            {volume(`size`), "sealed_pod.volumes.v.size: must be an object"},
		"no max":                             {volume(`size={"min": 1}`), "sealed_pod.volumes.v.size.max"},
		"max 0":                              {volume(`size={"max": 0}`), "sealed_pod.volumes.v.size.max"},
		"max that is no multiple":            {volume(`size={"max": 4097}`), "sealed_pod.volumes.v.size.max"},
		"max that is negative":               {volume(`size={"max": -4096}`), "sealed_pod.volumes.v.size.max"},
		"max that is broken":                 {volume(`size={"max": 4096.5}`), "sealed_pod.volumes.v.size.max"},
		"max of 2^63":                        {volume(`size={"max": 9223372036854775808}`), "sealed_pod.volumes.v.size.max"},
		"max of 2^64":                        {volume(`size={"max": 18446744073709551616}`), "sealed_pod.volumes.v.size.max"},
		"max in quotes":                      {volume(`size={"max": "4096"}`), "sealed_pod.volumes.v.size.max"},
		"min above max":                      {volume(`size={"min": 8192, "max": 4096}`), "sealed_pod.volumes.v.size.min"},
		"a size's unknown key":               {volume(`size={"max": 4096, "unit": "MiB"}`), "sealed_pod.volumes.v.size: unknown key"},
		"a group that is a number":           {volume(`fs_group=2000`), "sealed_pod.volumes.v.fs_group: must be an object"},
		"a group without a number":           {volume(`fs_group={}`), "sealed_pod.volumes.v.fs_group.gid"},
		"root's group":                       {volume(`fs_group={"gid": 0}`), "sealed_pod.volumes.v.fs_group.gid"},
		"the group that chown leaves":        {volume(`fs_group={"gid": 4294967295}`), "sealed_pod.volumes.v.fs_group.gid"},
		"a negative group":                   {volume(`fs_group={"gid": -1}`), "sealed_pod.volumes.v.fs_group.gid"},
		"a group in quotes":                  {volume(`fs_group={"gid": "7"}`), "sealed_pod.volumes.v.fs_group.gid"},
		"a group's unknown key":              {volume(`fs_group={"gid": 7, "uid": 7}`), "sealed_pod.volumes.v.fs_group: unknown key"},
		"an unknown change policy":           {volume(`fs_group={"gid": 7, "change_policy": "Never"}`), "sealed_pod.volumes.v.fs_group.change_policy"},
		"no memory for tags":                 {volume(`max_tag_memory=0`), "sealed_pod.volumes.v.max_tag_memory"},
		"memory for tags in quotes":          {volume(`max_tag_memory="1Gi"`), "sealed_pod.volumes.v.max_tag_memory"},
		"preallocation as text":              {volume(`preallocate_tags="true"`), "sealed_pod.volumes.v.preallocate_tags"},
		"discard":                            {volume(`discard=true`), `sealed_pod.volumes.v: unknown key "discard"`},
		"tags in memory with LUKS2":          {luks2(`"max_tag_memory": 4096`), "sealed_pod.volumes.v.max_tag_memory: layering luks2"},
		"preallocation with LUKS2":           {luks2(`"preallocate_tags": true`), "sealed_pod.volumes.v.preallocate_tags: layering luks2"},
		"no mounts":                          {volume(`mounts`), "sealed_pod.volumes.v.mounts: must be an array"},
		"an empty list of mounts":            {volume(`mounts=[]`), "sealed_pod.volumes.v.mounts"},
		"a mount's unknown key":              {volume(`mounts=[{"container": "c", "path": "/v", "readOnly": true}]`), "sealed_pod.volumes.v.mounts[0]: unknown key"},
		"a mount without a container":        {volume(`mounts=[{"path": "/v"}]`), "sealed_pod.volumes.v.mounts[0].container"},
		"a mount of an undeclared container": {volume(`mounts=[{"container": "d", "path": "/v"}]`), "sealed_pod.volumes.v.mounts[0].container"},
		"read_only as text":                  {volume(`mounts=[{"container": "c", "path": "/v", "read_only": "true"}]`), "sealed_pod.volumes.v.mounts[0].read_only"},
		"a mount twice":                      {volume(`mounts=[{"container": "c", "path": "/v"}, {"container": "c", "path": "/v"}]`), "sealed_pod.volumes.v.mounts[1].container"},
		"a volume twice in one container":    {volume(`mounts=[{"container": "c", "path": "/v"}, {"container": "c", "path": "/w"}]`), "sealed_pod.volumes.v.mounts[1].container"},
		"no path":                            {volume(`mounts=[{"container": "c"}]`), "sealed_pod.volumes.v.mounts[0].path"},
		"a relative path":                    {path(`"v"`), "is not absolute"},
		"the root":                           {path(`"/"`), "not a clean path"},
		"a path with dots":                   {path(`"/v/../w"`), "not a clean path"},
		"a path with two slashes":            {path(`"/v//w"`), "not a clean path"},
		"a path with a slash at its end":     {path(`"/v/"`), "not a clean path"},
		"a path with a newline":              {path(`"/v\nw"`), "do not print"},
		"a path with NUL":                    {path(`"/v\u0000w"`), "do not print"},
		"a path that is too long":            {path(`"/` + strings.Repeat("v", 1024) + `"`), "longer than"},
		"a path in /dev":                     {path(`"/dev/shm/v"`), "every container has"},
		"a path in /proc":                    {path(`"/proc/self"`), "every container has"},
		"a path above /etc/hosts":            {path(`"/etc"`), "every container has"},
		"two volumes on one path":            {other("/v", "/v"), "sealed_pod.volumes.b.mounts[0].path: lies on, above or below sealed_pod.volumes.a.mounts[0]"},
		"a volume in a volume":               {other("/v", "/v/w"), "sealed_pod.volumes.b.mounts[0].path"},
		"a volume around a volume":           {other("/v/w", "/v"), "sealed_pod.volumes.b.mounts[0].path"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Load(t.Context(), test.text)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), test.wants) {
				t.Errorf("want an invalid argument about %q, got %v", test.wants, err)
			}
			if err != nil && (strings.ContainsFunc(err.Error(), func(r rune) bool { return !unicode.IsPrint(r) }) || len(err.Error()) > 500) {
				t.Errorf("must be a short printable line: %q", err)
			}
		})
	}
	for name, test := range map[string]struct {
		text  []byte
		wants string
	}{
		"persistent volumes":            {volume(`mode="persistent"`), "sealed_pod.volumes.v.mode"},
		"root file systems by verity":   {container(`{"rootfs": "verity"}`), "sealed_pod.containers.c.rootfs"},
		"root file systems from guests": {container(`{"rootfs": "guest-pull"}`), "sealed_pod.containers.c.rootfs"},
	} {
		t.Run(name+" are not supported yet", func(t *testing.T) {
			t.Parallel()
			_, err := Load(t.Context(), test.text)
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), test.wants) {
				t.Errorf("want a failed precondition about %q, got %v", test.wants, err)
			}
		})
	}
}

func TestVolumesThatOnlyLookNested(t *testing.T) {
	t.Parallel()
	const v = `{"mode": "ephemeral", "size": {"max": 4096}, "mounts": [{"container": %q, "path": %q}]}`
	for name, paths := range map[string][4]string{
		"names that begin alike": {"c", "/v", "c", "/v2"},
		"other containers":       {"c", "/v", "d", "/v/w"},
	} {
		pod := fmt.Sprintf(`{"version": 1, "containers": {"c": {}, "d": {}}, "volumes": {"a": `+v+`, "b": `+v+`}}`, paths[0], paths[1], paths[2], paths[3])
		if _, err := Load(t.Context(), text(pod)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A text may be written to never end; the guest's patience is the caller's, and its own.
func TestLoadEndsWithItsContext(t *testing.T) {
	t.Parallel()
	endless := []byte("package agent_policy\nl := [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]\n" +
		"sealed_pod := count([1 | some a in l; some b in l; some c in l; some d in l; some e in l; some f in l; some g in l; some h in l; a + b + c + d + e + f + g + h < 0])\n")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := Load(ctx, endless); err == nil {
		t.Error("an endless policy was loaded")
	}
	if took := time.Since(start); took > evalLimit {
		t.Errorf("took %v", took)
	}
}

func TestDigestIsOfTheTextAsItArrived(t *testing.T) {
	t.Parallel()
	p, err := Load(t.Context(), []byte("package agent_policy"))
	if err != nil {
		t.Fatal(err)
	}
	const want = "c7abff30657b53751ea87469bb773efe7e0d7eba70b9eb6b0849f13c7353f289"
	if p.Digest() != want {
		t.Errorf("got %s", p.Digest())
	}
}

// agentAllows evaluates a rule the way that the agent does.
func agentAllows(t *testing.T, policy []byte, rule string) bool {
	t.Helper()
	results, err := rego.New(
		rego.SetRegoVersion(ast.RegoV1),
		rego.Module("agent_policy", string(policy)),
		rego.Input(map[string]any{}),
		rego.Query("data.agent_policy."+rule),
	).Eval(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return len(results) == 1 && results[0].Expressions[0].Value == true
}

func TestAgentTextLetsThroughWhatTheGatePasses(t *testing.T) {
	t.Parallel()
	const own = "package agent_policy\nimport rego.v1\nCreateContainerRequest if { input.OCI == 1 }\ndefault ExecProcessRequest := false\n" +
		"sealed_pod := {\"version\": 1, \"containers\": {}} # without a newline"
	p, err := Load(t.Context(), []byte(own))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(p.AgentText()), own) {
		t.Error("the author's text must stay as it is")
	}
	if _, err := Load(t.Context(), p.AgentText()); err != nil {
		t.Error(err)
	}
	for rule, want := range map[string]bool{
		"CreateSandboxRequest": true, "StartContainerRequest": true, "WaitProcessRequest": true, "ReadStreamRequest": true,
		"CreateContainerRequest": false, "ExecProcessRequest": false, // the author's own
		"AddSwapRequest": false, "SetPolicyRequest": false, "GetDiagnosticDataRequest": false, "SetIPTablesRequest": false,
	} {
		if got := agentAllows(t, p.AgentText(), rule); got != want {
			t.Errorf("%s: allowed %t, want %t", rule, got, want)
		}
	}
	if !agentAllows(t, Default().AgentText(), "CreateContainerRequest") {
		t.Error("the default policy must let the agent create containers")
	}
}

// FuzzLoad: whatever the host sends as a policy, it is refused with a class or loaded into values that keep their bounds.
func FuzzLoad(f *testing.F) {
	for _, dir := range []string{"volumes/one-volume", "volumes/two-volumes", "open/open"} {
		f.Add(read(f, "testdata/"+dir+"/policy.rego"))
	}
	f.Add(text(`{"version": 1, "containers": {"c": {"exec": [["..."]]}}}`))
	f.Add(text(`{"version": 1, "containers": {"c": {"args": {"a"}}}}`))
	f.Add(text(`input.x`))
	f.Fuzz(func(t *testing.T, text []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		p, err := Load(ctx, text)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) && ctx.Err() == nil {
				t.Fatalf("an error without a class: %v", err)
			}
			return
		}
		for name, v := range p.Volumes() {
			if len(v.Suites) == 0 || len(v.Mounts) == 0 || v.Size.Max == 0 || v.Size.Max%BlockSize != 0 || v.Size.Min > v.Size.Max {
				t.Errorf("volume %s is out of bounds: %+v", name, v)
			}
			for _, m := range v.Mounts {
				if _, ok := p.Containers()[m.Container]; !ok {
					t.Errorf("volume %s is mounted in no container: %+v", name, m)
				}
			}
		}
		if _, err := Load(context.Background(), p.AgentText()); err != nil && len(p.AgentText()) <= MaxText {
			t.Errorf("the agent would refuse what the guest took: %v", err)
		}
	})
}

// The values of sealed_pod are shown as JSON by the control service and read by the framework.
func TestPodIsJSON(t *testing.T) {
	t.Parallel()
	p, err := Load(t.Context(), read(t, "testdata/volumes/one-volume/policy.rego"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(p.Volumes()["encrypted"])
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"mode":"ephemeral","layering":"memory-tags","suites":["aegis128-random","aes-xts-random+hmac-sha256"],"fs_type":"ext4",` +
		`"options":["nosuid","nodev"],"size":{"min":0,"max":10737418240},"mounts":[{"container":"my-container","path":"/mnt/encrypted","read_only":false}]}`
	if string(b) != want {
		t.Errorf("got %s", b)
	}
}
