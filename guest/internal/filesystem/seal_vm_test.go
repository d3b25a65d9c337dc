//go:build vm

package filesystem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

func TestVMAFileSystemIsMadeMountedAndMountedAgain(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		for name, size := range map[string]uint64{"the smallest": kind.MinBytes(), "1 GiB": 1 << 30, "10 GiB": 10 << 30, "20 GiB": 20 << 30, "100 GiB": 100 << 30} {
			t.Run(name, func(t *testing.T) {
				v := sealed(t, size)
				said := complaints(t, func() {
					format(t, kind, v)
					m := open(t, kind, v)
					st, err := m.Usage()
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("size %.2f %%, free %.2f %%, available %.2f %%, %d inodes", percent(st.Blocks, size), percent(st.Bfree, size), percent(st.Bavail, size), st.Files)
					if size >= 10<<30 && percent(st.Bavail, size) < 98 {
						t.Errorf("%d of %d bytes are available", st.Bavail*BlockBytes, size)
					}
					if err := os.WriteFile(filepath.Join(dir(m), "f"), []byte("content"), 0o600); err != nil {
						t.Fatal(err)
					}
					if err := closed(t, m); err != nil {
						t.Error(err)
					}
					m = open(t, kind, v)
					got, err := os.ReadFile(filepath.Join(dir(m), "f"))
					if err != nil || string(got) != "content" {
						t.Errorf("read %q, %v", got, err)
					}
					if err := closed(t, m); err != nil {
						t.Error(err)
					}
				})
				if said != nil {
					t.Errorf("the kernel says %q", said)
				}
			})
		}
	})
}

func percent(blocks, size uint64) float64 { return 100 * float64(blocks*BlockBytes) / float64(size) }

// TestVMInUseNothingIsReadThatWasNotWritten has sixteen workers make, verify and delete trees of files, with the caches dropped again and
// again, on a volume of which every block that was not written is an error.
func TestVMInUseNothingIsReadThatWasNotWritten(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		v := sealed(t, 20<<30)
		format(t, kind, v)
		said := complaints(t, func() {
			const rounds = 3
			for round := range rounds {
				m := open(t, kind, v)
				var workers sync.WaitGroup
				for i := range 16 {
					workers.Go(func() {
						if err := work(filepath.Join(dir(m), fmt.Sprint("worker", i)), round); err != nil {
							t.Errorf("round %d, worker %d: %v", round, i, err)
						}
					})
				}
				workers.Wait()
				if err := trim(m); !errors.Is(err, unix.EOPNOTSUPP) {
					t.Errorf("a discard gives %v", err)
				}
				if err := closed(t, m); err != nil {
					t.Error(err)
				}
			}
		})
		if said != nil {
			t.Errorf("the kernel says %q", said)
		}
	})
}

// TestVMInodesMadeAtOnceDoNotReadTheTable has files made in folders that are neighbours, so that their inodes share blocks of a table.
func TestVMInodesMadeAtOnceDoNotReadTheTable(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		m := newMount(t, kind)
		said := complaints(t, func() {
			var workers sync.WaitGroup
			for i := range 16 {
				folder := filepath.Join(dir(m), "a", "b", fmt.Sprint(i))
				must(t, os.MkdirAll(folder, 0o755))
				workers.Go(func() {
					for k := range 1000 {
						if err := unix.Mknod(filepath.Join(folder, fmt.Sprint(k)), unix.S_IFREG|0o600, 0); err != nil {
							t.Errorf("worker %d, file %d: %v", i, k, err)
							return
						}
					}
				})
			}
			workers.Wait()
			if err := closed(t, m); err != nil {
				t.Error(err)
			}
		})
		if said != nil {
			t.Errorf("the kernel says %q", said)
		}
	})
}

// work leaves one file that the next round reads, and of this round's tree a part.
func work(dir string, round int) error {
	const folders, files = 8, 10
	for i := range folders {
		folder := filepath.Join(dir, fmt.Sprint(round), fmt.Sprint(i), strings.Repeat("long name ", 20))
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
		for k := range files {
			name := filepath.Join(folder, fmt.Sprint(k))
			if err := os.WriteFile(name, content(name, k*3000), 0o600); err != nil {
				return err
			}
			if err := unix.Setxattr(name, "user.x", content(name, 50*k), 0); err != nil {
				return err
			}
		}
		if err := os.Symlink(strings.Repeat("far/", 200), filepath.Join(folder, "link")); err != nil {
			return err
		}
		if i%4 == 3 {
			unix.Sync()
			if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
				return err
			}
		}
		for k := range files {
			name := filepath.Join(folder, fmt.Sprint(k))
			got, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if !bytes.Equal(got, content(name, k*3000)) {
				return fmt.Errorf("%s reads wrong", name)
			}
		}
		if i%3 > 0 {
			if err := os.RemoveAll(folder); err != nil {
				return err
			}
		}
	}
	// A file with holes that grows in its middle, with blocks that are allocated and not written.
	f, err := os.OpenFile(filepath.Join(dir, "sparse"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 1<<20, 1<<20); err != nil {
		return err
	}
	part := content("sparse", 100)
	if _, err := f.WriteAt(part, 1<<20+int64(round)*10000+7); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	whole, err := io.ReadAll(io.NewSectionReader(f, 0, 2<<20))
	if err != nil {
		return err
	}
	for r := range round + 1 {
		at := 1<<20 + r*10000 + 7
		if !bytes.Equal(whole[at:at+len(part)], part) {
			return fmt.Errorf("what round %d wrote reads wrong", r)
		}
		clear(whole[at : at+len(part)])
	}
	if len(bytes.Trim(whole, "\x00")) != 0 {
		return errors.New("holes are not zeros")
	}
	return nil
}

