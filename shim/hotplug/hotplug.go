// Package hotplug defines the request that the NRI plugin writes on a
// container and that the runtime shim carries out: which volumes are to be
// plugged into the guest, and what stands behind each of them on the host.
//
// The request travels as strict JSON in the container annotation [Annotation]:
//
//	{"version": 1, "volumes": [{
//	  "name": "encrypted",
//	  "mountPath": "/mnt/encrypted",
//	  "source": "/run/sealvol/direct/<sandbox id>/encrypted",
//	  "device": {"major": 7, "minor": 0}
//	}]}
//
// Each volume has exactly one backing: `device`, a block device of the host;
// `file`, the absolute path of a regular file on the host; or
//
//	"emptyDir": {"path": "/var/lib/kubelet/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>", "size": 10737418240}
//
// kubelet's folder for an emptyDir, in which the reader makes a sparse file of
// that size, in bytes, for as long as the sandbox lives. For each volume
// the container's spec holds a bind mount from `source` to `mountPath`; the
// source never exists, it only names Kata's direct-volume record.
//
// The reader of a request owns what follows from it:
//   - It takes the annotation out of the spec. Kata and its policy never see it.
//   - It takes every block device with a backing's number out of linux.devices
//     and its rule out of linux.resources.devices: NRI 0.12.5 drops a removal
//     of a device that no plugin added, and cannot remove a cgroup rule at all,
//     so the raw device may still be there.
//   - It checks each source against [Source] for its own sandbox.
//
// Whoever can write a container spec can write a request, so nothing here is
// trusted by the guest. The package imports no other package of the project.
package hotplug

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	strictjson "sigs.k8s.io/json"
)

const (
	// Annotation is the key of the container annotation that holds a request.
	Annotation = "hotplug.sealvol.io/request"

	// Version is the only version of the request that there is.
	Version = 1

	// MaxSize is the largest request that is read or written, in bytes.
	MaxSize = 64 << 10

	// sourceDir is the directory below which Source names volumes. It is never made.
	sourceDir = "/run/sealvol/direct"

	// The kernel's widths of a device number, include/linux/kdev_t.h.
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1

	// maxPath is PATH_MAX without its NUL.
	maxPath = 4095

	// EmptyDirPlugin is the name of the folder that kubelet has in a pod's folder
	// of volumes for its emptyDirs, one folder for each (Kubernetes 1.34,
	// pkg/volume/emptydir; the "~" is of its plugin names).
	EmptyDirPlugin = "kubernetes.io~empty-dir"

	// emptyDirDepth is how deep an emptyDir is below kubelet's root folder:
	// pods/<uid>/volumes/<plugin>/<name>.
	emptyDirDepth = 5

	// MaxBytes is the largest size of an emptyDir's file, in bytes.
	MaxBytes = 1 << 60

	// sector is what the size of a block device is a multiple of, in bytes.
	sector = 512
)

var (
	nameRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

	// sandboxRE is containerd's rule for identifiers. With its limit of 76
	// bytes the base64url of a source fits into a file name.
	sandboxRE = regexp.MustCompile(`^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$`)
)

const maxSandboxID = 76

// Request is a valid hotplug request if it comes from [Parse].
type Request struct {
	// Volumes are in the order in which they are to be plugged, at least one.
	// No two have the same name, mount path, source or backing.
	Volumes []Volume
}

// Volume is one volume of a container.
type Volume struct {
	// Name is the volume's name in the pod's policy.
	Name string
	// MountPath is where the container sees the volume.
	MountPath string
	// Source is the source of the volume's bind mount, see [Source].
	Source string
	// Backing is what holds the volume's bytes on the host.
	Backing Backing
}

// Backing is a [Device], a [File] or an [EmptyDir].
type Backing interface {
	fmt.Stringer
	kind() string
	check() error
}

// Device is the number of a block device of the host.
type Device struct {
	Major, Minor uint32
}

// String gives the number as the kernel writes it, "major:minor".
func (d Device) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// File is the absolute path of a regular file on the host.
type File string

// String gives the path.
func (f File) String() string { return string(f) }

// EmptyDir is a sparse file that is to be made in kubelet's folder for an emptyDir.
type EmptyDir struct {
	// Path is the folder's absolute path.
	Path string
	// Size is the file's, in bytes.
	Size uint64
}

