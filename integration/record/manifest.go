package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

// A template is what a manifest says of one pod.
type template struct {
	kind, name string // of the object that has it
	meta       metav1.ObjectMeta
	spec       corev1.PodSpec
}

// A manifest is what one file says.
type manifest struct {
	pods       []template
	configMaps map[string]corev1.ConfigMap
	secrets    map[string]corev1.Secret
}

func readManifest(file string) (*manifest, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	m := &manifest{configMaps: map[string]corev1.ConfigMap{}, secrets: map[string]corev1.Secret{}}
	documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		object, err := sigsyaml.YAMLToJSON(document)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if err := m.add(object); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
}

// add takes what pods need of an object, a JSON document. All kinds of workload have their template in one of three places.
func (m *manifest) add(object []byte) error {
	var o struct {
		metav1.TypeMeta
		Metadata metav1.ObjectMeta
		Items    []json.RawMessage
		Spec     struct {
			corev1.PodSpec
			Template    *corev1.PodTemplateSpec
			JobTemplate struct {
				Spec struct {
					Template *corev1.PodTemplateSpec
				}
			}
			VolumeClaimTemplates []corev1.PersistentVolumeClaim
		}
	}
	var err error
	switch kind := kindOf(object); kind {
	case "ConfigMap":
		var c corev1.ConfigMap
		err = json.Unmarshal(object, &c)
		m.configMaps[c.Name] = c
		return err
	case "Secret":
		var s corev1.Secret
		err = json.Unmarshal(object, &s)
		m.secrets[s.Name] = s
		return err
	case "", "Service", "ServiceAccount", "PersistentVolumeClaim":
		return nil
	}
	if err := json.Unmarshal(object, &o); err != nil {
		return err
	}
	for _, item := range o.Items {
		if err := m.add(item); err != nil {
			return err
		}
	}
	if o.Kind == "List" {
		return nil
	}
	t := template{kind: o.Kind, name: o.Metadata.Name + o.Metadata.GenerateName, meta: o.Metadata, spec: o.Spec.PodSpec}
	for _, inner := range []*corev1.PodTemplateSpec{o.Spec.Template, o.Spec.JobTemplate.Spec.Template} {
		if inner != nil {
			t.meta, t.spec = inner.ObjectMeta, inner.Spec
			t.meta.Namespace = o.Metadata.Namespace
		}
	}
	if t.spec.RuntimeClassName == nil || *t.spec.RuntimeClassName != "kata" {
		return nil
	}
	// A stateful set's controller adds the claims to the pod's volumes.
	for _, claim := range o.Spec.VolumeClaimTemplates {
		t.spec.Volumes = append(t.spec.Volumes, corev1.Volume{Name: claim.Name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim.Name},
		}})
	}
	m.pods = append(m.pods, t)
	return nil
}

func kindOf(object []byte) string {
	var t metav1.TypeMeta
	if json.Unmarshal(object, &t) != nil {
		return ""
	}
	return t.Kind
}
