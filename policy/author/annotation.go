package author

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	strictjson "sigs.k8s.io/json"

	"github.com/sealvol/sealvol/plugin/quantity"
)

const (
	// domain is the project's: annotations under it that nobody knows are errors.
	domain = "sealvol.io"

	// volumePrefix and a volume's name make the key of the annotation that asks for a sealed volume where Kubernetes has no field for it.
	volumePrefix = "volume." + domain + "/"
)

// request is what an annotation asks for. Its forms:
//
//	{"device": "/dev/encrypted", "mountPath": "/mnt/encrypted", "mode": "ephemeral"}   a raw block device of the containers (volumeDevices)
//	{"emptyDir": "scratch", "size": "10Gi"}                                            an emptyDir; its sizeLimit is kubelet's and reaches no node's plugin
//	{"mode": "ephemeral"}                                                              the claim behind a volumeMount, whose data goes with the pod
type request struct {
	Device    string `json:"device"`
	MountPath string `json:"mountPath"`
	Mode      string `json:"mode"`
	EmptyDir  string `json:"emptyDir"`
	Size      string `json:"size"`

	size uint64 // in bytes; 0: not said
}

var volumeName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// requests reads the project's annotations of a pod template, by volume name.
func requests(r *report, annotations map[string]string) map[string]request {
	found := map[string]request{}
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		prefix, _, _ := strings.Cut(strings.ToLower(key), "/")
		if prefix != domain && !strings.HasSuffix(prefix, "."+domain) {
			continue
		}
		name, ok := strings.CutPrefix(key, volumePrefix)
		if !ok || !volumeName.MatchString(name) {
			r.refuse(errdefs.ErrInvalidArgument, "annotation %q is not known: a volume is asked for with %s<name>", key, volumePrefix)
			continue
		}
		q, err := parseRequest(annotations[key])
		if err != nil {
			r.refusals = append(r.refusals, fmt.Errorf("%s: annotation %q: %w", r.where, key, err))
			continue
		}
		found[name] = q
	}
	return found
}

func parseRequest(text string) (request, error) {
	var q request
	strict, err := strictjson.UnmarshalStrict([]byte(text), &q)
	if err := errors.Join(append(strict, err)...); err != nil {
		return q, fmt.Errorf("%s: %w", oneLine(err), errdefs.ErrInvalidArgument)
	}
	fail := func(format string, args ...any) (request, error) {
		return q, fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if q.EmptyDir == "" && q.Mode != "ephemeral" || q.Mode != "" && q.Mode != "ephemeral" {
		return q, fmt.Errorf("mode %q is not supported: persistent volumes come later; write \"ephemeral\" if the data may go with the pod: %w", q.Mode, errdefs.ErrFailedPrecondition)
	}
	switch {
	case q.EmptyDir != "" && (q.Device != "" || q.MountPath != ""):
		return fail("emptyDir has its mounts in the pod; remove device and mountPath")
	case (q.Device == "") != (q.MountPath == ""):
		return fail("device and mountPath go together: the block device of the container, and where its file system is to be")
	case q.EmptyDir == "" && q.Size != "":
		return fail("size is that of an emptyDir; a claim has its own")
	}
	for field, p := range map[string]string{"device": q.Device, "mountPath": q.MountPath} {
		if p != "" && !clean(p) {
			return fail("%s %q is not a clean absolute path", field, p)
		}
	}
	if q.Size != "" {
		size, err := quantity.Bytes(q.Size)
		if err != nil {
			return fail("size %v", err)
		}
		q.size = uint64(size)
	}
	return q, nil
}

// clean reports whether a path is absolute, below the root and written in the one way that the guest compares.
func clean(p string) bool {
	return path.IsAbs(p) && p != "/" && path.Clean(p) == p && !strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) })
}
