package author

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

// layout is an OCI image layout with these blobs and an index that refers to them by %s, in order.
func layout(index string, blobs ...string) fstest.MapFS {
	files := fstest.MapFS{}
	var digests []any
	for _, b := range blobs {
		digest := fmt.Sprintf("%x", sha256.Sum256([]byte(b)))
		files["blobs/sha256/"+digest] = &fstest.MapFile{Data: []byte(b)}
		digests = append(digests, "sha256:"+digest)
	}
	files["index.json"] = &fstest.MapFile{Data: fmt.Appendf(nil, index, digests[:strings.Count(index, "%s")]...)}
	return files
}

func blobDigest(b string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(b))) }

func TestImageLayouts(t *testing.T) {
	t.Parallel()
	config := `{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, "config": {"Entrypoint": ["e"], "Cmd": ["c"], "Labels": {}}}`
	other := strings.Replace(config, `"e"`, `"f"`, 1)
	manifest := func(config string) string {
		return `{"schemaVersion": 2, "config": {"digest": "` + blobDigest(config) + `"}}`
	}
	const one = `{"manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "%s"}]}`
	nested := `{"manifests": [{"digest": "` + blobDigest(manifest(config)) + `", "platform": {"os": "linux", "architecture": "amd64"}},
		{"digest": "sha256:0", "platform": {"os": "unknown", "architecture": "unknown"}}]}`
	const index = `{"manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "%s"}]}`
	const two = `{"manifests": [{"digest": "%s"}, {"digest": "%s"}]}`

	broken := layout(one, manifest(config), config)
	for name := range broken {
		if name != "index.json" {
			broken[name] = &fstest.MapFile{Data: append(broken[name].Data, ' ')}
		}
	}
	for name, c := range map[string]struct {
		layout fstest.MapFS
		want   string // of the error
	}{
		"one image":                 {layout(one, manifest(config), config), ""},
		"an index in the index":     {layout(index, nested, manifest(config), config), ""},
		"two that run different":    {layout(two, manifest(config), manifest(other), config, other), "different commands"},
		"a changed blob":            {broken, "is another"},
		"a blob that is not there":  {layout(one, manifest(config)), "does not exist"},
		"no image":                  {layout(`{"manifests": []}`), "holds no image"},
		"no layout":                 {fstest.MapFS{}, "does not exist"},
		"a digest that is none":     {layout(`{"manifests": [{"digest": "../../etc/passwd"}]}`), "digest"},
		"a manifest that is none":   {layout(one, `[]`), "cannot unmarshal"},
		"a config that is none":     {layout(one, manifest(`{}`), `{}`), "has no config"},
		"an index that is too long": {fstest.MapFS{"index.json": {Data: make([]byte, maxImageFile+1)}}, "is longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := ReadImageLayout(c.layout)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("want an error with %q, got %v", c.want, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(ImageConfig{Entrypoint: []string{"e"}, Cmd: []string{"c"}}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