// content is n bytes that belong to a name.
func content(name string, n int) []byte {
	return bytes.Repeat([]byte(name+"\n"), n/len(name)+1)[:n]
}

// trim asks for a discard of all free space, as fstrim(8) does.
func trim(m *Mount) error {
	const fitrim = 0xc0185879 // FITRIM of linux/fs.h; its struct fstrim_range has start, length and least length
	return ioctl(m.root, fitrim, &[3]uint64{0, ^uint64(0), 0})
}

// TestVMAProgramThatReadsWhatWasNeverWrittenGetsErrors is what SECURITY.md says of such programs. None of them is of use on a volume that
// dies with its pod, and none gets bytes of the host's.
func TestVMAProgramThatReadsWhatWasNeverWrittenGetsErrors(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		v := sealed(t, 1<<30)
		format(t, kind, v)
		m := open(t, kind, v)
		if err := work(filepath.Join(dir(m), "w"), 0); err != nil {
			t.Fatal(err)
		}
		if err := closed(t, m); err != nil {
			t.Fatal(err)
		}
		for _, c := range readers(kind, v.Node()) {
			said := complaints(t, func() {
				output, err := exec.Command(c.program, c.args...).CombinedOutput()
				t.Logf("%s %q: %v\n%.400s", c.program, c.args, err, output)
				if ok := err == nil; ok != c.succeeds {
					t.Errorf("%s succeeds: %v, want %v", c.program, ok, c.succeeds)
				}
			})
			t.Logf("the kernel says %q", said)
		}
		f, err := blockdev.Open(v.Node(), v.Number, os.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		block := make([]byte, BlockBytes)
		if n, err := f.ReadAt(block, int64(v.Bytes)/4*3-5*BlockBytes); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EILSEQ) {
			t.Errorf("a block that was never written: %d bytes, %v", n, err)
		}
		if len(bytes.Trim(block, "\x00")) != 0 {
			t.Error("the failed read left something")
		}
	})
}

type reader struct {
	program  string
	args     []string
	succeeds bool
}

func readers(kind Type, node string) []reader {
	list := []reader{
		{"/usr/sbin/blkid", []string{"-p", node}, false},
		{"/usr/bin/dd", []string{"if=" + node, "of=/dev/null", "bs=1M"}, false},
	}
	if kind == XFS {
		return append(list, reader{"/usr/sbin/xfs_repair", []string{"-n", node}, false}, reader{"/usr/sbin/xfs_db", []string{"-r", "-c", "check", node}, true})
	}
	return append(list, reader{"/usr/sbin/e2fsck", []string{"-fn", node}, true}, reader{"/usr/sbin/dumpe2fs", []string{node}, true})
}

func TestVMADiskThatTakesNoMoreWritesIsAnErrorOfClose(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		for name, synced := range map[string]bool{"with files in the cache alone": false, "with metadata in the cache alone": true} {
			t.Run(name, func(t *testing.T) {
				v := sealed(t, 1<<30)
				format(t, kind, v)
				m := open(t, kind, v)
				if err := work(filepath.Join(dir(m), "w"), 0); err != nil {
					t.Fatal(err)
				}
				if synced {
					if err := unix.Syncfs(int(m.root.Fd())); err != nil {
						t.Fatal(err)
					}
					if err := os.Chmod(dir(m), 0o711); err != nil {
						t.Fatal(err)
					}
					if kind == XFS {
						// Now the change is in the log, and nowhere else.
						if err := unix.Syncfs(int(m.root.Fd())); err != nil {
							t.Fatal(err)
						}
					}
				}
				v.noMoreWrites(t)
				if err := closed(t, m); err == nil {
					t.Error("closed")
				}
				// Nobody uses the device any more: unmounting did not wait for ever.
				if err := blockdev.WaitUnused(t.Context(), v.Node(), v.Number); err != nil {
					t.Error(err)
				}
			})
		}
	})
}

