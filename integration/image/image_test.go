package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func sample() *Tree {
	tree := &Tree{}
	tree.File("/usr/bin/tool", 0o755, []byte("#!tool"))
	tree.File("/empty", 0o600, nil)
	tree.Link("/bin", "usr/bin")
	tree.Dir("/proc/")
	return tree
}

func TestCPIOUnpacksToTheTree(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var archive bytes.Buffer
	if err := sample().WriteCPIO(&archive); err != nil {
		t.Fatal(err)
	}
	unpack := exec.Command("cpio", "-i", "--quiet")
	unpack.Dir, unpack.Stdin = dir, &archive
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		content := info.Mode().String() + " "
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content += string(data)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			content += target
		}
		got[strings.TrimPrefix(path, dir)] = content
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"/bin":          "Lrwxrwxrwx usr/bin",
		"/empty":        "-rw------- ",
		"/proc":         "drwxr-xr-x ",
		"/usr":          "drwxr-xr-x ",
		"/usr/bin":      "drwxr-xr-x ",
		"/usr/bin/tool": "-rwxr-xr-x #!tool",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSameTreeGivesTheSameBytes(t *testing.T) {
	t.Parallel()
	for name, write := range map[string]func(*Tree, io.Writer) error{
		"cpio": (*Tree).WriteCPIO,
		"tar":  (*Tree).WriteTar,
		"image": func(t *Tree, w io.Writer) error {
			return t.WriteImages(w, map[string]v1.ImageConfig{"local.test/a:1": {}, "local.test/b:1": {}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var first, second bytes.Buffer
			if err := errors.Join(write(sample(), &first), write(sample(), &second)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(first.Bytes(), second.Bytes()) {
				t.Error("two archives of one tree differ")
			}
		})
	}
}

func TestAddBringsLibraries(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		source  string
		library string
	}{
		"dynamic":    {"/bin/sh", "/lib64/ld-linux-x86-64.so.2"},
		"static":     {"/bin/busybox", ""},
		"no program": {"image_test.go", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var tree Tree
			if err := tree.Add("/file", test.source); err != nil {
				t.Fatal(err)
			}
			files := slices.DeleteFunc(tree.names(), func(name string) bool { return tree.entries[name].mode&typeMask == typeDir })
			if test.library == "" && len(files) != 1 || test.library != "" && !slices.Contains(files, test.library) {
				t.Errorf("files %v, want library %q", files, test.library)
			}
		})
	}
	if err := new(Tree).Add("/file", filepath.Join(t.TempDir(), "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
}

// The image's descriptors must lead from the index to the layer, each with its blob's size.
func TestImageIsComplete(t *testing.T) {
	t.Parallel()
	var archive bytes.Buffer
	if err := sample().WriteImages(&archive, map[string]v1.ImageConfig{"local.test/sample:1": {Cmd: []string{"sleep", "infinity"}}}); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(&archive); ; {
		header, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	decode := func(data []byte, into any) {
		t.Helper()
		if err := json.Unmarshal(data, into); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(d v1.Descriptor) []byte {
		t.Helper()
		data := files["blobs/sha256/"+d.Digest.Encoded()]
		if int64(len(data)) != d.Size || d.Digest.Algorithm().FromBytes(data) != d.Digest {
			t.Errorf("blob %s does not fit its descriptor", d.Digest)
		}
		return data
	}
	var index v1.Index
	decode(files["index.json"], &index)
	if name := index.Manifests[0].Annotations["io.containerd.image.name"]; name != "local.test/sample:1" {
		t.Errorf("name %q", name)
	}
	var manifest v1.Manifest
	decode(blob(index.Manifests[0]), &manifest)
	var config v1.Image
	decode(blob(manifest.Config), &config)
	if diff := cmp.Diff([]string{"sleep", "infinity"}, config.Config.Cmd); diff != "" {
		t.Error(diff)
	}
	blob(manifest.Layers[0])
	if config.RootFS.DiffIDs[0] != manifest.Layers[0].Digest {
		t.Error("the layer is not the one that the configuration names")
	}
}
