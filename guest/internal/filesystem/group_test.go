package filesystem

import (
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestGroupHasWhatKubeletWouldGiveIt(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ mode, want uint32 }{
		"a file":               {unix.S_IFREG | 0o600, 0o660},
		"a program":            {unix.S_IFREG | 0o755, 0o775},
		"a file for nobody":    {unix.S_IFREG, 0o660},
		"a setuid program":     {unix.S_IFREG | 0o4755, 0o4775},
		"a folder":             {unix.S_IFDIR | 0o700, 0o2770},
		"a sticky folder":      {unix.S_IFDIR | 0o1777, 0o3777},
		"a folder for nobody":  {unix.S_IFDIR, 0o2770},
		"a symbolic link":      {unix.S_IFLNK | 0o777, 0o777},
		"a pipe":               {unix.S_IFIFO | 0o600, 0o660},
		"a socket":             {unix.S_IFSOCK | 0o755, 0o775},
		"a block device":       {unix.S_IFBLK | 0o600, 0o660},
		"a character device":   {unix.S_IFCHR | 0o620, 0o660},
		"what it has already":  {unix.S_IFREG | 0o664, 0o664},
		"a folder of a group":  {unix.S_IFDIR | 0o2775, 0o2775},
		"a folder with setuid": {unix.S_IFDIR | 0o4700, 0o6770},
	} {
		e := entry{mode: c.mode, gid: 7}
		if got := e.permissions(); got != c.want {
			t.Errorf("%s with %#o gets %#o, want %#o", name, c.mode, got, c.want)
		}
		if e.belongsTo(8) {
			t.Errorf("%s belongs to another group", name)
		}
		if got, want := e.belongsTo(7), c.mode&0o7777 == c.want; got != want {
			t.Errorf("%s belongs to the group: %v, want %v", name, got, want)
		}
	}
}

func TestGroupMustBeOneAndThePolicyKnown(t *testing.T) {
	t.Parallel()
	root, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := setGroup(t.Context(), root, ^uint32(0), Always); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no group: %v", err)
	}
	if err := setGroup(t.Context(), root, 7, "Never"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown policy: %v", err)
	}
}
