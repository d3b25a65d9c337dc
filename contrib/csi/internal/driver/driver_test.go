package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/plugin/published"
)

func TestAPublishedVolumeIsFoundByTheMountsSource(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.stage(t, id, false)
	// kubelet's folder may be a link; containerd resolves the sources of mounts.
	link := filepath.Join(w.dir, "kubelet")
	if err := os.Symlink("pods", link); err != nil {
		t.Fatal(err)
	}
	w.publishAt(t, id, filepath.Join(link, "mount"), asReadOnly)
	v, err := w.Volumes.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	got, err := w.Published.Find(w.target("mount"))
	want := published.Volume{Name: id, Target: w.target("mount"), File: v.File, ReadOnly: true}
	if err != nil || got != want {
		t.Errorf("the record is %+v (%v), not %+v", got, err, want)
	}
	if info, err := os.Stat(w.target("mount")); err != nil || info.Mode() != fs.ModeDir {
		t.Errorf("the folder is %v (%v): a container without the plugin could write there", info.Mode(), err)
	}
	if len(w.devices.attached)+len(w.devices.bound) > 0 {
		t.Errorf("a mounted volume made devices %v, %v", w.devices.attached, w.devices.bound)
	}
	w.unpublishAt(t, id, filepath.Join(link, "mount"))
	if _, err := w.Published.Find(w.target("mount")); !errdefs.IsNotFound(err) {
		t.Errorf("the record is still there (%v)", err)
	}
	if err := w.remove(t, id); err != nil {
		t.Error(err)
	}
	if left := w.residue(t); len(left) > 0 {
		t.Errorf("there is still %q", left)
	}
}

// kubelet removes the folder after a call that failed, and calls again
// (removeMountDir, pkg/volume/csi/csi_mounter.go of Kubernetes v1.34.0).
func TestAFolderThatKubeletRemovedComesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.publishAt(t, id, w.target("a"))
	if err := os.Remove(w.target("a")); err != nil {
		t.Fatal(err)
	}
	w.publishAt(t, id, w.target("a"))
	if info, err := os.Stat(w.target("a")); err != nil || !info.IsDir() {
		t.Errorf("there is %v (%v)", info, err)
	}
}

func TestUnstageKeepsTheData(t *testing.T) {
	t.Parallel()
	for _, block := range []bool{false, true} {
		w := newWorld(t)
		id := w.create(t, "pvc-1").VolumeId
		v, err := w.Volumes.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(v.File, []byte("data"), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			w.stage(t, id, block)
			if w.devices.attached[v.File] != block {
				t.Errorf("block %v: attached is %v", block, w.devices.attached)
			}
			if _, err := w.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: w.staging()}); err != nil {
				t.Error(err)
			}
		}
		if data, err := os.ReadFile(v.File); err != nil || string(data) != "data" {
			t.Errorf("the disk has %q (%v)", data, err)
		}
	}
}

func TestWhatIsInUseIsNeitherDeletedNorExpanded(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		begin func(t *testing.T, w *world, id, file string)
		want  string
	}{
		"published": {func(t *testing.T, w *world, id, _ string) { w.publishAt(t, id, w.target("a")) }, "is published at"},
		"staged as a device": {func(t *testing.T, w *world, id, _ string) {
			w.stage(t, id, true)
		}, "is staged as a block device"},
		"published as a device": {func(t *testing.T, w *world, id, _ string) {
			w.stage(t, id, true)
			w.publishAt(t, id, w.target("a"), asBlock)
		}, "is published at"},
		"had by a sandbox": {func(t *testing.T, w *world, _, file string) {
			shim, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { shim.Close() })
			if err := unix.Flock(int(shim.Fd()), unix.LOCK_EX); err != nil {
				t.Fatal(err)
			}
		}, "a sandbox has its disk"},
		"behind a damaged record": {func(t *testing.T, w *world, id, _ string) {
			w.publishAt(t, id, w.target("a"))
			records, err := filepath.Glob(filepath.Join(string(w.Published), "*"))
			if err != nil || len(records) != 1 {
				t.Fatal(records, err)
			}
			if err := os.WriteFile(records[0], []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "unexpected end"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			id := w.create(t, "pvc-1").VolumeId
			v, err := w.Volumes.Get(id)
			if err != nil {
				t.Fatal(err)
			}
			test.begin(t, w, id, v.File)
			if err := w.remove(t, id); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Delete gives %v", err)
			}
			_, err = w.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 8 << 20}})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Expand gives %v", err)
			}
			if now, err := w.Volumes.Get(id); err != nil || now != v {
				t.Errorf("the volume is %v (%v)", now, err)
			}
			if info, err := os.Stat(v.File); err != nil || info.Size() != v.Bytes {
				t.Errorf("the disk is %v (%v)", info, err)
			}
		})
	}
}

