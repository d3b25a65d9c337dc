package initdata

import (
	"bytes"
	"compress/gzip"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

const document = `algorithm = "sha384"
version = "0.1.0"

[data]
"aa.toml" = '''
[token_configs]
'''
"policy.rego" = '''
package agent_policy
'''
`

// image writes a disk as Kata does.
func image(t testing.TB, text string) []byte {
	t.Helper()
	return frame(magic, pack(t, []byte(text)))
}

func pack(t testing.TB, text []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(text); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func frame(magic string, compressed []byte) []byte {
	b := binary.LittleEndian.AppendUint64([]byte(magic), uint64(len(compressed)))
	b = append(b, compressed...)
	return append(b, make([]byte, -len(b)&(sectorBytes-1))...)
}

func TestParse(t *testing.T) {
	t.Parallel()
	sum := sha512.Sum384([]byte(document))
	want := &Document{Algorithm: "sha384", Digest: sum[:], Policy: "package agent_policy\n"}
	got, err := Parse([]byte(document))
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Error(err, d)
	}
	got, err = Parse([]byte("version = '0.1.0'\nalgorithm = 'sha256'\n[data]\n'other' = ''\n"))
	if err != nil || got.Policy != "" || len(got.Digest) != 32 {
		t.Errorf("a document without a policy: %v, %v", got, err)
	}
}

// The digests are coreutils' of the same bytes.
func TestDigestIsOfTheTextAsItIs(t *testing.T) {
	t.Parallel()
	for algorithm, want := range map[string]string{
		"sha256": "af398df379eb475aff9f02cd056d0d1f5d496b7a073927cb3ea92407d8ad61a3",
		"sha384": "c2d9f12884812d609fffc5ae527195adce05b66d8c8d7d333366d5fbf01637aaf16237578dd7b7f7b7f0e0971d23bc6a",
		"sha512": "2fdf9419e43c548a07ee7234ab0b5e72f1d05a0a7d8c267d6f98dbdd490561beb130c07e2f28e8d7a7e7c627bca9ac685a1ad040b7566a019c16344f5ae17cfb",
	} {
		d, err := Parse([]byte("version = \"0.1.0\"\nalgorithm = \"" + algorithm + "\"\n[data]\n"))
		if err != nil || hex.EncodeToString(d.Digest) != want {
			t.Errorf("%s: %x, %v", algorithm, d.Digest, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	replace := func(old, new string) string {
		if !strings.Contains(document, old) {
			t.Fatalf("%q is not in the document", old)
		}
		return strings.Replace(document, old, new, 1)
	}
	for name, text := range map[string]string{
		"nothing":                   "",
		"not TOML":                  "{",
		"not UTF-8":                 replace("token", "\xff"),
		"a zero byte":               document + "\x00",
		"another version":           replace("0.1.0", "0.2.0"),
		"no version":                replace("version = \"0.1.0\"\n", ""),
		"version that is no string": replace(`"0.1.0"`, "1"),
		"another algorithm":         replace("sha384", "sha1"),
		"algorithm in IANA's words": replace("sha384", "sha-384"),
		"no algorithm":              replace("algorithm = \"sha384\"\n", ""),
		"no data":                   "version = \"0.1.0\"\nalgorithm = \"sha384\"\n",
		"data that is no table":     "version = \"0.1.0\"\nalgorithm = \"sha384\"\ndata = 1\n",
		"number in data":            replace("'''\n[token_configs]\n'''", "1"),
		"table in data":             document + "[data.more]\n",
		"policy that is no string":  replace("'''\npackage agent_policy\n'''", "[]"),
		"empty policy":              replace("'''\npackage agent_policy\n'''", "''"),
		"unknown key":               "digest = \"\"\n" + document,
		"unknown table":             document + "[more]\n",
		"key in capitals":           replace("version", "VERSION"),
		"key twice":                 "version = \"0.1.0\"\n" + document,
		"key in two cases":          "VERSION = \"0.1.0\"\n" + document,
		"table twice":               document + "[data]\n",
		"policy twice":              document + "\"policy.rego\" = \"package agent_policy\"\n",
		"too long":                  document + strings.Repeat("#", MaxDocument),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Parse([]byte(text))
			if !errdefs.IsInvalidArgument(err) || strings.ContainsAny(err.Error(), "\n\x00") || !utf8.ValidString(err.Error()) || len(err.Error()) > 400 {
				t.Errorf("got %v, %q", got, err)
			}
		})
	}
}

// A parser that goes down into every bracket and dot would take the guest's memory, before anything is known of who wrote them.
func TestDocumentThatIsDeeperThanAnyStack(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"arrays": "a = " + strings.Repeat("[", MaxDocument-10),
		"tables": "a = " + strings.Repeat("{a=", MaxDocument/3-10),
		"keys":   strings.Repeat("a.", MaxDocument/2-10) + "a = 1",
		"header": "[" + strings.Repeat("a.", MaxDocument/2-10) + "a]",
		"data":   "[data]\n" + strings.Repeat("a.", MaxDocument/2-10) + "a = 1",
	} {
		if _, err := Parse([]byte(text)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %.200v", name, err)
		}
	}
}

func TestBound(t *testing.T) {
	t.Parallel()
	parse := func(algorithm string) *Document {
		d, err := Parse([]byte(strings.Replace(document, "sha384", algorithm, 1)))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	const hostData, mrConfigID = 32, 48 // bytes
	for algorithm, own := range map[string]int{"sha256": 32, "sha384": 48, "sha512": 64} {
		d := parse(algorithm)
		for _, n := range []int{hostData, mrConfigID} {
			field := make([]byte, n)
			copy(field, d.Digest)
			if err := d.Bound(field); err != nil {
				t.Errorf("%s in a field of %d bytes: %v", algorithm, n, err)
			}
			for _, at := range []int{0, min(n, own) - 1, n - 1} {
				changed := bytes.Clone(field)
				changed[at] ^= 1
				if err := d.Bound(changed); !errdefs.IsPermissionDenied(err) {
					t.Errorf("%s in a field of %d bytes, byte %d changed: %v", algorithm, n, at, err)
				}
			}
			if err := d.Bound(make([]byte, n)); !errdefs.IsPermissionDenied(err) {
				t.Errorf("%s, launched with nothing: %v", algorithm, err)
			}
		}
		for _, n := range []int{0, 1, 31} {
			if err := d.Bound(d.Digest[:n]); !errdefs.IsInternal(err) {
				t.Errorf("%s: a field of %d bytes binds nothing: %v", algorithm, n, err)
			}
		}
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	good := image(t, document)
	for _, r := range []io.Reader{bytes.NewReader(good), iotest.OneByteReader(bytes.NewReader(good))} {
		text, err := read(r, int64(len(good)))
		if err != nil || string(text) != document {
			t.Errorf("got %q, %v", text, err)
		}
	}
	// Noise does not get shorter, so that the disk has several sectors.
	noise := make([]byte, 5000)
	rand.NewChaCha8([32]byte{}).Read(noise)
	for n := range 600 { // with each length of padding
		b := frame(magic, pack(t, noise[:4000+n]))
		if text, err := read(bytes.NewReader(b), int64(len(b))); err != nil || !bytes.Equal(text, noise[:4000+n]) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	packed := pack(t, []byte(document))
	length := func(n uint64) []byte {
		b := image(t, document)
		binary.LittleEndian.PutUint64(b[8:], n)
		return b
	}
	last := image(t, document)
	last[len(last)-1] = 1
	bomb := pack(t, make([]byte, MaxDocument+1))
	if len(bomb) > 4096 {
		t.Fatalf("the bomb has %d bytes", len(bomb))
	}
	broken := bytes.Clone(packed)
	broken[len(broken)-8] ^= 1 // of the checksum
	for name, c := range map[string]struct {
		disk []byte
		is   func(error) bool
	}{
		"nothing":                        {nil, errdefs.IsNotFound},
		"less than a header":             {[]byte(magic), errdefs.IsNotFound},
		"another magic":                  {frame("initdatb", packed), errdefs.IsNotFound},
		"magic in capitals":              {frame("INITDATA", packed), errdefs.IsNotFound},
		"no document":                    {length(0), errdefs.IsInvalidArgument},
		"longer than the disk":           {length(uint64(len(packed)) + 512), errdefs.IsInvalidArgument},
		"as long as memory":              {length(1 << 62), errdefs.IsInvalidArgument},
		"so long that it is negative":    {length(1<<64 - 1), errdefs.IsInvalidArgument},
		"so long that the sum overflows": {length(1<<63 - 16), errdefs.IsInvalidArgument},
		"more than is taken":             {length(maxCompressed + 1), errdefs.IsInvalidArgument},
		"another sector behind":          {append(image(t, document), make([]byte, 512)...), errdefs.IsInvalidArgument},
		"not a whole sector":             {image(t, document)[:headerBytes+len(packed)], errdefs.IsInvalidArgument},
		"something in the padding":       {last, errdefs.IsInvalidArgument},
		"not gzip":                       {frame(magic, []byte(document)), errdefs.IsInvalidArgument},
		"gzip that is cut":               {frame(magic, packed[:len(packed)-1]), errdefs.IsInvalidArgument},
		"gzip with a wrong checksum":     {frame(magic, broken), errdefs.IsInvalidArgument},
		"two documents":                  {frame(magic, append(bytes.Clone(packed), packed...)), errdefs.IsInvalidArgument},
		"a byte behind the document":     {frame(magic, append(bytes.Clone(packed), 0)), errdefs.IsInvalidArgument},
		"a bomb":                         {frame(magic, bomb), errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text, err := read(bytes.NewReader(c.disk), int64(len(c.disk)))
			if !c.is(err) {
				t.Errorf("got %.100q, %v", text, err)
			}
		})
	}
	t.Run("a disk that fails", func(t *testing.T) {
		t.Parallel()
		good := image(t, document)
		for n := range len(good) {
			r := io.MultiReader(bytes.NewReader(good[:n]), iotest.ErrReader(io.ErrNoProgress))
			if _, err := read(r, int64(len(good))); !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("after %d bytes: %v", n, err)
			}
		}
	})
}

// machine is a machine with disks; sysfs and dev are its folders.
func machine(t *testing.T, disks map[string][]byte) (sysfs, dev string) {
	t.Helper()
	root := t.TempDir()
	sysfs, dev = filepath.Join(root, "sys"), filepath.Join(root, "dev")
	for _, dir := range []string{filepath.Join(sysfs, "block"), dev} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range disks {
		if err := os.Mkdir(filepath.Join(sysfs, "block", name), 0o700); err != nil {
			t.Fatal(err)
		}
		if content == nil { // known to the kernel, but not to be opened
			continue
		}
		if err := os.WriteFile(filepath.Join(dev, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return sysfs, dev
}

func TestFind(t *testing.T) {
	t.Parallel()
	good, plain := image(t, document), make([]byte, 4096)
	for name, c := range map[string]struct {
		disks map[string][]byte
		is    func(error) bool // nil: found
	}{
		"the only disk":              {map[string][]byte{"vda": good}, nil},
		"among others":               {map[string][]byte{"vda": plain, "vdaa": good, "vdb": plain, "loop0": good, "sda": good, "vdc": {}}, nil},
		"no disk":                    {nil, errdefs.IsNotFound},
		"no disk with one":           {map[string][]byte{"vda": plain, "vdb": {}}, errdefs.IsNotFound},
		"only on a loop device":      {map[string][]byte{"loop0": good, "dm-0": good}, errdefs.IsNotFound},
		"two of them":                {map[string][]byte{"vda": good, "vdb": image(t, document+"\n")}, errdefs.IsFailedPrecondition},
		"twice the same":             {map[string][]byte{"vda": good, "vdb": good}, errdefs.IsFailedPrecondition},
		"one that is malformed":      {map[string][]byte{"vda": frame(magic, []byte("x"))}, errdefs.IsInvalidArgument},
		"one beside a malformed one": {map[string][]byte{"vda": good, "vdb": frame(magic, []byte("x"))}, errdefs.IsInvalidArgument},
		"text that is no document":   {map[string][]byte{"vda": image(t, "a = 1")}, errdefs.IsInvalidArgument},
		"a disk that does not open":  {map[string][]byte{"vda": good, "vdb": nil}, errdefs.IsFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Find(machine(t, c.disks))
			if c.is == nil {
				if err != nil || got.Policy != "package agent_policy\n" {
					t.Errorf("got %v, %v", got, err)
				}
			} else if !c.is(err) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	if _, err := Find("/absent", "/absent"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a guest whose disks are not known has no document: %v", err)
	}
}

// FuzzRead: what is taken has its length from the disk, and no more bytes than may be.
func FuzzRead(f *testing.F) {
	f.Add(image(f, document))
	f.Add(image(f, ""))
	f.Add(frame(magic, []byte("not gzip")))
	f.Add(frame("initdatb", nil))
	f.Add(frame(magic, pack(f, make([]byte, 100000))))
	f.Fuzz(func(t *testing.T, disk []byte) {
		text, err := read(bytes.NewReader(disk), int64(len(disk)))
		if err != nil {
			if !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
			return
		}
		if len(text) > MaxDocument || !bytes.HasPrefix(disk, []byte(magic)) {
			t.Errorf("%d bytes from %.40q", len(text), disk)
		}
	})
}

// FuzzParse: whatever the text, there is a document with a digest of it, or one line that says why not.
func FuzzParse(f *testing.F) {
	f.Add([]byte(document))
	f.Add([]byte("version = '0.1.0'\nalgorithm = 'sha256'\n[data]\n"))
	f.Add([]byte("data = {}\nalgorithm = 'sha512'\nversion = '0.1.0'"))
	f.Add([]byte("[data]\n\"policy.rego\" = \"\"\"\n\\u0000\"\"\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := Parse(text)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || strings.ContainsRune(err.Error(), '\n') {
				t.Errorf("%q", err)
			}
			return
		}
		if want, err := digest(d.Algorithm, text); err != nil || !bytes.Equal(want, d.Digest) {
			t.Errorf("%s: %x, %v", d.Algorithm, d.Digest, err)
		}
	})
}
