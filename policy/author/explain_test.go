package author

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/sealvol/sealvol/policy"
)

// laxPolicy leaves open all that Lint knows of.
const laxPolicy = `package agent_policy

sealed_pod := {
  "version": 1,
  "containers": {
    "open": {},
    "shell": {"args": ["run", "a b", ""], "image": "i:1", "exec": [["/bin/sh", "..."], ["..."], ["ls", "..."], ["sh", "-c", "true"]]},
    "pinned": {"args": ["run"], "image": "i@sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"},
  },
  "volumes": {
    "huge": {"mode": "ephemeral", "size": {"max": 9223372036854771712}, "mounts": [{"container": "open", "path": "/huge"}]},
    "large": {"mode": "ephemeral", "size": {"min": 4096, "max": 1099511627776}, "fs_type": "xfs", "mounts": [{"container": "open", "path": "/large", "read_only": true}]},
    "rolled": {"mode": "ephemeral", "layering": "luks2", "size": {"min": 1, "max": 5000003584}, "options": ["suid", "dev"],
      "fs_group": {"gid": 7, "change_policy": "OnRootMismatch"}, "mounts": [{"container": "shell", "path": "/rolled"}, {"container": "open", "path": "/r"}]},
    "weak": {"mode": "ephemeral", "suites": ["aes-xts-plain64+hmac-sha256"], "size": {"min": 1, "max": 4096}, "max_tag_memory": 65536, "mounts": [{"container": "open", "path": "/weak"}]},
  },
}
`

func TestExplanation(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{"lax": laxPolicy, "none": "package agent_policy\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := policy.Load(t.Context(), []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			b.WriteString(Explain(p) + "\n")
			for _, f := range Lint(p) {
				b.WriteString(f.Rule + ": " + f.Subject + ": " + f.Text + "\n")
			}
			wantGolden(t, "testdata/explain/"+name+".txt", []byte(b.String()))
		})
	}
}

func TestPoliciesAreFoundInEachForm(t *testing.T) {
	t.Parallel()
	result, err := Annotate(t.Context(), read(t, "testdata/pods/kinds.yaml"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	alone := result.Pods[:1:1]
	alone[0].Name = "policy"
	encoded := base64.StdEncoding.EncodeToString(alone[0].Policy)
	folded := encoded[:76] + "\n" + encoded[76:] + "\n"
	for name, c := range map[string]struct {
		text []byte
		want []Pod
	}{
		"Rego":                     {alone[0].Policy, alone},
		"base64":                   {[]byte(encoded), alone},
		"base64 on lines":          {[]byte(folded), alone},
		"several in one":           {result.Manifest, nil},
		"none":                     {[]byte(sealedManifest), nil},
		"none, but Rego in a text": {[]byte(sealedManifest + "---\napiVersion: v1\nkind: ConfigMap\ndata:\n  a: |\n    package agent_policy\n"), nil},
		"broken base64":            {[]byte("a==="), nil},
		"broken in a pod":          {with(t, "  annotations: {}\n", "  annotations: {"+Annotation+": '!'}\n"), nil},
		"base64 of binary":         {[]byte("gICA"), nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Policies(c.text)
			switch {
			case name == "several in one":
				if err != nil || len(got) != 7 || got[1].Name != "ReplicationController/rc" {
					t.Errorf("want the seven of the manifest, got %d, %v", len(got), err)
				}
			case c.want == nil:
				if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
					t.Errorf("want an error, got %v, %v", got, err)
				}
			default:
				if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
					t.Errorf("%v\n%s", err, diff)
				}
			}
		})
	}
}

// talksPod is the policy that the tool makes for a pod like the talk's, and the request by which Kata's runtime really makes its container.
func talksPod(t *testing.T) (*policy.Policy, json.RawMessage) {
	t.Helper()
	result, err := Annotate(t.Context(), read(t, "testdata/manifests/pod-talk.yaml"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Load(t.Context(), result.Pods[0].Policy)
	if err != nil {
		t.Fatal(err)
	}
	var record recorded
	if err := json.Unmarshal(read(t, "testdata/recorded/pod-talk.json"), &record); err != nil {
		t.Fatal(err)
	}
	for _, r := range record.Pods[0].Requests {
		if r.Container == "my-container" {
			return p, r.Request
		}
	}
	t.Fatal("the record has no container")
	return nil, nil
}

func TestARequestIsJudgedAsTheGuestWould(t *testing.T) {
	t.Parallel()
	p, request := talksPod(t)
	decision, err := Check(t.Context(), p, "CreateContainer", request, policy.State{})
	if err != nil || decision.Container != "my-container" || len(decision.Attachments) != 1 {
		t.Errorf("got %+v, %v", decision, err)
	}
	live := policy.State{Containers: map[string]string{"1": "my-container"}}
	if _, err := Check(t.Context(), p, "CreateContainer", request, live); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a second one of the same name must be denied, got %v", err)
	}
	for name, c := range map[string]struct{ rpc, request string }{
		"unknown method": {"OpenDoor", "{}"},
		"unknown field":  {"CreateContainer", `{"containers": 1}`},
		"no JSON":        {"CreateContainer", "x"},
	} {
		if _, err := Check(t.Context(), p, c.rpc, []byte(c.request), policy.State{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: want an invalid argument, got %v", name, err)
		}
	}
	for _, rpc := range []string{"CreateSandbox", "ExecProcess", "UpdateEphemeralMounts"} {
		if _, err := Check(t.Context(), p, rpc, []byte("{}"), policy.State{}); err != nil && !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: an empty request can be judged, got %v", rpc, err)
		}
	}
}