func TestASecondPlaceIsRefusedToOneWriter(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.publishAt(t, id, w.target("a"))
	w.publishAt(t, id, w.target("b")) // ReadWriteOnce, while pods take turns
	once := func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = capability(false, singleWriter) }
	_, err := w.NodePublishVolume(t.Context(), w.publishRequest(id, w.target("c"), once))
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a ReadWriteOncePod volume is published for a second pod (%v)", err)
	}
}

// kubelet binds a device once more, in a folder of its own
// (pkg/volume/util/volumepathhandler of Kubernetes v1.34.0), and may call again then.
func TestKubeletsOwnBindIsNoSecondPlace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.stage(t, id, true)
	once := func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = capability(true, singleWriter) }
	w.publishAt(t, id, w.target("b"), once)
	v, err := w.Volumes.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	w.devices.bound[w.target("a")] = v.File
	w.publishAt(t, id, w.target("b"), once)
}

func TestAPlaceIsNotPublishedOtherwise(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id, other := w.create(t, "pvc-1").VolumeId, w.create(t, "pvc-2").VolumeId
	w.stage(t, id, true)
	w.publishAt(t, id, w.target("a"))
	before := w.residue(t)
	for name, r := range map[string]*csi.NodePublishVolumeRequest{
		"read-only":         w.publishRequest(id, w.target("a"), asReadOnly),
		"as a block device": w.publishRequest(id, w.target("a"), asBlock),
		"of another volume": w.publishRequest(other, w.target("a")),
	} {
		if _, err := w.NodePublishVolume(t.Context(), r); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := w.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: other, TargetPath: w.target("a")}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a volume's place is unpublished for another (%v)", err)
	}
	if diff := cmp.Diff(before, w.residue(t)); diff != "" {
		t.Errorf("something has changed:\n%s", diff)
	}
}

