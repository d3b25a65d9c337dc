//go:build vm

package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"golang.org/x/sys/unix"
)

// startDriver runs the driver as a node does, and gives its socket, and the end of
// it with its log.
func startDriver(t *testing.T, dir string, end os.Signal) (socket string, stop func() (log string, err error)) {
	t.Helper()
	socket = filepath.Join(dir, "csi.sock")
	config := filepath.Join(dir, "csi.toml")
	text := fmt.Sprintf("socket = %q\nvolumes = %q\npublished = %q\nbundles = %q\n",
		socket, filepath.Join(dir, "volumes"), filepath.Join(dir, "published"), filepath.Join(dir, "bundles"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	driver := exec.Command("/proc/self/exe", "-config", config, "-node", "node-1")
	driver.Env = []string{runAsDriver + "=1"}
	var log bytes.Buffer
	driver.Stderr = &log
	if err := driver.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- driver.Wait() }()
	stop = sync.OnceValues(func() (string, error) {
		_ = driver.Process.Signal(end)
		err := <-done
		return log.String(), err
	})
	t.Cleanup(func() {
		if log, _ := stop(); t.Failed() {
			t.Log(log)
		}
	})
	for range 1000 {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
			return socket, stop
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the driver does not answer")
	return "", nil
}

// disk is a file system with room for volumes.
func disk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1g"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// loops are the loop devices that have a file.
func loops(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// What the driver does not claim to do, by csi-sanity's words.
var unclaimed = regexp.MustCompile(`(?i)snapshot|clon|modify ?volume|controllerpublish|controllerunpublish|controller publish|GroupController|NodeGetStorageHealth|testnodevolumeattachlimit|readonly field`)

// csi-sanity is the specification's own test of drivers. It runs once with file
// systems and once with block devices.
func TestVMCSISanity(t *testing.T) {
	dir := disk(t)
	socket, stop := startDriver(t, dir, unix.SIGTERM)
	before := len(loops(t))

	secrets := filepath.Join(dir, "secrets.yaml")
	text := "NodePublishVolumeSecret: {key: never-in-a-log}\nCreateVolumeSecret: {key: never-in-a-log}\nNodeStageVolumeSecret: {key: never-in-a-log}\n"
	if err := os.WriteFile(secrets, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	gomega.RegisterFailHandler(ginkgo.Fail)
	for _, access := range []string{"mount", "block"} {
		ginkgo.Describe(access, func() {
			config := sanity.NewTestConfig()
			config.Address = "unix:" + socket
			config.TargetPath = filepath.Join(dir, access+"-target")
			config.StagingPath = filepath.Join(dir, access+"-staging")
			config.TestVolumeSize = 16 << 20
			config.TestVolumeExpandSize = 32 << 20
			config.TestVolumeAccessType = access
			config.SecretsFile = secrets
			context := sanity.GinkgoTest(&config)
			ginkgo.AfterAll(context.Finalize)
		}, ginkgo.Ordered, ginkgo.ContinueOnFailure)
	}
	var passed, skipped, pending int
	ginkgo.ReportAfterSuite("count", func(report ginkgo.Report) {
		for _, spec := range report.SpecReports {
			switch {
			case spec.LeafNodeType != types.NodeTypeIt:
			case spec.State == types.SpecStatePassed:
				passed++
			case spec.State == types.SpecStatePending: // csi-sanity's own choice
				pending++
			case spec.State == types.SpecStateSkipped:
				skipped++
				if !unclaimed.MatchString(spec.Failure.Message) {
					t.Errorf("%s was left out: %s", spec.FullText(), spec.Failure.Message)
				}
			}
		}
	})
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.NoColor, reporter.Succinct = true, true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
	t.Logf("%d specs passed, %d are of what the driver does not claim, %d are switched off by csi-sanity itself", passed, skipped, pending)

	log, err := stop()
	if err != nil {
		t.Errorf("the driver ended with %v", err)
	}
	if strings.Contains(log, "never-in-a-log") {
		t.Errorf("the driver's log has a secret:\n%s", log)
	}
	for _, left := range []string{"volumes/*/*", "volumes/.[ng]*", "published/*", "*-target", "*-staging"} {
		if found, err := filepath.Glob(filepath.Join(dir, left)); err != nil || len(found) > 0 {
			t.Errorf("there is still %s (%v)", strings.Join(found, ", "), err)
		}
	}
	if after := loops(t); len(after) != before {
		t.Errorf("there are loop devices %v", after)
	}
}
