// Testbed seals volumes by the service's own volume.Manager, for the tests and measurements of integration. It stands in for gate and
// agent: what it is told, one request a line as JSON on its standard input (package integration/testbed has the format and a client), it
// does, without asking the policy who may. It is in no guest image.
//
// At the end of its input it destroys the volumes and exits.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/sealvol/sealvol/guest/internal/exposure"
	"github.com/sealvol/sealvol/guest/internal/filesystem"
	"github.com/sealvol/sealvol/guest/internal/volume"
	"github.com/sealvol/sealvol/integration/testbed"
	"github.com/sealvol/sealvol/policy"
)

const destroyTimeout = 30 * time.Second

func main() {
	dir := flag.String("dir", "", "`folder` of its own; volumes are attached below it")
	text := flag.String("policy", "", "`file` with the policy's text")
	flag.Parse()
	if err := run(*dir, *text); err != nil {
		fmt.Fprintln(os.Stderr, "testbed:", err)
		os.Exit(1)
	}
}

func run(dir, policyFile string) (err error) {
	if err := exposure.ForbidDumps(); err != nil {
		return err
	}
	text, err := os.ReadFile(policyFile)
	if err != nil {
		return err
	}
	p, err := policy.Load(context.Background(), text)
	if err != nil {
		return err
	}
	b := &bed{policy: p, open: func() (*volume.Manager, error) {
		return volume.New(volume.Config{
			Dir:        dir,
			Tools:      filesystem.Tools{Ext4: "/usr/sbin/mkfs.ext4", XFS: "/usr/sbin/mkfs.xfs"},
			Cryptsetup: "/usr/sbin/cryptsetup",
			Log:        slog.New(slog.NewTextHandler(os.Stderr, nil)),
		})
	}}
	if b.manager, err = b.open(); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
		defer cancel()
		err = errors.Join(err, b.manager.Destroy(ctx))
	}()
	return b.serve(os.Stdin, os.Stdout)
}

// bed has the volumes.
type bed struct {
	policy *policy.Policy
	open   func() (*volume.Manager, error)

	mu      sync.Mutex // for manager, which destroy replaces
	manager *volume.Manager
}

// serve answers each request as soon as it is done, and returns when the input has ended and all are.
func (b *bed) serve(in io.Reader, out io.Writer) error {
	var writing sync.Mutex
	var working sync.WaitGroup
	defer working.Wait()
	encoder := json.NewEncoder(out)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var r testbed.Request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("request %q: %w", lines.Text(), err)
		}
		working.Go(func() {
			answer := b.answer(r)
			writing.Lock()
			defer writing.Unlock()
			// When nobody reads, the input ends soon.
			encoder.Encode(answer)
		})
	}
	return lines.Err()
}