// kubelet calls with whatever is in the pod's folder, which the pod's user may
// reach by other volumes.
func TestAttackTargetsThatAreSomethingElse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.stage(t, id, true)
	victim := w.target("victim")
	if err := errors.Join(os.Mkdir(victim, 0o700), os.Symlink("victim", w.target("link")), os.WriteFile(w.target("file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]*csi.NodePublishVolumeRequest{
		"a link in a folder's place": w.publishRequest(id, w.target("link")),
		"a file in a folder's place": w.publishRequest(id, w.target("file")),
		"a link in a file's place":   w.publishRequest(id, w.target("link"), asBlock),
		"a folder in a file's place": w.publishRequest(id, victim, asBlock),
	} {
		if _, err := w.NodePublishVolume(t.Context(), r); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if records, err := w.Published.List(); err != nil || len(records) > 0 || len(w.devices.bound) > 0 {
		t.Errorf("there are records %v (%v) and mounts %v", records, err, w.devices.bound)
	}
}

func TestFilesInATargetAreNotDeleted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.publishAt(t, id, w.target("a"))
	file := filepath.Join(w.target("a"), "of-a-container-that-had-no-plugin")
	if err := errors.Join(os.Chmod(w.target("a"), 0o700), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err := w.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: w.target("a")})
	if err == nil || !strings.Contains(err.Error(), "these files are not of it") {
		t.Errorf("got %v", err)
	}
	if _, err := w.Published.Find(w.target("a")); err != nil {
		t.Errorf("the record is gone, so that a container would write there: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
	w.unpublishAt(t, id, w.target("a"))
}

// kubelet makes the folders of a subPath before the plugin refuses the container.
func TestUnpublishRemovesTheEmptyFoldersOfASubPath(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.publishAt(t, id, w.target("a"))
	if err := errors.Join(os.Chmod(w.target("a"), 0o700), os.MkdirAll(filepath.Join(w.target("a"), "x/y"), 0o700), os.Mkdir(filepath.Join(w.target("a"), "z"), 0o700)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(w.target("a"), "x/y/file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := w.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: w.target("a")})
	if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "these files are not of it") {
		t.Errorf("got %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
	w.unpublishAt(t, id, w.target("a"))
	if _, err := os.Lstat(w.target("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the target is still there (%v)", err)
	}
}

func TestAFailedPublishLeavesNothing(t *testing.T) {
	t.Parallel()
	loosen := func(w *world) error {
		return errors.Join(os.MkdirAll(string(w.Published), 0o700), os.Chmod(string(w.Published), 0o755))
	}
	for name, test := range map[string]struct {
		change func(*csi.NodePublishVolumeRequest)
		spoil  func(w *world) error
	}{
		"a mount whose record cannot be written":  {func(*csi.NodePublishVolumeRequest) {}, loosen},
		"a mount without a folder above":          {func(r *csi.NodePublishVolumeRequest) { r.TargetPath += "/absent/mount" }, func(*world) error { return nil }},
		"a device that cannot be bound":           {asBlock, func(w *world) error { w.devices.broken = "bind"; return nil }},
		"a device that is not staged":             {asBlock, func(w *world) error { clear(w.devices.attached); return nil }},
		"a node that cannot be asked":             {asBlock, func(w *world) error { w.devices.broken = "state"; return nil }},
		"an inline volume without record":         {asInline, loosen},
		"an inline volume without a folder above": {func(r *csi.NodePublishVolumeRequest) { asInline(r); r.TargetPath += "/absent/mount" }, func(*world) error { return nil }},
		"an inline volume that does not fit":      {func(r *csi.NodePublishVolumeRequest) { asInline(r); r.VolumeContext[sizeKey] = "1Ti" }, func(*world) error { return nil }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			id := w.create(t, "pvc-1").VolumeId
			w.stage(t, id, true)
			if err := test.spoil(w); err != nil {
				t.Fatal(err)
			}
			before := w.residue(t)
			if _, err := w.NodePublishVolume(t.Context(), w.publishRequest(id, w.target("a"), test.change)); err == nil {
				t.Fatal("it is published")
			}
			if diff := cmp.Diff(before, w.residue(t)); diff != "" {
				t.Errorf("something is left:\n%s", diff)
			}
		})
	}
}

// kubelet's id of a volume of a pod's manifest: "csi-" and the hex SHA-256 of pod and volume,
// pkg/volume/csi/csi_mounter.go of Kubernetes v1.34.0.
var inlineHandle = "csi-" + strings.Repeat("0123456789abcdef", 4)

func TestAVolumeOfAPodsManifestGoesWithIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for range 2 {
		w.publishAt(t, inlineHandle, w.target("a"), asInline)
	}
	record, err := w.Published.Find(w.target("a"))
	if err != nil {
		t.Fatal(err)
	}
	v, err := w.Volumes.Get(record.Name)
	if err != nil || v.File != record.File || v.Bytes != 4<<20 {
		t.Errorf("the volume is %+v (%v)", v, err)
	}
	if err := w.remove(t, record.Name); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("it can be deleted under its pod (%v)", err)
	}
	for range 2 {
		w.unpublishAt(t, inlineHandle, w.target("a"))
		if left := w.residue(t); len(left) > 0 {
			t.Errorf("there is still %q", left)
		}
	}
}

func TestUnpublishTriesAgainToDeleteAVolumeThatItsSandboxStillHas(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publishAt(t, inlineHandle, w.target("a"), asInline)
	v, err := w.get(inlineHandle)
	if err != nil {
		t.Fatal(err)
	}
	shim, err := os.Open(v.File)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(shim.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	_, err = w.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: inlineHandle, TargetPath: w.target("a")})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
	shim.Close()
	w.unpublishAt(t, inlineHandle, w.target("a"))
	if left := w.residue(t); len(left) > 0 {
		t.Errorf("there is still %q", left)
	}
}

func TestUnpublishDeletesNoOtherVolume(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, inlineHandle).VolumeId // somebody provisions one by that very name
	w.publishAt(t, id, w.target("a"))
	w.publishAt(t, inlineHandle, w.target("b"), asInline)
	w.unpublishAt(t, inlineHandle, w.target("b"))
	w.unpublishAt(t, id, w.target("a"))
	if _, err := w.Volumes.Get(id); err != nil {
		t.Errorf("a claim's volume went with a pod: %v", err)
	}
}