// String gives the path: a folder holds one file.
func (e EmptyDir) String() string { return e.Path }

// Split gives kubelet's root folder and, relative to that, the emptyDir's. An
// administrator may have made the one a link; in the other there is none.
func (e EmptyDir) Split() (root, folder string) {
	parts := strings.Split(e.Path, "/")
	above := max(0, len(parts)-emptyDirDepth)
	return strings.Join(parts[:above], "/") + "/", strings.Join(parts[above:], "/")
}

// Source names a volume of a sandbox: the source of its bind mount in the
// container spec, whose base64url is the name of Kata's direct-volume record.
func Source(sandboxID, name string) string {
	return sourceDir + "/" + sandboxID + "/" + name
}

// The request as it is written. Pointers tell what is absent from what is zero.
type (
	wireRequest struct {
		Version int          `json:"version"`
		Volumes []wireVolume `json:"volumes"`
	}
	wireVolume struct {
		Name      string        `json:"name"`
		MountPath string        `json:"mountPath"`
		Source    string        `json:"source"`
		Device    *wireDevice   `json:"device,omitempty"`
		File      *string       `json:"file,omitempty"`
		EmptyDir  *wireEmptyDir `json:"emptyDir,omitempty"`
	}
	wireEmptyDir struct {
		Path string `json:"path"`
		Size uint64 `json:"size"`
	}
	wireDevice struct {
		Major *uint32 `json:"major"`
		Minor *uint32 `json:"minor"`
	}
)

