package author

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"

	"github.com/sealvol/sealvol/policy"
)

// likeGenpolicy decides as genpolicy's rules do, in the two points that sealed volumes touch: each mount of a request needs an entry of its
// own in policy_data, whose source is a regular expression, and there are as many storages as policy_data has.
const likeGenpolicy = `package agent_policy

import rego.v1

default CreateContainerRequest := false

CreateContainerRequest if {
	some container in policy_data.containers
	container.OCI.Annotations["io.kubernetes.cri.container-name"] == input.OCI.Annotations["io.kubernetes.cri.container-name"]
	count(container.storages) == count(input.storages)
	matched := {i | some mount in input.OCI.Mounts; some i, entry in container.OCI.Mounts; allowed(entry, mount)}
	count(matched) == count(input.OCI.Mounts)
}

allowed(entry, mount) if {
	entry.source != ""
	entry.destination == mount.destination
	entry.type_ == mount.type_
	entry.options == mount.options
	regex.match(entry.source, mount.source)
}

policy_data := `

// c of sealedManifest and another container, as genpolicy writes them: MOUNTS and STORAGES are c's.
const data = `{
  "containers": [
    {
      "OCI": {
        "Annotations": {"io.kubernetes.cri.container-name": "other", "io.kubernetes.cri.sandbox-id": "^[a-z0-9]{64}$"},
        "Mounts": [{"destination": "/proc", "source": "proc", "type_": "proc", "options": []}]
      },
      "storages": []
    },
    {
      "OCI": {
        "Version": "1.1.0",
        "Mounts": MOUNTS,
        "Annotations": {
          "io.kubernetes.cri.container-name": "c"
        }
      },
      "storages": STORAGES,
      "é\"}]": 1.50
    }
  ],
  "common": {}
}`

func filled(mounts, storages string) string {
	return likeGenpolicy + strings.NewReplacer("MOUNTS", mounts, "STORAGES", storages).Replace(data)
}

func TestGenpolicyLetsSealedVolumesPass(t *testing.T) {
	t.Parallel()
	const (
		sealed  = `{"destination": "/v", "source": "^/run/sealvol/volumes/v$", "type_": "bind", "options": ["rbind", "nosuid", "nodev", "rw"]}`
		claim   = `{"destination": "/v", "source": "$(sfprefix)v$", "type_": "bind", "options": ["rbind", "rprivate", "rw"]}`
		block   = `{"driver": "", "driver_options": ["encryption_key=ephemeral", "create_filesystem"], "mount_point": "$(spath)/$(b64_device_id)"}`
		memory  = `{"driver": "ephemeral", "driver_options": [], "fstype": "tmpfs"}`
		request = `{"OCI": {"Annotations": {"io.kubernetes.cri.container-name": "c"}, "Mounts": [{"destination": "/v", "source": "/run/sealvol/volumes/v", "type_": "bind", "options": ["rbind", "nosuid", "nodev", "rw"]}]}, "storages": STORAGES}`
	)
	emptyDir := strings.Replace(sealedManifest, "ephemeral: {volumeClaimTemplate: {spec: {storageClassName: coco-local-csi, resources: {requests: {storage: 1Mi}}}}}",
		"emptyDir: {}", 1)
	notes := `volume.sealvol.io/v: '{"emptyDir": "v", "size": "1Mi"}', `
	for name, c := range map[string]struct {
		manifest, notes  string
		mounts, storages string // before
		after            [2]string
		sent             string // storages of the gated request
	}{
		"a claim": {
			sealedManifest, "", "[\n          " + claim + "\n        ]", "[]",
			[2]string{"[\n          " + sealed + ",\n          " + claim + "\n        ]", "[]"}, "[]",
		},
		"no mounts": {
			sealedManifest, "", "[]", "[]", [2]string{"[" + sealed + "]", "[]"}, "[]",
		},
		"an emptyDir that genpolicy took for a block device": {
			emptyDir, notes, "[" + claim + "]", "[\n        " + block + "\n      ]",
			[2]string{"[" + sealed + "," + claim + "]", "[]"}, "[]",
		},
		"that and one in memory": {
			emptyDir, notes, "[" + claim + "]", "[\n        " + memory + ",\n        " + block + "\n      ]",
			[2]string{"[" + sealed + "," + claim + "]", "[\n        " + memory + "\n      ]"}, "[{}]",
		},
		"that and one that is not sealed": {
			emptyDir, notes, "[" + claim + "]", "[ " + block + " , " + block + " ]",
			[2]string{"[" + sealed + "," + claim + "]", "[ " + block + " ]"}, "[{}]",
		},
		"an emptyDir of the shared file system": {
			emptyDir, notes, "[" + claim + "]", "[]", [2]string{"[" + sealed + "," + claim + "]", "[]"}, "[]",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			there := filled(c.mounts, c.storages)
			manifest := []byte(strings.Replace(c.manifest, "annotations: {}", "annotations: {"+c.notes+Annotation+": "+encode(there)+"}", 1))
			result, err := Annotate(t.Context(), manifest, Options{})
			if err != nil {
				t.Fatal(err)
			}
			got := string(result.Pods[0].Policy)
			rest, _, _ := strings.Cut(got, "\n\n"+blockBegin)
			if diff := cmp.Diff(filled(c.after[0], c.after[1]), rest); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			input := strings.Replace(request, "STORAGES", c.sent, 1)
			if allowed(t, there, input) || !allowed(t, got, input) {
				t.Errorf("genpolicy's rules must deny what the gate sends before and allow it after: %t, %t", allowed(t, there, input), allowed(t, got, input))
			}
			if p, err := policy.Load(t.Context(), []byte(got)); err != nil || !p.Sealed() {
				t.Errorf("not sealed: %v", err)
			}
			again, err := Annotate(t.Context(), result.Manifest, Options{})
			if err != nil || string(again.Manifest) != string(result.Manifest) {
				t.Errorf("a second run changed it: %v\n%s", err, cmp.Diff(got, string(again.Pods[0].Policy)))
			}
		})
	}
}