func TestPublishRefuses(t *testing.T) {
	t.Parallel()
	inline := func(change func(attributes map[string]string)) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { asInline(r); change(r.VolumeContext) }
	}
	size := func(text string) func(*csi.NodePublishVolumeRequest) {
		return inline(func(a map[string]string) { a[sizeKey] = text })
	}
	for name, test := range map[string]struct {
		change func(*csi.NodePublishVolumeRequest)
		is     func(error) bool
	}{
		"no volume":                       {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" }, errdefs.IsInvalidArgument},
		"a volume that climbs":            {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "../pvc-1" }, errdefs.IsInvalidArgument},
		"a volume with dots":              {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "pvc..1" }, errdefs.IsInvalidArgument},
		"a volume that is too long":       {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = strings.Repeat("a", 129) }, errdefs.IsInvalidArgument},
		"a volume that is not there":      {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "pvc-2" }, errdefs.IsNotFound},
		"no target":                       {func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "" }, errdefs.IsInvalidArgument},
		"a relative target":               {func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "a" }, errdefs.IsInvalidArgument},
		"a target that climbs":            {func(r *csi.NodePublishVolumeRequest) { r.TargetPath += "/../b" }, errdefs.IsInvalidArgument},
		"no staging path":                 {func(r *csi.NodePublishVolumeRequest) { r.StagingTargetPath = "" }, errdefs.IsFailedPrecondition},
		"no capability":                   {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, errdefs.IsInvalidArgument},
		"an unknown attribute":            {func(r *csi.NodePublishVolumeRequest) { r.VolumeContext = map[string]string{"fsType": "xfs"} }, errdefs.IsInvalidArgument},
		"a size of a claim":               {func(r *csi.NodePublishVolumeRequest) { r.VolumeContext = map[string]string{sizeKey: "1Gi"} }, errdefs.IsInvalidArgument},
		"half an inline volume":           {func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[ephemeralKey] = "maybe" }, errdefs.IsInvalidArgument},
		"a read-only block device":        {func(r *csi.NodePublishVolumeRequest) { asBlock(r); asReadOnly(r) }, errdefs.IsInvalidArgument},
		"an inline volume with no size":   {inline(func(a map[string]string) { delete(a, sizeKey) }), errdefs.IsInvalidArgument},
		"one with an unknown attribute":   {inline(func(a map[string]string) { a["encrypt"] = "no" }), errdefs.IsInvalidArgument},
		"one of a size that is none":      {size("big"), errdefs.IsInvalidArgument},
		"one of a negative size":          {size("-1Gi"), errdefs.IsInvalidArgument},
		"one of no size at all":           {size("0"), errdefs.IsInvalidArgument},
		"one of a fraction of a byte":     {size("1500m"), errdefs.IsInvalidArgument},
		"one of more bytes than can be":   {size("8Ei"), errdefs.IsInvalidArgument},
		"one of more bytes than there is": {size("2Gi"), errdefs.IsResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			id := w.create(t, "pvc-1").VolumeId
			before := w.residue(t)
			_, err := w.NodePublishVolume(t.Context(), w.publishRequest(id, w.target("a"), test.change))
			if !test.is(err) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff(before, w.residue(t)); diff != "" {
				t.Errorf("something is left:\n%s", diff)
			}
		})
	}
}

