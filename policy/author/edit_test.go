package author

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// annotated puts the annotation with the value V into each pod template of a manifest.
func annotated(manifest string) (string, error) {
	documents, err := parse([]byte(manifest))
	if err != nil {
		return "", err
	}
	changes := map[*document][]change{}
	for _, d := range documents {
		objects, err := d.objects()
		if err != nil {
			return "", err
		}
		for _, o := range objects {
			if o.template != nil {
				changes[d] = append(changes[d], change{o.template, "V"})
			}
		}
	}
	out, err := rewrite([]byte(manifest), documents, changes)
	return string(out), err
}

// K stands for the annotation's key in the cases below.
func withKey(s string) string { return strings.ReplaceAll(s, "K", Annotation) }

const pod = "apiVersion: v1\nkind: Pod\n"

func TestTheAnnotationIsPutIntoTheText(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ before, after string }{
		"metadata without annotations": {
			pod + "metadata:\n  name: a\nspec: {}\n",
			pod + "metadata:\n  annotations:\n    K: V\n  name: a\nspec: {}\n",
		},
		"comments keep their places": {
			"# top\n" + pod + "metadata:   # about it\n  # its name\n  name: a # a\n\n# and\nspec: {}\n# end",
			"# top\n" + pod + "metadata:   # about it\n  annotations:\n    K: V\n  # its name\n  name: a # a\n\n# and\nspec: {}\n# end",
		},
		"no metadata": {
			pod + "spec: {}\n",
			"metadata:\n  annotations:\n    K: V\n" + pod + "spec: {}\n",
		},
		"metadata and annotations of four columns": {
			pod + "metadata:\n    name: a\n    annotations:\n        b: c\n",
			pod + "metadata:\n    name: a\n    annotations:\n        K: V\n        b: c\n",
		},
		"annotations without value": {
			pod + "metadata:\n  annotations:\n  name: a\n",
			pod + "metadata:\n  annotations:\n    K: V\n  name: a\n",
		},
		"annotations without value at the end": {
			pod + "metadata:\n  annotations:",
			pod + "metadata:\n  annotations:\n    K: V",
		},
		"annotations with null": {
			pod + "metadata:\n  annotations: null # none\n",
			pod + "metadata:\n  annotations: {\"K\": \"V\"} # none\n",
		},
		"annotations with ~": {
			pod + "metadata:\n  annotations: ~\n",
			pod + "metadata:\n  annotations: {\"K\": \"V\"}\n",
		},
		"empty annotations": {
			pod + "metadata:\n  annotations: {}\n  name: a\n",
			pod + "metadata:\n  annotations: {\"K\": \"V\"}\n  name: a\n",
		},
		"annotations in braces": {
			pod + "metadata: {name: a, annotations: {b: 'c'}}\n",
			pod + "metadata: {name: a, annotations: {\"K\": \"V\", b: 'c'}}\n",
		},
		"metadata in braces": {
			pod + "metadata: { name: a }\n",
			pod + "metadata: { \"annotations\": {\"K\": \"V\"}, name: a }\n",
		},
		"a value there": {
			pod + "metadata:\n  annotations:\n    b: c\n    K: old # ours\n    d: e\n",
			pod + "metadata:\n  annotations:\n    b: c\n    K: V # ours\n    d: e\n",
		},
		"a value in double quotes": {
			pod + "metadata:\n  annotations:\n    K: \"o\\\"l\\\\d\"  \n",
			pod + "metadata:\n  annotations:\n    K: \"V\"  \n",
		},
		"a value in single quotes, on two lines": {
			pod + "metadata:\n  annotations:\n    'K': 'o''l\n      d'\n    d: e\n",
			pod + "metadata:\n  annotations:\n    'K': 'V'\n    d: e\n",
		},
		"a key in quotes": {
			pod + "\"metadata\":\n  'annotations':\n    b: c\n",
			pod + "\"metadata\":\n  'annotations':\n    K: V\n    b: c\n",
		},
		"line ends of Windows": {
			"apiVersion: v1\r\nkind: Pod\r\nmetadata:\r\n  name: a\r\n",
			"apiVersion: v1\r\nkind: Pod\r\nmetadata:\r\n  annotations:\r\n    K: V\r\n  name: a\r\n",
		},
		"a byte order mark, and letters of several bytes before it": {
			"\xef\xbb\xbf" + pod + "metadata: {\"näme\": \"ü\", annotations: {ß: \"ü\"}}\n",
			"\xef\xbb\xbf" + pod + "metadata: {\"näme\": \"ü\", annotations: {\"K\": \"V\", ß: \"ü\"}}\n",
		},
		"JSON on one line": {
			`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}`,
			`{"apiVersion":"v1","kind":"Pod","metadata":{"annotations": {"K": "V"}, "name":"a"}}`,
		},
		"JSON on many, with tabs": {
			"{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Pod\",\n\t\"metadata\": {\n\t\t\"annotations\": {\n\t\t\t\"b\": \"c\"\n\t\t}\n\t}\n}\n",
			"{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Pod\",\n\t\"metadata\": {\n\t\t\"annotations\": {\n\t\t\t\"K\": \"V\",\n\t\t\t\"b\": \"c\"\n\t\t}\n\t}\n}\n",
		},
		"JSON without metadata": {
			`{"apiVersion": "v1", "kind": "Pod"}`,
			`{"metadata": {"annotations": {"K": "V"}}, "apiVersion": "v1", "kind": "Pod"}`,
		},
		"a list in the compact form": {
			"apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n- metadata:\n    name: b\n  kind: Pod\n  apiVersion: v1\n",
			"apiVersion: v1\nkind: List\nitems:\n- metadata:\n    annotations:\n      K: V\n  apiVersion: v1\n  kind: Pod\n- metadata:\n    annotations:\n      K: V\n    name: b\n  kind: Pod\n  apiVersion: v1\n",
		},
		"documents, of which some are of others": {
			"---\n# first\n" + pod + "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: s\n---   # third\n" + pod + "metadata:\n  name: a\n...\n# end\n---\n",
			"---\n# first\nmetadata:\n  annotations:\n    K: V\n" + pod + "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: s\n---   # third\n" + pod + "metadata:\n  annotations:\n    K: V\n  name: a\n...\n# end\n---\n",
		},
		"a CronJob's template lies deep": {
			"apiVersion: batch/v1\nkind: CronJob\nspec:\n  jobTemplate:\n    spec:\n      template:\n        spec: {}\n",
			"apiVersion: batch/v1\nkind: CronJob\nspec:\n  jobTemplate:\n    spec:\n      template:\n        metadata:\n          annotations:\n            K: V\n        spec: {}\n",
		},
		"an anchor that nobody else uses": {
			pod + "metadata: &m\n  name: a\n",
			pod + "metadata: &m\n  annotations:\n    K: V\n  name: a\n",
		},
		"a block of text that looks like one": {
			pod + "data: |\n  metadata:\n    annotations:\nmetadata:\n  name: a\n",
			pod + "data: |\n  metadata:\n    annotations:\nmetadata:\n  annotations:\n    K: V\n  name: a\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := annotated(withKey(c.before))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(withKey(c.after), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestTextThatCannotBeEditedSafelyIsRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ manifest, want string }{
		"metadata shared by an anchor": {
			"apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: &m\n    name: a\n- apiVersion: v1\n  kind: Service\n  metadata: *m\n",
			"uses the same metadata elsewhere",
		},
		"metadata that is an alias": {
			"apiVersion: v1\nkind: List\nx: &m {name: a}\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: *m\n",
			"items[0].metadata: is an alias (*m); write it out",
		},
		"a template that is an alias": {
			"x: &t {spec: {}}\napiVersion: apps/v1\nkind: Deployment\nspec:\n  template: *t\n",
			"spec.template: is an alias (*t); write it out",
		},
		"a template from a merge key": {
			"x: &t {template: {spec: {}}}\napiVersion: apps/v1\nkind: Deployment\nspec:\n  <<: *t\n",
			"spec.template comes from a merge key; write it out",
		},
		"metadata from a merge key": {
			"x: &t {metadata: {name: a}}\n<<: *t\n" + pod,
			"write metadata and annotations out",
		},
		"a value of several lines": {
			pod + "metadata:\n  annotations:\n    K: |\n      old\n",
			"is not in quotes nor on one line",
		},
		"a value that is no string": {
			pod + "metadata:\n  annotations:\n    K: {}\n",
			"is no string",
		},
		"annotations that are a list": {
			pod + "metadata:\n  annotations: [a]\n",
			"metadata.annotations is no object",
		},
		"annotations that are text": {
			pod + "metadata:\n  annotations: a\n",
			"metadata.annotations is no object",
		},
		"no value in braces": {
			pod + "metadata: {annotations: , name: a}\n",
			"has no value; write {}",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := annotated(withKey(c.manifest))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want an error with %q, got %v and\n%s", c.want, err, got)
			}
		})
	}
}

