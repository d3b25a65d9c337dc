package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const testdata = "../../policy/author/testdata"

func TestVariablesAreExpandedAsKubeletDoes(t *testing.T) {
	t.Parallel()
	values := map[string]string{"A": "a", "B": "$(A)", "EMPTY": ""}
	for in, want := range map[string]string{
		"$(A)/$(A)":      "a/a",
		"$(B)":           "$(A)", // a value is not expanded again
		"x$(EMPTY)y":     "xy",
		"$(UNKNOWN)$(A)": "$(UNKNOWN)a",
		"$$(A)":          "$(A)",
		"$$$(A)":         "$a",
		"$A ${A} $":      "$A ${A} $",
		"$(A":            "$(A",
		"$(A $(A)":       "$(A $(A)",
		"":               "",
	} {
		if got := expand(in, values); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestTwoRecordingsOfAPodAreTheSame(t *testing.T) {
	t.Parallel()
	recording := func(sandbox, container, random, other string) string {
		const text = `{"a":"/S/C-R-hosts","b":"C-O-hostname","c":"C-R-hosts","d":"C"}`
		return strings.NewReplacer("S", sandbox, "C", container, "R", random, "O", other).Replace(text)
	}
	first := recording("ab12", "cd34", "0011223344556677", "8899aabbccddeeff")
	second := recording("ef56", "0178", "ffeeddccbbaa9988", "0000000000000000")
	got := string(plain([]byte(first), []string{"ab12", "cd34"}))
	if diff := cmp.Diff(string(plain([]byte(second), []string{"ef56", "0178"})), got); diff != "" {
		t.Error("ids and random bytes must not show:\n" + diff)
	}
	if want := recording("1111", "2222", "0000000000000001", "0000000000000002"); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// The policy tool is tried on every kind of workload, and on nothing that was not recorded.
func TestEveryManifestIsRecorded(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(testdata, "manifests/*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, file := range files {
		m, err := readManifest(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		var recorded struct{ Pods []requests }
		text, err := os.ReadFile(filepath.Join(testdata, "recorded", name+".json"))
		if err != nil {
			t.Errorf("%v: run make record NAMES=%s", err, name)
			continue
		}
		if err := json.Unmarshal(text, &recorded); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var want, got [][]string
		for _, p := range m.pods {
			kinds[p.kind]++
			containers := []string{p.kind, p.name, ""}
			for _, c := range slices.Concat(p.spec.InitContainers, p.spec.Containers) {
				containers = append(containers, c.Name)
			}
			want = append(want, containers)
		}
		for _, p := range recorded.Pods {
			containers := []string{p.Kind, p.Name}
			for _, r := range p.Requests {
				if r.RPC == "CreateContainer" {
					containers = append(containers, r.Container)
				}
			}
			got = append(got, containers)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: the containers of the manifest are not those that were recorded; run make record NAMES=%s\n%s", name, name, diff)
		}
	}
	for _, kind := range []string{"Pod", "Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job", "CronJob"} {
		if kinds[kind] < 2 {
			t.Errorf("%d manifests of kind %s, want two or more", kinds[kind], kind)
		}
	}
}