func TestCapabilities(t *testing.T) {
	t.Parallel()
	mount := func(m *csi.VolumeCapability_MountVolume) *csi.VolumeCapability {
		return &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: m}, AccessMode: &csi.VolumeCapability_AccessMode{Mode: writer},
		}
	}
	for name, c := range map[string]*csi.VolumeCapability{
		"ReadWriteOnce of old": capability(false, writer), "ReadWriteOnce": capability(false, multiWriter), "ReadWriteOncePod": capability(false, singleWriter),
		"a block device": capability(true, singleWriter), "ext4": mount(&csi.VolumeCapability_MountVolume{FsType: "ext4"}), "xfs": mount(&csi.VolumeCapability_MountVolume{FsType: "xfs"}),
	} {
		if err := checkCapability(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]*csi.VolumeCapability{
		"none":              nil,
		"no mode":           capability(false, csi.VolumeCapability_AccessMode_UNKNOWN),
		"read-only":         capability(false, csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY),
		"ReadOnlyMany":      capability(false, csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY),
		"ReadWriteMany":     capability(true, csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER),
		"one of many nodes": capability(false, csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER),
		"a mode to come":    capability(false, 99),
		"neither kind":      {AccessMode: &csi.VolumeCapability_AccessMode{Mode: writer}},
		"another system":    mount(&csi.VolumeCapability_MountVolume{FsType: "btrfs"}),
		"mount options":     mount(&csi.VolumeCapability_MountVolume{MountFlags: []string{"suid"}}),
		"a group":           mount(&csi.VolumeCapability_MountVolume{VolumeMountGroup: "0"}),
	} {
		if err := checkCapability(c); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(*csi.CreateVolumeRequest)
		is     func(error) bool
	}{
		"no name":       {func(r *csi.CreateVolumeRequest) { r.Name = "" }, errdefs.IsInvalidArgument},
		"a long name":   {func(r *csi.CreateVolumeRequest) { r.Name = strings.Repeat("a", 129) }, errdefs.IsInvalidArgument},
		"no capability": {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = nil }, errdefs.IsInvalidArgument},
		"a parameter":   {func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{"cipher": "none"} }, errdefs.IsInvalidArgument},
		"another":       {func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{"iops": "1"} }, errdefs.IsInvalidArgument},
		"a source":      {func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = &csi.VolumeContentSource{} }, errdefs.IsInvalidArgument},
		"another node":  {func(r *csi.CreateVolumeRequest) { r.AccessibilityRequirements = onNode("node-2") }, errdefs.IsResourceExhausted},
		"another topology": {func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{}}}
		}, errdefs.IsResourceExhausted},
		"too much": {func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 2 << 30 }, errdefs.IsResourceExhausted},
	} {
		w := newWorld(t)
		r := &csi.CreateVolumeRequest{
			Name: "pvc-1", VolumeCapabilities: []*csi.VolumeCapability{capability(false, writer)}, CapacityRange: &csi.CapacityRange{RequiredBytes: 4 << 20},
			Parameters: map[string]string{kubernetesPrefix + "pvc/name": "data"}, AccessibilityRequirements: onNode(nodeName),
		}
		test.change(r)
		if response, err := w.CreateVolume(t.Context(), r); !test.is(err) {
			t.Errorf("%s: got %v (%v)", name, response, err)
		}
		if left := w.residue(t); len(left) > 0 {
			t.Errorf("%s: there is %q", name, left)
		}
	}
}

func onNode(name string) *csi.TopologyRequirement {
	return &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"topology.coco-local-csi/node": name}}}}
}

func TestNamesThatAreNoLabelsGetIDsOfTheirOwn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	derived, err := idOf("A")
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]string{}
	for _, name := range []string{"pvc-1", "A", "a/../b", "Größe", strings.Repeat("n", 128), derived, inlineID("A"), "vol-x", strings.Repeat("a", 63)} {
		id := w.create(t, name).VolumeId
		if other, taken := ids[id]; taken {
			t.Errorf("%q and %q are the same volume %s", name, other, id)
		}
		ids[id] = name
		if again := w.create(t, name).VolumeId; again != id {
			t.Errorf("%q is %s and %s", name, id, again)
		}
		if err := w.remove(t, id); err != nil {
			t.Error(err)
		}
	}
	if ids["pvc-1"] != "pvc-1" {
		t.Errorf("a label does not stay what it is: %q", slices.Collect(maps.Keys(ids)))
	}
}

