package author

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImageConfig is what an image runs if the pod does not say.
type ImageConfig struct {
	Entrypoint []string
	Cmd        []string
}

// maxImageFile bounds each file of an image that is read, in bytes.
const maxImageFile = 4 << 20

// ParseImageConfig reads an OCI image configuration (media type application/vnd.oci.image.config.v1+json; Docker's has the same form).
func ParseImageConfig(text []byte) (ImageConfig, error) {
	var image struct {
		imagespec.Image
		Config *imagespec.ImageConfig `json:"config"`
	}
	if err := json.Unmarshal(text, &image); err != nil {
		return ImageConfig{}, fmt.Errorf("image configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if image.Config == nil || image.RootFS.Type == "" {
		return ImageConfig{}, fmt.Errorf("image configuration: has no config or no rootfs, and so is none: %w", errdefs.ErrInvalidArgument)
	}
	return ImageConfig{Entrypoint: image.Config.Entrypoint, Cmd: image.Config.Cmd}, nil
}

// ReadImageLayout reads the configuration of the one image in an OCI image layout. If the image is for several platforms, all must run
// the same.
func ReadImageLayout(layout fs.FS) (ImageConfig, error) {
	text, err := readFile(layout, imagespec.ImageIndexFile)
	if err != nil {
		return ImageConfig{}, fmt.Errorf("image layout: %w", err)
	}
	configs, err := readIndex(layout, text, 0)
	if err != nil {
		return ImageConfig{}, fmt.Errorf("image layout: %w", err)
	}
	if len(configs) == 0 {
		return ImageConfig{}, fmt.Errorf("image layout: holds no image: %w", errdefs.ErrNotFound)
	}
	for _, c := range configs {
		if !slices.Equal(c.Entrypoint, configs[0].Entrypoint) || !slices.Equal(c.Cmd, configs[0].Cmd) {
			return ImageConfig{}, fmt.Errorf("image layout: holds images that run different commands; make one of the image that is meant, alone: %w", errdefs.ErrInvalidArgument)
		}
	}
	return configs[0], nil
}

func readIndex(layout fs.FS, text []byte, depth int) ([]ImageConfig, error) {
	if depth > 3 {
		return nil, fmt.Errorf("indexes are nested too deep: %w", errdefs.ErrInvalidArgument)
	}
	var index imagespec.Index
	if err := json.Unmarshal(text, &index); err != nil {
		return nil, fmt.Errorf("index: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var configs []ImageConfig
	for _, m := range index.Manifests {
		if m.Platform != nil && m.Platform.OS == "unknown" { // where builders keep attestations
			continue
		}
		blob, err := readBlob(layout, m.Digest)
		if err != nil {
			return nil, err
		}
		switch m.MediaType {
		case imagespec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json":
			nested, err := readIndex(layout, blob, depth+1)
			if err != nil {
				return nil, err
			}
			configs = append(configs, nested...)
		default:
			var manifest imagespec.Manifest
			if err := json.Unmarshal(blob, &manifest); err != nil {
				return nil, fmt.Errorf("manifest %s: %w: %w", m.Digest, err, errdefs.ErrInvalidArgument)
			}
			if blob, err = readBlob(layout, manifest.Config.Digest); err != nil {
				return nil, err
			}
			config, err := ParseImageConfig(blob)
			if err != nil {
				return nil, err
			}
			configs = append(configs, config)
		}
	}
	return configs, nil
}

// readBlob reads a blob and makes sure that it is the one that its digest says.
func readBlob(layout fs.FS, d digest.Digest) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	blob, err := readFile(layout, "blobs/"+d.Algorithm().String()+"/"+d.Encoded())
	if err != nil {
		return nil, err
	}
	if d.Algorithm().FromBytes(blob) != d {
		return nil, fmt.Errorf("blob %s: is another; fetch the image again: %w", d, errdefs.ErrDataLoss)
	}
	return blob, nil
}

func readFile(layout fs.FS, name string) (text []byte, err error) {
	f, err := layout.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if text, err = io.ReadAll(io.LimitReader(f, maxImageFile+1)); err != nil {
		return nil, err
	}
	if len(text) > maxImageFile {
		return nil, fmt.Errorf("%s: is longer than %d bytes: %w", name, maxImageFile, errdefs.ErrInvalidArgument)
	}
	return text, nil
}