func TestVMADamagedFileSystemIsNotClosedCleanly(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		v := sealed(t, 1<<30)
		format(t, kind, v)
		m := open(t, kind, v)
		if err := work(filepath.Join(dir(m), "w"), 0); err != nil {
			t.Fatal(err)
		}
		if err := closed(t, m); err != nil {
			t.Fatal(err)
		}
		m = open(t, kind, v)
		dropCaches(t)
		v.damage(t)
		if _, err := os.ReadDir(filepath.Join(dir(m), "w", "0", "0")); err == nil {
			t.Error("a folder that was damaged reads")
		} else {
			t.Log(err)
		}
		if err := os.WriteFile(filepath.Join(dir(m), "new"), []byte("x"), 0o600); err == nil {
			t.Log("a file was made")
		}
		// An xfs whose metadata does not read has changed nothing.
		if err := closed(t, m); kind == Ext4 && !errdefs.IsDataLoss(err) {
			t.Errorf("closed: %v", err)
		}
		start := time.Now()
		if m, err := kind.Open(t.Context(), v.Link(), v.Node(), v.Number, Options{}); err == nil {
			t.Error("opened again")
			closed(t, m)
		} else {
			t.Logf("%v after %v", err, time.Since(start))
		}
	})
}

func TestVMAMountThatFailsLeavesNothing(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		v := sealed(t, 1<<30)
		number := v.Number
		for _, c := range []struct {
			name string
			open func(context.Context) (*Mount, error)
		}{
			{"nothing was written", func(ctx context.Context) (*Mount, error) {
				return kind.Open(ctx, v.Link(), v.Node(), number, Options{})
			}},
			{"an option that it does not know", func(ctx context.Context) (*Mount, error) {
				format(t, kind, v)
				return kind.Open(ctx, v.Link(), v.Node(), number, Options{Flags: []string{"no_such_option"}})
			}},
			{"another device", func(ctx context.Context) (*Mount, error) {
				return kind.Open(ctx, v.Link(), v.Node(), blockdev.Number{Major: 1, Minor: 1}, Options{})
			}},
			{"another file system", func(ctx context.Context) (*Mount, error) {
				other := map[Type]Type{Ext4: XFS, XFS: Ext4}[kind]
				format(t, kind, v)
				return other.Open(ctx, v.Link(), v.Node(), number, Options{})
			}},
			{"the context has ended", func(ctx context.Context) (*Mount, error) {
				ctx, cancel := context.WithCancel(ctx)
				cancel()
				return kind.Open(ctx, v.Link(), v.Node(), number, Options{})
			}},
			{"no file system at all", func(ctx context.Context) (*Mount, error) {
				return Type("vfat").Open(ctx, v.Link(), v.Node(), number, Options{})
			}},
		} {
			m, err := c.open(t.Context())
			if err == nil {
				t.Errorf("%s: mounted", c.name)
				closed(t, m)
				continue
			}
			t.Logf("%s: %v", c.name, err)
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: not one line", c.name)
			}
			if err := blockdev.WaitUnused(t.Context(), v.Node(), v.Number); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	})
}

func TestVMCloseNamesWhoStillWrites(t *testing.T) {
	eachType(t, func(t *testing.T, kind Type) {
		v := sealed(t, 1<<30)
		format(t, kind, v)
		m := open(t, kind, v)
		place, err := NewPlace(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		undo(t, func(context.Context) error { return place.Close() })
		at := filepath.Join(place.dir, "v")
		if err := m.Attach(at); err != nil {
			t.Fatal(err)
		}
		// Another mount namespace with a file open, as a container that does not go.
		elsewhere := exec.Command("unshare", "--mount", "--propagation", "unchanged", "sh", "-c", "mount --bind "+at+" /mnt && exec 3>/mnt/f && echo && exec sleep 1000")
		out, err := elsewhere.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := elsewhere.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err = m.Close(ctx)
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), fmt.Sprint("still mounted by process ", elsewhere.Process.Pid)) {
			t.Errorf("closed: %v", err)
		}
		elsewhere.Process.Kill()
		elsewhere.Wait()
		if err := blockdev.WaitUnused(t.Context(), v.Node(), v.Number); err != nil {
			t.Error(err)
		}
	})
}

func TestVMACopyThatEndsLeavesTheDeviceAlone(t *testing.T) {
	v := sealed(t, 1<<30)
	image := newImage(t, XFS, v.Bytes)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := image.CopyTo(ctx, v.Node()); !errors.Is(err, context.Canceled) {
		t.Errorf("context has ended: %v", err)
	}
	v.noMoreWrites(t)
	if err := image.CopyTo(t.Context(), v.Node()); !errors.Is(err, unix.EIO) {
		t.Errorf("a disk that takes no writes: %v", err)
	}
	if err := blockdev.WaitUnused(t.Context(), v.Node(), v.Number); err != nil {
		t.Error(err)
	}
}
