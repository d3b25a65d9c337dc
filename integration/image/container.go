package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Busybox is a container's root file system: busybox with a link for each of its applets.
func Busybox() (*Tree, error) {
	const busybox = "/bin/busybox"
	tree := &Tree{}
	for _, dir := range []string{"/dev", "/etc", "/mnt", "/proc", "/root", "/run", "/sys", "/tmp"} {
		tree.Dir(dir)
	}
	if err := tree.Add(busybox, busybox); err != nil {
		return nil, err
	}
	applets, err := output(exec.Command(busybox, "--list"))
	if err != nil {
		return nil, err
	}
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			tree.Link("/bin/"+applet, "busybox")
		}
	}
	tree.File("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	tree.File("/etc/group", 0o644, []byte("root:x:0:\n"))
	return tree, nil
}

// WriteImages writes container images of one layer, the tree, by reference, in an archive as `ctr images import` reads it: an OCI
// image layout (opencontainers/image-spec, image-layout.md). A reference is complete, as in docker.io/library/busybox:latest.
func (t *Tree) WriteImages(w io.Writer, images map[string]v1.ImageConfig) error {
	var layer bytes.Buffer
	if err := t.WriteTar(&layer); err != nil {
		return err
	}
	archive := layout{tar: tar.NewWriter(w)}
	layers := []v1.Descriptor{archive.blob(v1.MediaTypeImageLayer, layer.Bytes())}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}}
	for _, reference := range slices.Sorted(maps.Keys(images)) {
		config := archive.blob(v1.MediaTypeImageConfig, archive.json(v1.Image{
			Platform: v1.Platform{Architecture: "amd64", OS: "linux"},
			Config:   images[reference],
			RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layers[0].Digest}},
		}))
		manifest := archive.blob(v1.MediaTypeImageManifest, archive.json(v1.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: v1.MediaTypeImageManifest,
			Config:    config,
			Layers:    layers,
		}))
		manifest.Annotations = map[string]string{
			"io.containerd.image.name": reference,
			v1.AnnotationRefName:       reference[strings.LastIndex(reference, ":")+1:],
		}
		index.Manifests = append(index.Manifests, manifest)
	}
	archive.file(v1.ImageIndexFile, archive.json(index))
	archive.file(v1.ImageLayoutFile, archive.json(v1.ImageLayout{Version: v1.ImageLayoutVersion}))
	if archive.err != nil {
		return archive.err
	}
	return archive.tar.Close()
}

// layout is an image layout being written; it keeps the first error.
type layout struct {
	tar *tar.Writer
	err error
}

func (l *layout) file(name string, data []byte) {
	if l.err == nil {
		l.err = l.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))})
	}
	if l.err == nil {
		_, l.err = l.tar.Write(data)
	}
}

func (l *layout) blob(mediaType string, data []byte) v1.Descriptor {
	sha := sha256.Sum256(data)
	sum := digest.NewDigestFromBytes(digest.SHA256, sha[:])
	l.file(v1.ImageBlobsDir+"/sha256/"+sum.Encoded(), data)
	return v1.Descriptor{MediaType: mediaType, Digest: sum, Size: int64(len(data))}
}

func (l *layout) json(value any) []byte {
	data, err := json.Marshal(value)
	if l.err == nil {
		l.err = err
	}
	return data
}
