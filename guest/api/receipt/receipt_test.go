package receipt

import (
	"bytes"
	"flag"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// nonce is as short as one may be.
func nonce() []byte { return []byte("0123456789abcdef") }

// full has something in every field.
func full() Receipt {
	return Receipt{
		Version: Version, Service: "v0.1.0", TEE: "sev_guest", Nonce: "30313233343536373839616263646566",
		Issued: time.Date(2026, 3, 1, 12, 30, 0, 0, time.UTC),
		Policy: Policy{
			Source: "init-data", Digest: strings.Repeat("5e", 32), InForce: true,
			InitData: &InitData{Algorithm: "sha384", Digest: strings.Repeat("0a", 48)},
		},
		Containers: []Container{
			{Name: "my-container", RootFS: "host", ArgsPinned: true, State: "started", ID: "c1"},
			{Name: "sidecar", RootFS: "host"},
		},
		Volumes: []Volume{
			{
				Name: "encrypted", State: "open", Layering: "memory-tags", Suite: "aegis128-random", Driver: "aegis128-aesni", FSType: "ext4",
				SizeBytes: 1 << 30, PCIPath: "02/01",
				Created: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Opened: time.Date(2026, 3, 1, 12, 10, 0, 0, time.UTC),
				Mounts: []Mount{
					{Container: "my-container", Path: "/mnt/encrypted", Options: []string{"nosuid", "nodev"}},
					{Container: "sidecar", Path: "/data", ReadOnly: true},
				},
			},
			{Name: "scratch", State: "failed", Layering: "luks2", FailedIO: 3, Error: "not closed \"cleanly\"\n<\u2028>"},
		},
		Warnings: []string{"container my-container: its root file system is the host's, so sealing protects the disk only"},
	}
}

func encode(t testing.TB, r Receipt) []byte {
	t.Helper()
	encoded, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return encoded
}

func TestReceiptHasOneFormOfBytes(t *testing.T) {
	t.Parallel()
	got := encode(t, full())
	golden := filepath.Join("testdata", "receipt.json")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("differs from %s, so that no receipt that was kept verifies any more (-want +got):\n%s", golden, d)
	}
	parsed, err := Parse(got)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(got), string(encode(t, parsed))); d != "" {
		t.Errorf("parsed and encoded again:\n%s", d)
	}
}

func TestEmptyReceiptHasNoNull(t *testing.T) {
	t.Parallel()
	got := encode(t, Receipt{Version: Version})
	if bytes.Contains(got, []byte("null")) {
		t.Errorf("%s", got)
	}
	if _, err := Parse(got); err != nil {
		t.Error(err)
	}
}

// The expected values are the ones that RFC 8785 gives in sections 3.2.2 and 3.2.3, as far as they are ours.
func TestCanonicalFormIsThatOfRFC8785(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, want string }{
		"string of the RFC":   {`"\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/"`, `"€$\u000f\nA'B\"\\\\\"/"`},
		"named escapes":       {`"\b\t\n\f\r"`, `"\b\t\n\f\r"`},
		"nothing for HTML":    {`"\u003c\u003e\u0026\u2028\u2029\u007f"`, "\"<>&\u2028\u2029\u007f\""},
		"beyond the BMP":      {`"\ud83d\ude00"`, `"😀"`},
		"keys sorted":         {`{"b": 1, "a": {"d": [], "c": true}, "\r": 2}`, `{"\r":2,"a":{"c":true,"d":[]},"b":1}`},
		"no spaces":           {"[ 1 ,\n false ]", `[1,false]`},
		"largest number":      {`9007199254740991`, `9007199254740991`},
		"smallest number":     {`-9007199254740991`, `-9007199254740991`},
		"nothing":             {`null`, `[]`},
		"nothing in an array": {`[null]`, `[[]]`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := canonical([]byte(c.text))
			if err != nil || string(got) != c.want {
				t.Errorf("%s: got %s, want %s: %v", c.text, got, c.want, err)
			}
		})
	}
	for _, text := range []string{"1.5", "1e3", "9007199254740992", "-9007199254740992", "[1.0]", `{"a":18446744073709551615}`} {
		if got, err := canonical([]byte(text)); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s has a form that verifiers do not agree on, and became %s, %v", text, got, err)
		}
	}
}

