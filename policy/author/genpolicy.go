package author

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/policy"
)

// Kata's genpolicy writes Rego whose rules compare each request with the object policy_data at its end. The agent evaluates them on what
// the guest's gate hands on: there a sealed volume is a bind mount from volumesDir, and its storage is gone (guest/internal/gate,
// container.go). So for each sealed mount policy_data gets an entry of that form, and loses the storage that genpolicy has written for an
// emptyDir, which would be missed since the numbers of storages must agree. All else of the text stays.
// Read in Kata 4.1, src/tools/genpolicy/rules.rego: allow_mount, check_mount, allow_storages.

// volumesDir is where the guest attaches sealed volumes.
const volumesDir = "/run/sealvol/volumes/"

var policyData = regexp.MustCompile(`(?m)^policy_data[ \t]*:=[ \t]*`)

// katamount is a mount in policy_data. Its source is a regular expression.
type katamount struct {
	Destination string   `json:"destination"`
	Source      string   `json:"source"`
	Type        string   `json:"type_"`
	Options     []string `json:"options"`
}

// allowSealed puts the sealed mounts into the policy_data of a policy by genpolicy. Another policy stays as it is.
func allowSealed(text string, volumes []volume, pod map[string]policy.Volume) (string, error) {
	at := policyData.FindStringIndex(text)
	if at == nil {
		return text, nil
	}
	data, err := valueAt([]byte(text), at[1])
	if err != nil {
		return "", badData(err)
	}
	containers, err := data.list("containers")
	if err != nil {
		return "", badData(err)
	}
	var edits []edit
	for _, c := range containers {
		changes, err := allowSealedIn(c, volumes, pod)
		if err != nil {
			return "", badData(err)
		}
		edits = append(edits, changes...)
	}
	slices.SortFunc(edits, func(a, b edit) int { return cmp.Compare(a.start, b.start) })
	var out strings.Builder
	done := 0
	for _, e := range edits {
		out.WriteString(text[done:e.start] + e.text)
		done = e.end
	}
	return out.String() + text[done:], nil
}

func badData(err error) error {
	return fmt.Errorf("annotation %s: policy_data is not as genpolicy writes it: %w: %w", Annotation, err, errdefs.ErrInvalidArgument)
}

// allowSealedIn finds the changes to one container of policy_data.
func allowSealedIn(container located, volumes []volume, pod map[string]policy.Volume) ([]edit, error) {
	var c struct {
		OCI struct {
			Annotations map[string]string
			Mounts      []katamount
		}
	}
	if err := json.Unmarshal(container.text(), &c); err != nil {
		return nil, err
	}
	name := c.OCI.Annotations["io.kubernetes.cri.container-name"]
	var missing []katamount
	storages := 0 // that genpolicy wrote and that will not come
	for _, v := range volumes {
		for _, m := range v.mounts {
			if m.Container != name {
				continue
			}
			entry := katamount{
				Destination: m.Path, Source: "^" + regexp.QuoteMeta(volumesDir+v.name) + "$", Type: "bind",
				Options: bindOptions(pod[v.name].Options, m.ReadOnly),
			}
			// An entry of this source is from an earlier run, which also took the storage.
			earlier := slices.DeleteFunc(slices.Clone(c.OCI.Mounts), func(m katamount) bool { return m.Source != entry.Source })
			if !slices.ContainsFunc(earlier, func(m katamount) bool {
				return m.Destination == entry.Destination && slices.Equal(m.Options, entry.Options)
			}) {
				missing = append(missing, entry)
			}
			if v.emptyDir && len(earlier) == 0 {
				storages++
			}
		}
	}
	if len(missing) == 0 {
		return nil, nil
	}
	oci, err := container.member("OCI")
	if err != nil {
		return nil, err
	}
	mounts, err := oci.member("Mounts")
	if err != nil {
		return nil, err
	}
	edits := []edit{mounts.prepend(missing)}
	removed, err := container.withoutStorages(storages)
	if err != nil {
		return nil, err
	}
	return append(edits, removed...), nil
}

// bindOptions are those of the mount that the gate writes into a request (guest/internal/gate, mountOptions).
func bindOptions(options []policy.Option, readOnly bool) []string {
	bind := []string{"rbind"}
	for _, o := range options {
		bind = append(bind, string(o))
	}
	if readOnly {
		return append(bind, "ro")
	}
	return append(bind, "rw")
}

