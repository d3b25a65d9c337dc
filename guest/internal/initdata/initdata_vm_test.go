//go:build vm

package initdata

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/integration/qmp"
)

// putDisk makes one of the machine's disks a whole image, as QEMU presents the file that Kata writes.
func putDisk(t *testing.T, monitor *qmp.Monitor, disk int, name string, content []byte) {
	t.Helper()
	f, err := os.OpenFile("/dev/"+name, os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	if err := monitor.Execute("block_resize", map[string]any{"node-name": qmp.ID(disk), "size": len(content)}); err != nil {
		t.Fatal(err)
	}
	for range 1000 { // until the driver has heard of it
		if size, err := f.Seek(0, 2); err == nil && size == int64(len(content)) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s keeps its size", name)
}

func TestVMDocumentOnAVirtioDisk(t *testing.T) {
	monitor, err := qmp.Open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Find("/sys", "/dev"); !errdefs.IsNotFound(err) {
		t.Fatalf("empty disks: %v", err)
	}
	text := strings.Replace(document, "[token_configs]", strings.Repeat("# more than a sector\n", 1000), 1)
	putDisk(t, monitor, 0, "vda", image(t, text))
	got, err := Find("/sys", "/dev")
	if err != nil || got.Policy != "package agent_policy\n" {
		t.Fatalf("got %v, %v", got, err)
	}
	want, err := Parse([]byte(text))
	if err != nil || !bytes.Equal(got.Digest, want.Digest) {
		t.Errorf("digest %x, want that of the text that was written, %x: %v", got.Digest, want.Digest, err)
	}
	putDisk(t, monitor, 1, "vdb", image(t, document))
	if got, err := Find("/sys", "/dev"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "vda and vdb") {
		t.Errorf("two disks with a document: %v, %v", got, err)
	}
}