func TestEncodeRefusesWhatHasNoForm(t *testing.T) {
	t.Parallel()
	large := full()
	large.Volumes[0].SizeBytes = math.MaxUint64
	long := full()
	long.Warnings = []string{strings.Repeat("a", MaxBytes)}
	late := full()
	late.Issued = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, r := range map[string]Receipt{"number": large, "length": long, "time": late} {
		if _, err := r.Encode(); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestParseRefusesAnyOtherForm(t *testing.T) {
	t.Parallel()
	good := string(encode(t, full()))
	replace := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("%s is not in %s", old, good)
		}
		return strings.Replace(good, old, new, 1)
	}
	for name, text := range map[string]string{
		"nothing":              "",
		"not JSON":             "receipt",
		"space at the end":     good + "\n",
		"a second receipt":     good + good,
		"space inside":         replace(`"tee":`, `"tee": `),
		"unknown key":          replace(`"tee":`, `"color":"red","tee":`),
		"key twice":            replace(`"tee":"sev_guest"`, `"tee":"sev_guest","tee":"sev_guest"`),
		"key in capitals":      replace(`"tee":`, `"TEE":`),
		"key left out":         replace(`"tee":"sev_guest",`, ``),
		"null":                 replace(`"options":[]`, `"options":null`),
		"another version":      replace(`"version":1`, `"version":2`),
		"another type":         replace(`"version":1`, `"version":"1"`),
		"escape that need not": replace(`"sev_guest"`, `"\u0073ev_guest"`),
		"time with fractions":  replace(`12:30:00Z`, `12:30:00.0Z`),
		"time elsewhere":       replace(`12:30:00Z`, `12:30:00+00:00`),
		"too long":             replace("so sealing", strings.Repeat("a", MaxBytes)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := Parse([]byte(text)); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestVerifyBindsReceiptAndNonceToTheQuote(t *testing.T) {
	t.Parallel()
	encoded := encode(t, full())
	data := ReportData(encoded)
	got, err := Verify(data[:], encoded, nonce())
	if err != nil || got.Volumes[0].Name != "encrypted" {
		t.Fatalf("got %v, %v", got, err)
	}
	moved := full()
	moved.Volumes[0].Mounts[0].Path = "/mnt/other"
	other := ReportData(encode(t, moved))
	garbage := []byte("{}")
	ofGarbage := ReportData(garbage)
	old := full()
	old.Nonce = "30303030303030303030303030303030"
	ofOld := ReportData(encode(t, old))
	without := full()
	without.Nonce = ""
	ofWithout := ReportData(encode(t, without))
	for name, c := range map[string]struct {
		data, encoded, nonce []byte
		is                   func(error) bool
	}{
		"a receipt that was changed":         {data[:], encode(t, moved), nonce(), errdefs.IsUnauthorized},
		"a quote for something else":         {other[:], encoded, nonce(), errdefs.IsUnauthorized},
		"report data that is cut":            {data[:32], encoded, nonce(), errdefs.IsUnauthorized},
		"no report data":                     {nil, encoded, nonce(), errdefs.IsUnauthorized},
		"an old receipt with its old quote":  {ofOld[:], encode(t, old), nonce(), errdefs.IsUnauthorized},
		"a receipt that nobody asked for":    {ofWithout[:], encode(t, without), nonce(), errdefs.IsUnauthorized},
		"no nonce":                           {ofWithout[:], encode(t, without), nil, errdefs.IsInvalidArgument},
		"a nonce that can be guessed":        {data[:], encoded, nonce()[:15], errdefs.IsInvalidArgument},
		"a nonce that is too long":           {data[:], encoded, bytes.Repeat([]byte{1}, 65), errdefs.IsInvalidArgument},
		"a quote for something else than us": {ofGarbage[:], garbage, nonce(), errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := Verify(c.data, c.encoded, c.nonce); !c.is(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// FuzzParse: whatever is taken is the one form of what was read.
func FuzzParse(f *testing.F) {
	f.Add(encode(f, full()))
	f.Add(encode(f, Receipt{Version: Version}))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := Parse(text)
		if err != nil {
			return
		}
		again, err := r.Encode()
		if err != nil || !bytes.Equal(again, text) {
			t.Errorf("%q was taken and is %q, %v", text, again, err)
		}
	})
}
