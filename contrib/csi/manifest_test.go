package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// manifest is what contrib/kubernetes/csi.yaml holds, in Kubernetes' own types.
type manifest struct {
	driver    storagev1.CSIDriver
	namespace corev1.Namespace
	class     storagev1.StorageClass
	daemonSet appsv1.DaemonSet
}

func readManifest(t *testing.T) (m manifest) {
	t.Helper()
	text, err := os.ReadFile("../kubernetes/csi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, document := range bytes.Split(text, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(document, &kind); err != nil {
			t.Fatal(err)
		}
		into := map[string]any{
			"storage.k8s.io/v1 CSIDriver": &m.driver, "storage.k8s.io/v1 StorageClass": &m.class, "apps/v1 DaemonSet": &m.daemonSet,
			"v1 Namespace": &m.namespace, "v1 ServiceAccount": &corev1.ServiceAccount{},
			"rbac.authorization.k8s.io/v1 ClusterRole": &rbacv1.ClusterRole{}, "rbac.authorization.k8s.io/v1 ClusterRoleBinding": &rbacv1.ClusterRoleBinding{},
			"rbac.authorization.k8s.io/v1 Role": &rbacv1.Role{}, "rbac.authorization.k8s.io/v1 RoleBinding": &rbacv1.RoleBinding{},
		}[kind.APIVersion+" "+kind.Kind]
		if into == nil {
			t.Fatalf("%s %s is no kind that is known here", kind.APIVersion, kind.Kind)
		}
		if err := yaml.UnmarshalStrict(document, into); err != nil {
			t.Errorf("%s: %v", kind.Kind, err)
		}
		kinds = append(kinds, kind.Kind)
	}
	if len(kinds) != 9 {
		t.Errorf("there are %q", kinds)
	}
	return m
}

func TestManifestsFitTheDriver(t *testing.T) {
	t.Parallel()
	m, c := readManifest(t), defaultConfig()
	if m.driver.Name != c.driver || m.class.Name != c.driver || m.class.Provisioner != c.driver {
		t.Errorf("driver %q, class %q of %q: the program says %q", m.driver.Name, m.class.Name, m.class.Provisioner, c.driver)
	}
	spec := m.driver.Spec
	if *spec.AttachRequired || !*spec.PodInfoOnMount || !*spec.StorageCapacity || *spec.SELinuxMount || *spec.FSGroupPolicy != storagev1.NoneFSGroupPolicy {
		t.Errorf("the driver is said to be %+v", spec)
	}
	if want := []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecyclePersistent, storagev1.VolumeLifecycleEphemeral}; !slices.Equal(spec.VolumeLifecycleModes, want) {
		t.Errorf("the driver is for %q, not for %q", spec.VolumeLifecycleModes, want)
	}
	if *m.class.VolumeBindingMode != storagev1.VolumeBindingWaitForFirstConsumer || *m.class.ReclaimPolicy != corev1.PersistentVolumeReclaimDelete {
		t.Errorf("the class binds %s and reclaims by %s", *m.class.VolumeBindingMode, *m.class.ReclaimPolicy)
	}
	var hosts, arguments []string
	for _, v := range m.daemonSet.Spec.Template.Spec.Volumes {
		hosts = append(hosts, v.HostPath.Path)
	}
	pinned := regexp.MustCompile(`:v\d+\.\d+\.\d+$`)
	for _, container := range m.daemonSet.Spec.Template.Spec.Containers {
		if !pinned.MatchString(container.Image) {
			t.Errorf("image %s is not pinned to a version", container.Image)
		}
		if context := container.SecurityContext; context == nil || context.Privileged == nil || !*context.Privileged {
			t.Errorf("SELinux keeps %s from the driver's socket", container.Name)
		}
		arguments = append(arguments, container.Args...)
	}
	if level := m.namespace.Labels["pod-security.kubernetes.io/enforce"]; level != "privileged" || m.daemonSet.Namespace != m.namespace.Name {
		t.Errorf("namespace %q, for pods of %q, is %q: a cluster with another default refuses the sidecars", m.namespace.Name, m.daemonSet.Namespace, level)
	}
	if !slices.Contains(hosts, filepath.Dir(c.socket)) {
		t.Errorf("the sidecars see %q, not the folder of %s", hosts, c.socket)
	}
	for _, want := range []string{"--csi-address=/csi/" + filepath.Base(c.socket), "--kubelet-registration-path=" + c.socket, "--node-deployment"} {
		if !slices.Contains(arguments, want) {
			t.Errorf("no sidecar has %s", want)
		}
	}
}

// Kubernetes takes the volumes of the driver's help as they are written.
func TestHelpsExamplesAreVolumes(t *testing.T) {
	t.Parallel()
	_, rest, _ := strings.Cut(usage, "volumes:\n")
	ephemeral, rest, _ := strings.Cut(rest, "\n\n")
	_, rest, _ = strings.Cut(rest, "\n\n")
	inline, _, _ := strings.Cut(rest, "\n\n")
	var pod corev1.PodSpec
	if err := yaml.UnmarshalStrict([]byte("containers: []\nvolumes:\n"+ephemeral+"\n"+inline), &pod); err != nil {
		t.Fatal(err)
	}
	if len(pod.Volumes) != 2 || pod.Volumes[0].Ephemeral == nil || *pod.Volumes[0].Ephemeral.VolumeClaimTemplate.Spec.StorageClassName != "coco-local-csi" ||
		pod.Volumes[1].CSI == nil || pod.Volumes[1].CSI.Driver != "coco-local-csi" {
		t.Errorf("the examples are %+v", pod.Volumes)
	}
}
