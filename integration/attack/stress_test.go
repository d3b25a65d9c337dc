//go:build vm

package attack

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// stressVariable makes the stress run longer: how many MiB each run of workers writes.
const stressVariable = "SEALVOL_STRESS_MIB"

// TestTreesOfFilesUnderStress writes, verifies and removes trees of files, by one worker and by many, on a volume that is larger than the
// guest's memory. With SEALVOL_STRESS_MIB=4096, say, what is written is, too.
func TestTreesOfFilesUnderStress(t *testing.T) {
	size := 16
	if s := os.Getenv(stressVariable); s != "" {
		var err error
		if size, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	if total := meminfo(t, "MemTotal"); total >= largeBytes {
		t.Fatalf("the machine has %d MiB of memory, the volume %d", total/mib, largeBytes/mib)
	}
	play(t, all, func(a *arena) {
		volume := a.name + largeOf
		a.open(volume, large)
		a.at(volume, func(dir string) {
			for _, workers := range []int{1, 16} {
				tree := filepath.Join(dir, fmt.Sprint(workers))
				if err := os.Mkdir(tree, 0o700); err != nil {
					a.Fatal(err)
				}
				job := func(options ...string) {
					run(a.T, "fio", append([]string{
						"--name=w", "--directory=" + tree, fmt.Sprint("--numjobs=", workers), fmt.Sprintf("--size=%dm", size/workers), "--nrfiles=32",
						"--openfiles=8", "--filename_format=$jobnum/$filenum", "--file_service_type=random", "--rw=randwrite", "--bsrange=4k-64k",
						"--fallocate=none", "--verify=crc32c", "--randseed=7", "--group_reporting", "--thread",
					}, options...)...)
				}
				job("--do_verify=0", "--end_fsync=1")
				job("--verify_only", "--verify_fatal=1", "--direct=1") // from the disk
				if err := os.RemoveAll(tree); err != nil {
					a.Fatal(err)
				}
			}
		})
		a.sound(volume)
	})
}