func TestCapacityIsThatOfThisNode(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.create(t, "pvc-1")
	for name, test := range map[string]struct {
		request *csi.GetCapacityRequest
		want    int64
	}{
		"in general":        {&csi.GetCapacityRequest{}, 1<<30 - 4<<20},
		"here":              {&csi.GetCapacityRequest{AccessibleTopology: onNode(nodeName).Requisite[0]}, 1<<30 - 4<<20},
		"elsewhere":         {&csi.GetCapacityRequest{AccessibleTopology: onNode("node-2").Requisite[0]}, 0},
		"of what cannot be": {&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{capability(false, csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)}}, 0},
	} {
		if response, err := w.GetCapacity(t.Context(), test.request); err != nil || response.AvailableCapacity != test.want {
			t.Errorf("%s: %v (%v), not %d", name, response, err, test.want)
		}
	}
}

func TestPagesGiveEachVolumeOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var want, got []string
	for i := range 5 {
		want = append(want, w.create(t, fmt.Sprintf("pvc-%d", i)).VolumeId)
	}
	request := &csi.ListVolumesRequest{MaxEntries: 2}
	for {
		response, err := w.ListVolumes(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range response.Entries {
			got = append(got, entry.Volume.VolumeId)
			if err := w.remove(t, entry.Volume.VolumeId); err != nil { // also the one that the token names
				t.Error(err)
			}
		}
		if request.StartingToken = response.NextToken; request.StartingToken == "" {
			break
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, token := range []string{"x", "after:", "after:../a"} {
		if _, err := w.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token}); !errdefs.IsAborted(err) {
			t.Errorf("token %q: got %v", token, err)
		}
	}
}

func TestStatsAreTheGuests(t *testing.T) {
	t.Parallel()
	size := []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: 4 << 20}}
	for name, test := range map[string]struct {
		told *sealvolv1.Volume
		err  error
		want []*csi.VolumeUsage
		is   func(error) bool
	}{
		"no pod runs yet": {nil, nil, size, nil},
		"an open volume": {&sealvolv1.Volume{State: "open", Usage: &sealvolv1.Usage{TotalBytes: 100, UsedBytes: 30, AvailableBytes: 60, TotalInodes: 9, FreeInodes: 7}}, nil,
			[]*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: 100, Used: 30, Available: 60}, {Unit: csi.VolumeUsage_INODES, Total: 9, Used: 2, Available: 7}}, nil},
		"a volume between two containers": {&sealvolv1.Volume{State: "closed"}, nil, size, nil},
		"a guest that does not answer":    {nil, errdefs.ErrUnavailable, nil, errdefs.IsUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.publishAt(t, w.create(t, "pvc-1").VolumeId, w.target("a"))
			w.publishAt(t, inlineHandle, w.target("b"), asInline)
			w.guests.err = test.err
			if test.told != nil {
				w.guests.volumes["pvc-1"], w.guests.volumes[inlineID(inlineHandle)] = test.told, test.told
			}
			for _, r := range []*csi.NodeGetVolumeStatsRequest{{VolumeId: "pvc-1", VolumePath: w.target("a")}, {VolumeId: inlineHandle, VolumePath: w.target("b")}} {
				response, err := w.NodeGetVolumeStats(t.Context(), r)
				if test.is != nil {
					if !test.is(err) {
						t.Errorf("%s: got %v", r.VolumeId, err)
					}
					continue
				}
				if err != nil || !slices.EqualFunc(response.Usage, test.want, func(a, b *csi.VolumeUsage) bool { return a.String() == b.String() }) {
					t.Errorf("%s: got %v (%v), not %v", r.VolumeId, response, err, test.want)
				}
			}
			if _, err := w.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: "pvc-1", VolumePath: w.target("b")}); !errdefs.IsNotFound(err) {
				t.Errorf("at another's place: %v", err)
			}
		})
	}
}