// Parse reads a request. Whatever is not exactly as documented, unknown and
// repeated keys included, is an [errdefs.ErrInvalidArgument].
func Parse(data []byte) (Request, error) {
	request, err := parse(data)
	if err != nil {
		return Request{}, fmt.Errorf("hotplug request: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return request, nil
}

// Encode writes the request so that [Parse] gives it back. A request that
// Parse would refuse is an [errdefs.ErrInvalidArgument].
func (r Request) Encode() ([]byte, error) {
	data, err := r.encode()
	if err != nil {
		return nil, fmt.Errorf("hotplug request: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return data, nil
}

func parse(data []byte) (Request, error) {
	if len(data) > MaxSize {
		return Request{}, fmt.Errorf("%d bytes, more than %d", len(data), MaxSize)
	}
	if !utf8.Valid(data) {
		return Request{}, errors.New("not UTF-8")
	}
	var wire wireRequest
	strict, err := strictjson.UnmarshalStrict(data, &wire)
	if err := errors.Join(append(strict, err)...); err != nil {
		return Request{}, err
	}
	if wire.Version != Version {
		return Request{}, fmt.Errorf("version %d, not %d", wire.Version, Version)
	}
	var request Request
	for i, w := range wire.Volumes {
		backing, err := w.backing()
		if err != nil {
			return Request{}, fmt.Errorf("volumes[%d] %q: %w", i, w.Name, err)
		}
		request.Volumes = append(request.Volumes, Volume{w.Name, w.MountPath, w.Source, backing})
	}
	return request, request.check()
}

func (w wireVolume) backing() (Backing, error) {
	count := 0
	for _, there := range []bool{w.Device != nil, w.File != nil, w.EmptyDir != nil} {
		if there {
			count++
		}
	}
	switch {
	case count != 1:
		return nil, fmt.Errorf("%d of device, file and emptyDir are there, not one", count)
	case w.File != nil:
		return File(*w.File), nil
	case w.EmptyDir != nil:
		return EmptyDir(*w.EmptyDir), nil
	case w.Device.Major == nil || w.Device.Minor == nil:
		return nil, errors.New("device: major and minor are both needed")
	}
	return Device{*w.Device.Major, *w.Device.Minor}, nil
}

func (r Request) encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	wire := wireRequest{Version: Version}
	for _, v := range r.Volumes {
		w := wireVolume{Name: v.Name, MountPath: v.MountPath, Source: v.Source}
		switch b := v.Backing.(type) {
		case Device:
			w.Device = &wireDevice{&b.Major, &b.Minor}
		case File:
			w.File = (*string)(&b)
		case EmptyDir:
			w.EmptyDir = (*wireEmptyDir)(&b)
		}
		wire.Volumes = append(wire.Volumes, w)
	}
	// Escaping for HTML would make a request that was parsed grow over MaxSize.
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(wire); err != nil {
		return nil, err
	}
	data := bytes.TrimSuffix(out.Bytes(), []byte("\n"))
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%d bytes, more than %d", len(data), MaxSize)
	}
	return data, nil
}

func (r Request) check() error {
	if len(r.Volumes) == 0 {
		return errors.New("no volumes")
	}
	// The first volume that has a value, by kind and value.
	seen := map[[2]string]string{}
	for i, v := range r.Volumes {
		if err := v.check(); err != nil {
			return fmt.Errorf("volumes[%d] %q: %w", i, v.Name, err)
		}
		for _, key := range [][2]string{
			{"name", v.Name},
			{"mountPath", v.MountPath},
			{"source", v.Source},
			{v.Backing.kind(), v.Backing.String()},
		} {
			if other, taken := seen[key]; taken {
				return fmt.Errorf("volumes[%d] %q: %s %q is also that of volume %q", i, v.Name, key[0], key[1], other)
			}
			seen[key] = v.Name
		}
	}
	return nil
}

func (v Volume) check() error {
	if err := CheckName(v.Name); err != nil {
		return err
	}
	if err := CheckPath(v.MountPath); err != nil {
		return fmt.Errorf("mountPath %w", err)
	}
	sandbox, name := path.Split(strings.TrimPrefix(v.Source, sourceDir+"/"))
	sandbox = strings.TrimSuffix(sandbox, "/")
	if name != v.Name || len(sandbox) > maxSandboxID || !sandboxRE.MatchString(sandbox) || v.Source != Source(sandbox, name) {
		return fmt.Errorf("source %q is not %s", v.Source, Source("<sandbox id>", v.Name))
	}
	if v.Backing == nil {
		return errors.New("no backing")
	}
	return v.Backing.check()
}

func (d Device) kind() string { return "device" }

func (f File) kind() string { return "file" }

func (e EmptyDir) kind() string { return "emptyDir" }

func (d Device) check() error {
	// Major 0 is for file systems without a device: no block device has it.
	if d.Major == 0 || d.Major > maxMajor || d.Minor > maxMinor {
		return fmt.Errorf("device %s is no number of a block device", d)
	}
	return nil
}

func (f File) check() error {
	if err := CheckPath(string(f)); err != nil {
		return fmt.Errorf("file %w", err)
	}
	return nil
}

func (e EmptyDir) check() error {
	if err := CheckPath(e.Path); err != nil {
		return fmt.Errorf("emptyDir %w", err)
	}
	_, folder := e.Split()
	if ok, err := path.Match("pods/*/volumes/"+EmptyDirPlugin+"/*", folder); err != nil || !ok {
		return fmt.Errorf("emptyDir %q is not kubelet's, which are pods/<uid>/volumes/%s/<name> in its root folder", e.Path, EmptyDirPlugin)
	}
	if e.Size == 0 || e.Size > MaxBytes || e.Size%sector != 0 {
		return fmt.Errorf("emptyDir of %d bytes, which is not a multiple of %d between %d and %d", e.Size, sector, sector, uint64(MaxBytes))
	}
	return nil
}

// CheckName says why a string cannot name a volume. The rule is that of a DNS
// label, so that a name fits into an annotation key and into a file name.
func CheckName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("volume name %q does not match %s", name, nameRE)
	}
	return nil
}

// CheckPath says why a string cannot be a mount path or a file: it must be
// absolute and clean, below the root, and printable, so that what a log shows
// is what is mounted.
func CheckPath(p string) error {
	switch {
	case len(p) > maxPath:
		return fmt.Errorf("of %d bytes is longer than %d", len(p), maxPath)
	case !path.IsAbs(p):
		return fmt.Errorf("%q is not an absolute path", p)
	case path.Clean(p) != p:
		return fmt.Errorf("%q is not a clean path, write %q", p, path.Clean(p))
	case p == "/":
		return fmt.Errorf("%q is the root", p)
	case !utf8.ValidString(p) || strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("%q holds unprintable characters", p)
	}
	return nil
}