// located is a JSON value inside a text.
type located struct {
	in         []byte
	start, end int
}

func (l located) text() []byte { return l.in[l.start:l.end] }

// valueAt finds the JSON value that begins at an offset.
func valueAt(text []byte, start int) (located, error) {
	decoder := json.NewDecoder(bytes.NewReader(text[start:]))
	var raw json.RawMessage
	if err := decoder.Decode(&raw); err != nil {
		return located{}, err
	}
	end := start + int(decoder.InputOffset())
	return located{text, end - len(raw), end}, nil
}

// member finds a member of an object.
func (l located) member(key string) (located, error) {
	if len(l.text()) == 0 || l.text()[0] != '{' {
		return located{}, fmt.Errorf("%s stands in no object", key)
	}
	var found *located
	err := l.each(func(decoder *json.Decoder) error {
		k, err := decoder.Token()
		if err != nil {
			return err
		}
		v, err := l.next(decoder)
		if k == key {
			found = &v
		}
		return err
	})
	if err == nil && found == nil {
		err = fmt.Errorf("has no %s", key)
	}
	if err != nil {
		return located{}, err
	}
	return *found, nil
}

// list finds the elements of an array that is a member.
func (l located) list(key string) ([]located, error) {
	array, err := l.member(key)
	if err != nil {
		return nil, err
	}
	return array.elements()
}

func (l located) elements() ([]located, error) {
	if len(l.text()) == 0 || l.text()[0] != '[' {
		return nil, fmt.Errorf("%.20q is no array", l.text())
	}
	var found []located
	err := l.each(func(decoder *json.Decoder) error {
		v, err := l.next(decoder)
		found = append(found, v)
		return err
	})
	return found, err
}

// each reads a value's parts one after the other.
func (l located) each(part func(*json.Decoder) error) error {
	decoder := json.NewDecoder(bytes.NewReader(l.text()))
	if _, err := decoder.Token(); err != nil {
		return err
	}
	for decoder.More() {
		if err := part(decoder); err != nil {
			return err
		}
	}
	return nil
}

// next is the value that the decoder of this one reads next.
func (l located) next(decoder *json.Decoder) (located, error) {
	var raw json.RawMessage
	if err := decoder.Decode(&raw); err != nil {
		return located{}, err
	}
	end := l.start + int(decoder.InputOffset())
	return located{l.in, end - len(raw), end}, nil
}

// prepend puts entries at the beginning of an array, each on a line as its first one is.
func (l located) prepend(entries []katamount) edit {
	rest := l.text()[1:]
	space := string(rest[:len(rest)-len(bytes.TrimLeft(rest, " \t\r\n"))])
	empty := len(bytes.TrimSpace(rest)) == 1
	var b strings.Builder
	for i, e := range entries {
		if empty && i > 0 {
			b.WriteString(", ")
		}
		if !empty {
			b.WriteString(space)
		}
		b.WriteString(inline(e))
		if !empty {
			b.WriteString(",")
		}
	}
	return edit{l.start + 1, l.start + 1, b.String()}
}

// withoutStorages takes as many storages out of a container as sealed emptyDirs have stood for: of those that genpolicy writes for block
// devices that the guest makes a file system on.
func (l located) withoutStorages(n int) ([]edit, error) {
	if n == 0 {
		return nil, nil
	}
	array, err := l.member("storages")
	if err != nil {
		return nil, err
	}
	storages, err := array.elements()
	if err != nil {
		return nil, err
	}
	var kept []string
	for _, s := range storages {
		var storage struct {
			Options []string `json:"driver_options"`
		}
		if err := json.Unmarshal(s.text(), &storage); err != nil {
			return nil, err
		}
		if n > 0 && slices.Contains(storage.Options, "create_filesystem") {
			n--
			continue
		}
		kept = append(kept, string(s.text()))
	}
	switch len(kept) {
	case len(storages):
		return nil, nil
	case 0:
		return []edit{{array.start, array.end, "[]"}}, nil
	}
	text := string(array.text())
	before, after := text[1:storages[0].start-array.start], text[storages[len(storages)-1].end-array.start:]
	return []edit{{array.start, array.end, "[" + before + strings.Join(kept, ","+before) + after}}, nil
}