// allowed asks the rules in a policy about a request.
func allowed(t *testing.T, text, input string) bool {
	t.Helper()
	results, err := rego.New(
		rego.SetRegoVersion(ast.RegoV1), rego.Module("policy.rego", text), rego.ParsedInput(ast.MustParseTerm(input).Value),
		rego.Query("data.agent_policy.CreateContainerRequest"),
	).Eval(t.Context())
	if err != nil || len(results) != 1 {
		t.Fatalf("%v, %v", results, err)
	}
	return results[0].Expressions[0].Value == true
}

// A sealed volume takes one storage out, however often its mount changes.
func TestGenpolicysStoragesAreTakenOnce(t *testing.T) {
	t.Parallel()
	const block = `{"driver_options": ["create_filesystem"]}`
	text := filled("[]", "["+block+", "+block+"]")
	for _, readOnly := range []bool{false, true, false} {
		volumes := []volume{{name: "v", emptyDir: true, mounts: []policy.Mount{{Container: "c", Path: "/v", ReadOnly: readOnly}}}}
		var err error
		if text, err = allowSealed(text, volumes, nil); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(text, `"storages": [`+block+"]") {
		t.Errorf("one of two emptyDirs is not sealed:\n%s", text)
	}
}

func TestPolicyDataOfOtherFormIsRefused(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"no object":              "[]",
		"no JSON":                "f(1)",
		"no containers":          "{}",
		"containers, no list":    `{"containers": {}}`,
		"a container, no object": `{"containers": [1]}`,
		"no mounts":              `{"containers": [{"OCI": {"Annotations": {"io.kubernetes.cri.container-name": "c"}}}]}`,
	} {
		got, err := merged(t, "package agent_policy\n\npolicy_data := "+text+"\n")
		if err == nil || !strings.Contains(err.Error(), "policy_data is not as genpolicy writes it") {
			t.Errorf("%s: want an error, got %v\n%s", name, err, got)
		}
	}
}

// FuzzGenpolicy: whatever stands behind policy_data, it is changed or refused, and a second run changes nothing.
func FuzzGenpolicy(f *testing.F) {
	f.Add(filled("[]", "[]"))
	f.Add(filled(`[{"destination": "/v"}]`, `[{"driver_options": ["create_filesystem"]}, {}]`))
	f.Fuzz(func(t *testing.T, text string) {
		volumes := []volume{{name: "v", emptyDir: true, mounts: []policy.Mount{{Container: "c", Path: "/v"}}}}
		once, err := allowSealed(text, volumes, nil)
		if err != nil {
			return
		}
		if twice, err := allowSealed(once, volumes, nil); err != nil || twice != once {
			t.Errorf("a second run must change nothing, got %v and\n%q\nafter\n%q", err, twice, once)
		}
	})
}
