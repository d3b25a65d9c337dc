// Package sandboxes asks the guest that has a volume about it.
//
// Hotplug requests and policies have different names for a volume. What belongs
// together is seen in the bundles of the containers: the bind mount whose source
// is that of a hotplug request (hotplug.Source) says in which sandbox, container
// and place the volume is, and the guest says the same of its volumes.
//
// It may import contrib/internal/guest, guest/api and shim/hotplug, and nothing
// else of the project.
package sandboxes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sealvol/sealvol/contrib/internal/guest"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	// Bundles is where containerd keeps the bundles of its containers, below a folder for each namespace.
	Bundles = "/run/containerd/io.containerd.runtime.v2.task"

	// Annotations of containerd's CRI plugin, internal/cri/annotations.
	containerName = "io.kubernetes.cri.container-name"
	sandboxID     = "io.kubernetes.cri.sandbox-id"
	podUID        = "io.kubernetes.cri.sandbox-uid"

	maxSpec = 8 << 20 // bytes of a config.json
)

var podRE = regexp.MustCompile(`/pods/([^/]+)/volumes/kubernetes\.io~csi/[^/]+/mount$`)

// Sandboxes are the sandboxes of a node.
type Sandboxes struct {
	// Bundles is [Bundles] but in tests.
	Bundles string
	Node    guest.Node
	// Timeout limits what a guest may take for its answer.
	Timeout time.Duration
}

// place is where a container has a volume.
type place struct{ sandbox, container, path string }

// Volume asks the guest that has the volume of that name in hotplug requests, which
// is published at the targets, in kubelet's folders of pods: the sandbox must be one
// of these pods', since any pod may give a volume that name. One that no container of
// theirs has, and one with no such target, is an errdefs.ErrNotFound; where a container
// has it and its guest does not answer or does not know it, the error is an
// errdefs.ErrUnavailable.
func (s Sandboxes) Volume(ctx context.Context, name string, targets []string) (*sealvolv1.Volume, error) {
	p, err := s.find(name, targets)
	if err != nil {
		return nil, err
	}
	v, err := s.ask(ctx, p)
	if err != nil {
		// Its class must not show: a sandbox that is not found is no volume that nobody has.
		return nil, fmt.Errorf("sandbox %s: %v: %w", p.sandbox, err, errdefs.ErrUnavailable)
	}
	return v, nil
}

func (s Sandboxes) ask(ctx context.Context, p place) (*sealvolv1.Volume, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	sandbox, err := s.Node.Find(p.sandbox)
	if err != nil {
		return nil, err
	}
	cid, err := sandbox.CID(ctx)
	if err != nil {
		return nil, err
	}
	var status *sealvolv1.StatusResponse
	err = s.Node.Ask(ctx, cid, func(c sealvolv1.ControlService) (err error) {
		status, err = c.Status(ctx, &sealvolv1.StatusRequest{})
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, v := range status.GetVolumes() {
		if slices.ContainsFunc(v.GetMounts(), func(m *sealvolv1.Mount) bool { return m.GetContainer() == p.container && m.GetPath() == p.path }) {
			return v, nil
		}
	}
	return nil, fmt.Errorf("its guest has no volume at %q of container %q now", p.path, p.container)
}

// find finds a container that has the volume.
func (s Sandboxes) find(name string, targets []string) (place, error) {
	pods := podsOf(targets)
	if len(pods) == 0 {
		return place{}, fmt.Errorf("no pod has volume %q: %w", name, errdefs.ErrNotFound)
	}
	paths, err := filepath.Glob(filepath.Join(s.Bundles, "*", "*", "config.json"))
	if err != nil {
		return place{}, err
	}
	var unread []error // the container may be one of these, but it is not if another is found
	for _, path := range paths {
		spec, err := readSpec(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the container has ended meanwhile
		}
		if err != nil {
			unread = append(unread, fmt.Errorf("%s: %w", path, err))
			continue
		}
		if !slices.Contains(pods, spec.Annotations[podUID]) {
			continue
		}
		sandbox := spec.Annotations[sandboxID]
		for _, m := range spec.Mounts {
			if m.Source == hotplug.Source(sandbox, name) {
				return place{sandbox, spec.Annotations[containerName], m.Destination}, nil
			}
		}
	}
	if len(unread) > 0 {
		return place{}, fmt.Errorf("containers that cannot be read: %w: %w", errors.Join(unread...), errdefs.ErrUnavailable)
	}
	return place{}, fmt.Errorf("no container has volume %q: %w", name, errdefs.ErrNotFound)
}

// podsOf gives the UIDs of the pods in whose folders of kubelet's the targets are:
// …/pods/UID/volumes/kubernetes.io~csi/NAME/mount.
func podsOf(targets []string) (pods []string) {
	for _, target := range targets {
		if m := podRE.FindStringSubmatch(target); m != nil {
			pods = append(pods, m[1])
		}
	}
	return pods
}

// readSpec reads the specification of a container. The file is another program's,
// so what is not known here is not minded.
func readSpec(path string) (specs.Spec, error) {
	file, err := os.Open(path)
	if err != nil {
		return specs.Spec{}, err
	}
	defer file.Close()
	var text strings.Builder
	if _, err := io.Copy(&text, io.LimitReader(file, maxSpec)); err != nil {
		return specs.Spec{}, err
	}
	var spec specs.Spec
	if err := json.Unmarshal([]byte(text.String()), &spec); err != nil {
		return specs.Spec{}, err
	}
	return spec, nil
}
