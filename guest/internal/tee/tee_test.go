package tee

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/api/quote"
	"github.com/sealvol/sealvol/guest/api/receipt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// configfs is the kernel's side of /sys/kernel/config/tsm/report, as drivers/virt/coco/tsm.c has it: a folder for each request, which
// comes with its attributes and counts what is written to them.
type configfs struct {
	mu       sync.Mutex
	provider string
	floor    string // "": the provider knows no levels
	made     int
	entries  map[string]*entry
	failing  map[string]error           // by operation or attribute
	report   func(inblob []byte) []byte // outblob
	hold     chan struct{}              // closed when outblob may be read
	asked    chan struct{}              // one for each reader of outblob
	levels   []string                   // that were written
}

type entry struct {
	inblob     []byte
	generation int
}

func newConfigfs(provider string) *configfs {
	return &configfs{provider: provider, entries: map[string]*entry{}, failing: map[string]error{}, report: snp, asked: make(chan struct{}, 64)}
}

func (c *configfs) MkdirTemp(dir, pattern string) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if dir != "/sys/kernel/config/tsm/report" {
		return "", fmt.Errorf("mkdir %s: %w", dir, os.ErrNotExist)
	}
	if err := c.failing["mkdir"]; err != nil {
		return "", &os.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	c.made++
	name := filepath.Join(dir, fmt.Sprint(pattern, c.made))
	c.entries[name] = &entry{}
	return name, nil
}

func (c *configfs) WriteFile(name string, content []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	attribute := filepath.Base(name)
	e := c.entries[filepath.Dir(name)]
	if err := c.failing[attribute]; err != nil {
		return err
	}
	switch {
	case e == nil:
		return os.ErrNotExist
	case attribute == "inblob" && len(content) > 64:
		return unix.EINVAL
	case attribute == "inblob":
		e.inblob = bytes.Clone(content)
	case attribute == "privlevel" && c.floor != "":
		c.levels = append(c.levels, string(content))
	default:
		return os.ErrPermission
	}
	e.generation++
	return nil
}