func TestManifestsThatKubectlReadsOtherwiseAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ manifest, want string }{
		"repeated key":                    {pod + "kind: Job\n", `key "kind" already set`},
		"repeated key far away":           {pod + "spec: {a: {b: 1, c: 2, b: 3}}\n", `key "b" already set`},
		"repeated key in JSON":            {`{"apiVersion": "v1", "kind": "Pod", "kind": "Pod"}`, `key "kind" already set`},
		"content behind three dashes":     {"--- " + "{apiVersion: v1, kind: Pod}\n", "kubectl drops what stands behind its ---"},
		"content after the end":           {pod + "...\nspec: {}\n", "kubectl drops what follows after ..."},
		"a document after a lone \\r":     {"apiVersion: v1\r---\rkind: Pod\r", "more than one document"},
		"a list":                          {"- a\n", "is not an object"},
		"text":                            {"hello\n", "is not an object"},
		"no kind":                         {"apiVersion: v1\n", "has no kind"},
		"no version":                      {"kind: Pod\n", "no apiVersion"},
		"not UTF-8":                       {pod + "# \xff\n", "not UTF-8"},
		"UTF-16":                          {"\xff\xfea\x00", "not UTF-8"},
		"letters that JSON writes in two": {`{"apiVersion": "v1", "kind": "Pod", "a": "\ud83d\ude00"}`, "Unicode"},
		"a directive":                     {"%YAML 1.2\n---\n" + pod, "document 1"},
		"broken":                          {pod + "spec: {\n", "document 1"},
		"items that are no list":          {"apiVersion: v1\nkind: List\nitems: {}\n", "items is no list"},
		"items that are no objects":       {"apiVersion: v1\nkind: List\nitems: [1]\n", "items[0] is no object"},
		"lists in lists":                  {strings.Repeat("{apiVersion: v1, kind: List, items: [", 9) + strings.Repeat("]}", 9), "nested too deep"},
		"a million times the same":        {"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n" + pod, "excessive aliasing"},
		"longer than a manifest can be":   {pod + "#" + strings.Repeat(" ", MaxManifest), "is longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := annotated(c.manifest)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want an error with %q, got %v", c.want, err)
			}
		})
	}
}
