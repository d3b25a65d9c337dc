package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/contrib/csi/internal/store"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/plugin/published"
)

var errBroken = errors.New("broken")

// fakeDevices are loop devices and mounts in memory. The step named by broken fails.
type fakeDevices struct {
	mu       sync.Mutex
	broken   string
	attached map[string]bool
	bound    map[string]string // file by target
}

func (f *fakeDevices) do(step string, work func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken == step {
		return errBroken
	}
	work()
	return nil
}

func (f *fakeDevices) Attach(file string) error {
	return f.do("attach", func() { f.attached[file] = true })
}

func (f *fakeDevices) Detach(file string) error {
	return f.do("detach", func() { delete(f.attached, file) })
}

func (f *fakeDevices) Bind(file, target string) (err error) {
	return errors.Join(f.do("bind", func() {
		if !f.attached[file] {
			err = errdefs.ErrFailedPrecondition
			return
		}
		f.bound[target] = file
	}), err)
}

func (f *fakeDevices) Unbind(target string) error {
	return f.do("unbind", func() { delete(f.bound, target) })
}

func (f *fakeDevices) State(file string) (attached bool, targets []string, err error) {
	err = f.do("state", func() {
		attached = f.attached[file]
		for target, bound := range f.bound {
			if bound == file {
				targets = append(targets, target)
			}
		}
	})
	slices.Sort(targets)
	return attached, targets, err
}

// fakeGuests knows volumes by their names in hotplug requests.
type fakeGuests struct {
	volumes map[string]*sealvolv1.Volume
	err     error
}

func (f *fakeGuests) Volume(_ context.Context, name string, _ []string) (*sealvolv1.Volume, error) {
	if f.err != nil {
		return nil, f.err
	}
	if v, ok := f.volumes[name]; ok {
		return v, nil
	}
	return nil, fmt.Errorf("no container has %q: %w", name, errdefs.ErrNotFound)
}

// world is a driver on a node of its own.
type world struct {
	*Driver
	devices *fakeDevices
	guests  *fakeGuests
	dir     string
}

const nodeName = "node-1"

func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	volumes, err := store.Open(filepath.Join(dir, "volumes"), 1<<30, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { volumes.Close() })
	for _, name := range []string{"pods", "staging"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{
		devices: &fakeDevices{attached: map[string]bool{}, bound: map[string]string{}},
		guests:  &fakeGuests{volumes: map[string]*sealvolv1.Volume{}},
		dir:     dir,
	}
	w.Driver = &Driver{
		Name: "coco-local-csi", Version: "test", Node: nodeName, Volumes: volumes, Published: published.Dir(filepath.Join(dir, "published")),
		Devices: w.devices, Guests: w.guests, Log: log,
	}
	return w
}

// target is a path that kubelet would want a volume at.
func (w *world) target(name string) string { return filepath.Join(w.dir, "pods", name) }

func (w *world) staging() string { return filepath.Join(w.dir, "staging") }

func capability(block bool, mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	c := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
	if block {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	}
	return c
}

const (
	writer       = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	singleWriter = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	multiWriter  = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
)

func (w *world) create(t *testing.T, name string) *csi.Volume {
	t.Helper()
	response, err := w.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: name, VolumeCapabilities: []*csi.VolumeCapability{capability(false, writer)}, CapacityRange: &csi.CapacityRange{RequiredBytes: 4 << 20},
	})
	if err != nil {
		t.Fatal(err)
	}
	return response.Volume
}

func (w *world) publishRequest(id, target string, change ...func(*csi.NodePublishVolumeRequest)) *csi.NodePublishVolumeRequest {
	r := &csi.NodePublishVolumeRequest{
		VolumeId: id, TargetPath: target, StagingTargetPath: w.staging(), VolumeCapability: capability(false, multiWriter),
		VolumeContext: map[string]string{kubernetesPrefix + "pod.name": "web", provisionerKey: "1700000000000-1234-coco-local-csi"},
	}
	for _, c := range change {
		c(r)
	}
	return r
}

func asBlock(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = capability(true, multiWriter) }
func asReadOnly(r *csi.NodePublishVolumeRequest) {
	r.Readonly = true
}

// asInline makes it a request as kubelet has it for a volume of a pod's manifest.
func asInline(r *csi.NodePublishVolumeRequest) {
	r.StagingTargetPath = ""
	r.VolumeCapability = capability(false, singleWriter)
	r.VolumeContext = map[string]string{ephemeralKey: "true", sizeKey: "4Mi", kubernetesPrefix + "pod.uid": "1"}
}

func (w *world) publishAt(t *testing.T, id, target string, change ...func(*csi.NodePublishVolumeRequest)) {
	t.Helper()
	if _, err := w.NodePublishVolume(t.Context(), w.publishRequest(id, target, change...)); err != nil {
		t.Fatal(err)
	}
}

func (w *world) unpublishAt(t *testing.T, id, target string) {
	t.Helper()
	if _, err := w.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target}); err != nil {
		t.Fatal(err)
	}
}

func (w *world) stage(t *testing.T, id string, block bool) {
	t.Helper()
	_, err := w.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: w.staging(), VolumeCapability: capability(block, multiWriter)})
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) remove(t *testing.T, id string) error {
	t.Helper()
	_, err := w.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

// residue is all that is on the node: volumes, records, targets, devices, mounts.
func (w *world) residue(t *testing.T) (found []string) {
	t.Helper()
	for _, pattern := range []string{"volumes/*/*", "volumes/.*", "published/*", "published/.*", "pods/*"} {
		paths, err := filepath.Glob(filepath.Join(w.dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, paths...)
	}
	for file := range w.devices.attached {
		found = append(found, "loop device of "+file)
	}
	for target := range w.devices.bound {
		found = append(found, "mount on "+target)
	}
	return found
}
