package author

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/policy"
)

// isPart reports whether all bytes of a are in b, in their order.
func isPart(a, b string) bool {
	for i := 0; i < len(b) && len(a) > 0; i++ {
		if a[0] == b[i] {
			a = a[1:]
		}
	}
	return len(a) == 0
}

// FuzzEdit: whatever manifest comes, each pod in it gets its annotation and nothing else changes, or there is an error.
func FuzzEdit(f *testing.F) {
	for _, s := range []string{
		pod, pod + "metadata:\n  name: a\n", pod + "metadata: {annotations: {a: b}}\n", pod + "metadata:\n  annotations:\n    K: \"old\"\n",
		pod + "metadata: &m\n  annotations: ~\n---\n" + pod, "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod}\n- kind: Pod\n  apiVersion: v1\n",
		`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}`, "x: &t {a: b}\r\napiVersion: apps/v1\r\nkind: Deployment\r\nspec: {template: {<<: *t}}\r\n",
	} {
		f.Add(withKey(s))
	}
	f.Fuzz(func(t *testing.T, manifest string) {
		once, err := annotated(manifest)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("an error of no class: %v", err)
			}
			return
		}
		twice, err := annotated(once)
		if err != nil || twice != once {
			t.Errorf("a second run must change nothing, got %v and\n%q\nafter\n%q", err, twice, once)
		}
		if !strings.ContainsAny(manifest, "~") && !strings.Contains(strings.ToLower(manifest), "null") && !strings.Contains(manifest, "kata") && !isPart(manifest, once) {
			t.Errorf("bytes are gone:\n%q\n%q", manifest, once)
		}
	})
}

// FuzzAnnotate: the whole way from a manifest to its policies.
func FuzzAnnotate(f *testing.F) {
	for _, file := range manifests(f) {
		manifest := read(f, file)
		f.Add(manifest)
		if result, err := annotate(f.Context(), manifest, Options{}); err == nil {
			f.Add(result.Manifest)
		}
	}
	f.Fuzz(func(t *testing.T, manifest []byte) {
		result, err := annotate(t.Context(), manifest, Options{})
		if err != nil {
			return
		}
		again, err := annotate(t.Context(), result.Manifest, Options{})
		if err != nil && slices.ContainsFunc(result.Pods, func(p Pod) bool { return refused(t.Context(), p) }) {
			return // by Annotate, at the first run
		}
		if err != nil || string(again.Manifest) != string(result.Manifest) {
			t.Errorf("a second run must change nothing, got %v and\n%q\nafter\n%q", err, again.Manifest, result.Manifest)
		}
		for i, p := range again.Pods {
			if string(p.Policy) != string(result.Pods[i].Policy) {
				t.Errorf("%s: a second run changed the policy:\n%s\n%s", p.Name, result.Pods[i].Policy, p.Policy)
			}
		}
	})
}

func refused(ctx context.Context, p Pod) bool {
	_, err := policy.Load(ctx, p.Policy)
	return err != nil
}

// expandSlowly is Kubernetes' expansion as its documentation words it (kubernetes.io/docs/reference/kubernetes-api, Container.command),
// letter by letter: $$ is one dollar sign, $(NAME) is replaced, all else stays.
func expandSlowly(s string, mapping func(string) string) string {
	out := ""
	for s != "" {
		switch {
		case strings.HasPrefix(s, "$$"):
			out, s = out+"$", s[2:]
		case strings.HasPrefix(s, "$(") && strings.Contains(s, ")"):
			end := strings.Index(s, ")")
			out, s = out+mapping(s[2:end]), s[end+1:]
		default:
			out, s = out+s[:1], s[1:]
		}
	}
	return out
}

func FuzzExpand(f *testing.F) {
	for _, s := range []string{"", "$", "$$", "$(A)", "$$(A)", "$$$(A)", "a$(A)b$(B)", "$(A", "$($(A))", "$()", "$(A)$", "100%$x$(A"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		mapping := func(name string) string { return "<" + name + ">" }
		if got, want := expand(s, mapping), expandSlowly(s, mapping); got != want {
			t.Errorf("%q: got %q, want %q", s, got, want)
		}
	})
}

// FuzzRequest: an annotation is read or refused with a class, never half.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		`{"device": "/dev/a", "mountPath": "/mnt/a", "mode": "ephemeral"}`, `{"emptyDir": "scratch", "size": "10Gi"}`, `{"mode": "ephemeral"}`,
		`{"mode": "persistent"}`, `{"emptyDir": "a", "size": "1e30"}`, `{"size": "-1"}`, `{"mode": "ephemeral", "mode": "ephemeral"}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		q, err := parseRequest(text)
		switch {
		case err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err):
			t.Errorf("an error of no class: %v", err)
		case err == nil && q.Device != "" && (!clean(q.Device) || !clean(q.MountPath)):
			t.Errorf("a path that is not clean: %+v", q)
		case err == nil && q.Mode != "ephemeral" && q.EmptyDir == "":
			t.Errorf("neither ephemeral nor an emptyDir: %+v", q)
		}
	})
}