// Whoever runs in a guest may answer for it.
func TestAttackAGuestsNumbersThatCannotBe(t *testing.T) {
	t.Parallel()
	for name, usage := range map[string]*sealvolv1.Usage{
		"more than the disk":      {TotalBytes: 4<<20 + 1},
		"a negative total":        {TotalBytes: 1 << 63},
		"more used than there is": {TotalBytes: 100, UsedBytes: 101},
		"more free than there is": {TotalBytes: 100, AvailableBytes: 101},
		"more inodes free":        {TotalBytes: 100, TotalInodes: 1, FreeInodes: 2},
		"negative inodes":         {TotalBytes: 100, TotalInodes: 1 << 63},
	} {
		if shown, err := show(usage, 4<<20); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: got %v (%v)", name, shown, err)
		}
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		spoil func(w *world, file string) error
		want  string // reason, "" for a healthy one
	}{
		"without a pod": {func(*world, string) error { return nil }, ""},
		"open": {func(w *world, _ string) error {
			w.guests.volumes["pvc-1"] = &sealvolv1.Volume{State: "open"}
			return nil
		}, ""},
		"degraded": {func(w *world, _ string) error {
			w.guests.volumes["pvc-1"] = &sealvolv1.Volume{State: "degraded", Faults: &sealvolv1.Faults{Count: 3, FirstOperation: "read"}}
			return nil
		}, "IOErrors"},
		"failed": {func(w *world, _ string) error {
			w.guests.volumes["pvc-1"] = &sealvolv1.Volume{State: "failed", Error: "tag mismatch"}
			return nil
		}, "SealingFailed"},
		"with a guest that does not answer": {func(w *world, _ string) error { w.guests.err = errdefs.ErrUnavailable; return nil }, "GuestSilent"},
		"without its disk":                  {func(_ *world, file string) error { return os.Remove(file) }, "DiskLost"},
		"with half its disk":                {func(_ *world, file string) error { return os.Truncate(file, 4096) }, "DiskCutShort"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			v, err := w.Volumes.Get(w.create(t, "pvc-1").VolumeId)
			if err != nil {
				t.Fatal(err)
			}
			if err := test.spoil(w, v.File); err != nil {
				t.Fatal(err)
			}
			node, err := w.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: "pvc-1"})
			if err != nil {
				t.Fatal(err)
			}
			controller, err := w.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: "pvc-1"})
			if err != nil {
				t.Fatal(err)
			}
			list, err := w.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{})
			if err != nil {
				t.Fatal(err)
			}
			for _, health := range append(list.Entries, node.VolumeHealth, controller.VolumeHealth) {
				got := ""
				if len(health.HealthStatuses) > 0 {
					got = health.HealthStatuses[0].Reason
				}
				if got != test.want || health.VolumeId != "pvc-1" {
					t.Errorf("%s has %q, not %q", health.VolumeId, got, test.want)
				}
			}
			if sick := len(list.Entries) == 1; sick != (test.want != "") {
				t.Errorf("the list of sick volumes is %v", list.Entries)
			}
		})
	}
}

func TestAStartBringsRecordsAndVolumesTogether(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := w.create(t, "pvc-1").VolumeId
	w.publishAt(t, id, w.target("a"))
	w.publishAt(t, id, w.target("d"))
	w.publishAt(t, "csi-1", w.target("b"), asInline)
	w.publishAt(t, "csi-2", w.target("c"), asInline)
	orphan, err := w.get("csi-2")
	if err != nil {
		t.Fatal(err)
	}
	kept, err := w.get("csi-1")
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		w.Published.Remove(w.target("c")), // a boot
		os.Remove(w.target("d")),
		w.Published.Write(published.Volume{Name: "gone", Target: "/gone", File: filepath.Join(w.dir, "volumes/gone/disk.img")}),
		w.Published.Write(published.Volume{Name: "theirs", Target: "/theirs", File: "/var/lib/other/disk.img"}),
	)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.Reconcile(); err != nil {
			t.Fatal(err)
		}
		for target, want := range map[string]bool{w.target("a"): true, w.target("b"): true, w.target("d"): false, "/gone": false, "/theirs": true} {
			if _, err := w.Published.Find(target); (err == nil) != want {
				t.Errorf("the record of %s: %v", target, err)
			}
		}
		for id, want := range map[string]bool{id: true, kept.ID: true, orphan.ID: false} {
			if _, err := w.Volumes.Get(id); (err == nil) != want {
				t.Errorf("volume %s: %v", id, err)
			}
		}
	}
}