func (c *configfs) ReadFile(name string) ([]byte, error) {
	attribute := filepath.Base(name)
	if attribute == "outblob" {
		c.asked <- struct{}{}
		if c.hold != nil {
			<-c.hold
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[filepath.Dir(name)]
	if err := c.failing[attribute]; err != nil {
		return nil, err
	}
	switch {
	case e == nil:
		return nil, os.ErrNotExist
	case attribute == "provider":
		return []byte(c.provider + "\n"), nil
	case attribute == "generation":
		return fmt.Appendln(nil, e.generation), nil
	case attribute == "privlevel_floor" && c.floor != "":
		return []byte(c.floor + "\n"), nil
	case attribute == "outblob" && len(e.inblob) == 0:
		return nil, unix.EINVAL
	case attribute == "outblob":
		return c.report(e.inblob), nil
	}
	return nil, os.ErrNotExist
}

func (c *configfs) RemoveAll(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.failing["rmdir"]; err != nil {
		return err
	}
	if c.entries[name] == nil {
		return os.ErrNotExist
	}
	delete(c.entries, name)
	return nil
}

func (c *configfs) ReadDir(string) ([]os.DirEntry, error) {
	return nil, errors.New("nobody lists them")
}

// left fails when a request left its folder behind.
func (c *configfs) left(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.entries) > 0 {
		t.Errorf("left behind: %v", c.entries)
	}
}

var hostData = bytes.Repeat([]byte{0xcf}, 32)

func snp(reportData []byte) []byte {
	b := make([]byte, 0x4a0)
	binary.LittleEndian.PutUint32(b, 3)
	copy(b[0x50:], reportData)
	copy(b[0xc0:], hostData)
	return b
}

// tdxQuote is a quote that says what its host likes about MRCONFIGID.
func tdxQuote(reportData []byte) []byte {
	b := make([]byte, 48+584+4)
	binary.LittleEndian.PutUint16(b, 4)
	b[4] = 0x81
	copy(b[48+184:], bytes.Repeat([]byte{0xbb}, 48))
	copy(b[48+520:], reportData)
	return b
}

var mrConfigID = bytes.Repeat([]byte{0xcf}, 48)

func tdxModule(reportData [64]byte) ([]byte, error) {
	b := make([]byte, 1024)
	b[0] = 0x81
	copy(b[128:], reportData[:])
	copy(b[512+64:], mrConfigID)
	return b, nil
}

func noTDX([64]byte) ([]byte, error) {
	return nil, errors.New("asked the TDX module of a machine that has none")
}

func mustOpen(t *testing.T, c *configfs, module func([64]byte) ([]byte, error)) *TEE {
	t.Helper()
	tee, err := open(c, module)
	if err != nil {
		t.Fatal(err)
	}
	return tee
}

func TestOpenSaysWhichTEE(t *testing.T) {
	t.Parallel()
	for _, provider := range []string{"sev_guest", "tdx_guest"} {
		c := newConfigfs(provider)
		if tee := mustOpen(t, c, noTDX); tee.Provider() != provider {
			t.Errorf("got %q, want %q", tee.Provider(), provider)
		}
		c.left(t)
	}
	for name, test := range map[string]struct {
		provider, failing string
		err               error
		is                func(error) bool
	}{
		"interface without a TEE": {"sev_guest", "mkdir", unix.ENXIO, errdefs.IsNotFound},
		"no place for an entry":   {"sev_guest", "mkdir", unix.ENOMEM, errdefs.IsUnavailable},
		"entry that is broken":    {"sev_guest", "generation", unix.EIO, errdefs.IsUnavailable},
		"no provider":             {"sev_guest", "provider", unix.EIO, errdefs.IsUnavailable},
		"entry that stays":        {"sev_guest", "rmdir", unix.EBUSY, errdefs.IsUnavailable},
		"unknown TEE":             {"arm_cca_guest", "", nil, errdefs.IsNotImplemented},
		"nameless TEE":            {"", "", nil, errdefs.IsNotImplemented},
	} {
		c := newConfigfs(test.provider)
		c.failing[test.failing] = test.err
		if _, err := open(c, noTDX); !test.is(err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		if test.failing != "rmdir" {
			c.left(t)
		}
	}
}

// This machine has no TEE: what its kernel says is what Open must understand.
func TestOpenWithoutInterface(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat(reports); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("this test needs a machine without %s: %v", reports, err)
	}
	if _, err := Open(); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func TestLaunchData(t *testing.T) {
	t.Parallel()
	c := newConfigfs("sev_guest")
	got, err := mustOpen(t, c, noTDX).LaunchData(t.Context())
	if err != nil || !bytes.Equal(got, hostData) {
		t.Errorf("SEV-SNP: %x, %v", got, err)
	}
	c.left(t)
	if _, err := mustOpen(t, newConfigfs("tdx_guest"), noTDX).LaunchData(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("no device of the TDX module: %v", err)
	}
}

// A TDX quote comes from the host, which can put any MRCONFIGID into one whose signature nobody in the guest checks.
func TestHostThatForgesTheQuoteDoesNotChooseMRCONFIGID(t *testing.T) {
	t.Parallel()
	c := newConfigfs("tdx_guest")
	c.report = tdxQuote
	got, err := mustOpen(t, c, tdxModule).LaunchData(t.Context())
	if err != nil || !bytes.Equal(got, mrConfigID) {
		t.Errorf("got %x, want what the TDX module says, %x: %v", got, mrConfigID, err)
	}
}

func TestTDXModulesReportMustAnswer(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func([]byte) []byte{
		"nothing":           func([]byte) []byte { return nil },
		"cut":               func(b []byte) []byte { return b[:1023] },
		"longer":            func(b []byte) []byte { return append(b, 0) },
		"of SGX":            func(b []byte) []byte { b[0] = 0; return b },
		"to something else": func(b []byte) []byte { b[128] ^= 1; return b },
		"to its end":        func(b []byte) []byte { b[191] ^= 1; return b },
	} {
		module := func(reportData [64]byte) ([]byte, error) {
			b, err := tdxModule(reportData)
			return change(b), err
		}
		if got, err := mustOpen(t, newConfigfs("tdx_guest"), module).LaunchData(t.Context()); !errdefs.IsInternal(err) {
			t.Errorf("%s: %x, %v", name, got, err)
		}
	}
}

// The kernel's header says 0xc4405401 when it is expanded.
func TestRequestOfTheTDXModule(t *testing.T) {
	t.Parallel()
	if getReport0 != 0xc4405401 || unsafe.Sizeof(tdReportRequest{}) != 1088 {
		t.Errorf("request %#x of %d bytes", getReport0, unsafe.Sizeof(tdReportRequest{}))
	}
	if _, err := tdReport([64]byte{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a machine that is no TDX guest: %v", err)
	}
}

func TestQuoteIsOverTheReportData(t *testing.T) {
	t.Parallel()
	for provider, report := range map[string]func([]byte) []byte{"sev_guest": snp, "tdx_guest": tdxQuote} {
		c := newConfigfs(provider)
		c.report = report
		tee := mustOpen(t, c, tdxModule)
		for _, want := range [][64]byte{{}, {1}, {63: 0xff}} {
			blob, err := tee.Quote(t.Context(), want)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := quote.Parse(provider, blob); err != nil || got.ReportData != want {
				t.Errorf("%s: got %x, want %x: %v", provider, got.ReportData, want, err)
			}
		}
		c.left(t)
	}
}

func TestQuoteAsksAtTheLevelThatTheGuestMay(t *testing.T) {
	t.Parallel()
	c := newConfigfs("sev_guest")
	c.floor = "2"
	if _, err := mustOpen(t, c, noTDX).Quote(t.Context(), [64]byte{}); err != nil || len(c.levels) != 1 || c.levels[0] != "2" {
		t.Errorf("wrote %q: %v", c.levels, err)
	}
}

func TestQuoteThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, breakIt := range map[string]func(*configfs){
		"no place for an entry": func(c *configfs) { c.failing["mkdir"] = unix.ENOMEM },
		"inblob":                func(c *configfs) { c.failing["inblob"] = unix.EBUSY },
		"privlevel":             func(c *configfs) { c.floor, c.failing["privlevel"] = "2", unix.EINVAL },
		"outblob":               func(c *configfs) { c.failing["outblob"] = unix.EIO },
		"provider":              func(c *configfs) { c.failing["provider"] = unix.EIO },
		"nothing in it":         func(c *configfs) { c.report = func([]byte) []byte { return nil } },
		"over something else":   func(c *configfs) { c.report = func([]byte) []byte { return snp(make([]byte, 64)) } },
		"of another TEE":        func(c *configfs) { c.report = tdxQuote },
		"endless":               func(c *configfs) { c.report = func([]byte) []byte { return make([]byte, maxQuote+1) } },
		"somebody else writes": func(c *configfs) {
			c.report = func(inblob []byte) []byte {
				for _, e := range c.entries {
					e.generation++
				}
				return snp(inblob)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newConfigfs("sev_guest")
			tee := mustOpen(t, c, noTDX)
			breakIt(c)
			blob, err := tee.Quote(t.Context(), [64]byte{1})
			if !errdefs.IsUnavailable(err) || blob != nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %d bytes, %v", len(blob), err)
			}
			c.left(t)
			if len(tee.turn) > 0 || len(tee.waiting) > 0 {
				t.Error("nobody gets a quote any more")
			}
		})
	}
}

func TestQuotesAreMadeOneByOneAndFewMayWait(t *testing.T) {
	t.Parallel()
	c := newConfigfs("sev_guest")
	tee := mustOpen(t, c, noTDX)
	c.hold = make(chan struct{})
	answers := make(chan error, maxWaiting)
	ask := func() {
		_, err := tee.Quote(context.Background(), [64]byte{1})
		answers <- err
	}
	go ask()
	<-c.asked // it has its turn
	for range maxWaiting - 2 {
		go ask()
	}
	// The last place is for one that does not wait for ever.
	ctx, cancel := context.WithCancel(t.Context())
	given := make(chan error, 1)
	go func() {
		_, err := tee.Quote(ctx, [64]byte{1})
		given <- err
	}()
	for len(tee.waiting) < maxWaiting { // until each of them is in line
		time.Sleep(100 * time.Microsecond)
	}
	if _, err := tee.Quote(t.Context(), [64]byte{1}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one too many: %v", err)
	}
	cancel()
	if err := <-given; !errdefs.IsUnavailable(err) {
		t.Errorf("one that gave up: %v", err)
	}
	if len(c.asked) > 0 {
		t.Error("two quotes at once")
	}
	close(c.hold)
	for range maxWaiting - 1 {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	c.left(t)
}

func TestDoubleSaysWhatItsFileSays(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "report")
	if err := os.WriteFile(file, snp(nil), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := NewDouble(file)
	if err != nil {
		t.Fatal(err)
	}
	if d.Provider() != receipt.Insecure {
		t.Errorf("it calls itself %q, so that somebody could trust it", d.Provider())
	}
	if got, err := d.LaunchData(t.Context()); err != nil || !bytes.Equal(got, hostData) {
		t.Errorf("got %x, %v", got, err)
	}
	want := [64]byte{1, 63: 2}
	blob, err := d.Quote(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := quote.Parse(quote.SEVGuest, blob); err != nil || got.ReportData != want || !bytes.Equal(got.LaunchData, hostData) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := NewDouble("/absent"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(file, []byte("report"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewDouble(file); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no report: %v", err)
	}
}

// FuzzTDReport: MRCONFIGID comes from its place in a report that answers.
func FuzzTDReport(f *testing.F) {
	good, _ := tdxModule([64]byte{1})
	f.Add(good, []byte{1})
	f.Add(good[:1000], []byte{1})
	f.Add(good, []byte{})
	f.Fuzz(func(t *testing.T, b, question []byte) {
		var reportData [64]byte
		copy(reportData[:], question)
		got, err := parseTDReport(b, reportData)
		if err != nil {
			return
		}
		if len(b) != 1024 || !bytes.Equal(got, b[576:624]) || !bytes.Equal(reportData[:], b[128:192]) {
			t.Errorf("%x from %x", got, b)
		}
	})
}
