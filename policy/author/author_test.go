package author

import (
	"encoding/base64"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/sealvol/sealvol/policy"
)

var update = flag.Bool("update", false, "write the golden files")

func read(tb testing.TB, path string) []byte {
	tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// wantGolden compares with a file, or writes it with -update.
func wantGolden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(string(read(t, path)), string(got)); diff != "" {
		t.Errorf("differs from %s (-want +got), see -update:\n%s", path, diff)
	}
}

// encode is a policy as the value of Annotation.
func encode(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

// transcript is what the author of a manifest gets to see, but for the manifest.
func transcript(result Result, err error) string {
	var b strings.Builder
	if err != nil {
		for _, line := range strings.Split(err.Error(), "\n") {
			b.WriteString("error: " + line + "\n")
		}
	}
	for _, w := range result.Warnings {
		b.WriteString("warning: " + w + "\n")
	}
	for _, p := range result.Pods {
		b.WriteString("\n# " + p.Name + "\n" + string(p.Policy))
	}
	return b.String()
}

// manifests are the small ones of this package.
func manifests(tb testing.TB) []string {
	tb.Helper()
	yaml, err := filepath.Glob("testdata/pods/*.yaml")
	json, err2 := filepath.Glob("testdata/pods/*.json")
	if err != nil || err2 != nil || len(yaml) == 0 || len(json) == 0 {
		tb.Fatalf("no test data: %v, %v", err, err2)
	}
	return append(yaml, json...)
}

// TestPods runs testdata/pods: beside NAME.yaml stands in NAME.policy what the author is told and what policies are made.
func TestPods(t *testing.T) {
	t.Parallel()
	for _, file := range manifests(t) {
		name := strings.TrimSuffix(file, filepath.Ext(file))
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			manifest := read(t, file)
			result, err := Annotate(t.Context(), manifest, Options{})
			wantGolden(t, name+".policy", []byte(transcript(result, err)))
			if err == nil {
				wantOnlyAnnotations(t, manifest, Options{}, result)
			}
		})
	}
}

// wantOnlyAnnotations says that nothing of a manifest changed but for the annotations, and that a second run changes nothing.
func wantOnlyAnnotations(t *testing.T, manifest []byte, options Options, result Result) {
	t.Helper()
	for _, p := range result.Pods {
		if _, err := policy.Load(t.Context(), p.Policy); err != nil {
			t.Errorf("%s: the guest would refuse its policy: %v", p.Name, err)
		}
	}
	again, err := Annotate(t.Context(), result.Manifest, options)
	if err != nil {
		t.Fatalf("the tool must read its own output: %v", err)
	}
	if diff := cmp.Diff(string(result.Manifest), string(again.Manifest)); diff != "" {
		t.Errorf("a second run changed the manifest:\n%s", diff)
	}
	if !isPart(string(manifest), string(result.Manifest)) {
		t.Errorf("bytes of the manifest are gone:\n%s", result.Manifest)
	}
}

func TestAManifestWithoutSealedVolumesIsAnError(t *testing.T) {
	t.Parallel()
	_, err := Annotate(t.Context(), []byte("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"), Options{})
	if !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), DefaultClass) || !strings.Contains(err.Error(), "--class") {
		t.Errorf("the author would believe the pod sealed, got %v", err)
	}
}