// With a record that cannot be read nobody knows what is published.
func TestAStartWithADamagedRecordDeletesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.publishAt(t, "csi-1", w.target("a"), asInline)
	v, err := w.get("csi-1")
	if err != nil {
		t.Fatal(err)
	}
	records, err := filepath.Glob(filepath.Join(string(w.Published), "*"))
	if err != nil || len(records) != 1 {
		t.Fatal(records, err)
	}
	if err := os.Truncate(records[0], 10); err != nil {
		t.Fatal(err)
	}
	if err := w.Reconcile(); err != nil {
		t.Error(err)
	}
	if _, err := w.Volumes.Get(v.ID); err != nil {
		t.Errorf("the volume of a running pod is gone: %v", err)
	}
}

// Several callers make, publish, unpublish and delete the same volumes at once, as
// kubelet and the sidecars may after timeouts. What is published is never deleted,
// and nothing is left at the end.
func TestManyCallersAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var work sync.WaitGroup
	for caller := range 6 {
		target := w.target(fmt.Sprintf("pod-%d", caller))
		work.Go(func() {
			ctx := context.Background()
			// again calls until no other call for the volume is under way.
			again := func(call func() error) error {
				for {
					if err := call(); !errdefs.IsAborted(err) {
						return err
					}
				}
			}
			for round := range 10 {
				name := fmt.Sprintf("pvc-%d", round%2)
				block := round%3 == 0
				if err := again(func() error {
					_, err := w.CreateVolume(ctx, &csi.CreateVolumeRequest{
						Name: name, VolumeCapabilities: []*csi.VolumeCapability{capability(block, writer)}, CapacityRange: &csi.CapacityRange{RequiredBytes: 4 << 20},
					})
					return err
				}); err != nil {
					t.Error(err)
				}
				err := again(func() error {
					_, err := w.NodePublishVolume(ctx, w.publishRequest(name, target))
					return err
				})
				if err != nil && !errdefs.IsNotFound(err) { // another has deleted it
					t.Error(err)
				}
				if err == nil {
					if err := again(func() error { return w.remove(t, name) }); !errdefs.IsFailedPrecondition(err) {
						t.Errorf("a published volume is deleted: %v", err)
					}
					if v, err := w.Published.Find(target); err != nil {
						t.Errorf("%v (%v)", v, err)
					}
				}
				if err := again(func() error {
					_, err := w.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: name, TargetPath: target})
					return err
				}); err != nil {
					t.Error(err)
				}
				if err := again(func() error { return w.remove(t, name) }); err != nil && !errdefs.IsFailedPrecondition(err) {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	for _, name := range []string{"pvc-0", "pvc-1"} {
		if err := w.remove(t, name); err != nil {
			t.Error(err)
		}
	}
	if left := w.residue(t); len(left) > 0 {
		t.Errorf("there is still %q", left)
	}
}

func TestTwoCallsForAVolumeAtOnceAreAborted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.create(t, "pvc-1")
	release, err := w.busy.take("pvc-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.remove(t, "pvc-1"); !errdefs.IsAborted(err) {
		t.Errorf("got %v", err)
	}
	w.create(t, "pvc-2") // another volume does not wait
	release()
	if err := w.remove(t, "pvc-1"); err != nil {
		t.Error(err)
	}
}

func TestErrorsHaveTheStatusOfTheirClass(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	socket := filepath.Join(w.dir, "csi.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- w.Serve(ctx, l) }()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	controller := csi.NewControllerClient(conn)
	for id, want := range map[string]codes.Code{"../a": codes.InvalidArgument, "absent": codes.NotFound} {
		if _, err := controller.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id}); status.Code(err) != want {
			t.Errorf("%q: %v, not %v", id, err, want)
		}
	}
	// What is wrong in several places is one line all the same.
	w.create(t, "pvc-1")
	for _, name := range []string{"0", "1"} {
		if err := errors.Join(os.MkdirAll(string(w.Published), 0o700), os.WriteFile(filepath.Join(string(w.Published), strings.Repeat(name, 64)), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	_, err = controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "pvc-1"})
	if status.Code(err) != codes.DataLoss || strings.Count(err.Error(), "unexpected end") != 2 || strings.Contains(err.Error(), "\n") {
		t.Errorf("two damaged records give %q", err)
	}
	if _, err := controller.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a snapshot gives %v", err)
	}
	conn.Close()
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
