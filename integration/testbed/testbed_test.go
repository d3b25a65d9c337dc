package testbed

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/sealvol/sealvol/policy"
)

func TestThePolicyIsOneThatTheGuestLoads(t *testing.T) {
	text, err := Policy(map[string]Volume{
		"plain": {Max: 1 << 20},
		"full":  {Layering: "memory-tags", Suites: []string{"aes-xts-random+hmac-sha256"}, FSType: "ext4", Options: []string{"sync"}, Min: 4096, Max: 8192},
	})
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := policy.Load(t.Context(), []byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	want := policy.Volume{
		Mode: policy.Ephemeral, Layering: policy.MemoryTags, Suites: []policy.Suite{policy.AESXTSRandomHMACSHA256}, FSType: policy.Ext4,
		Options: []policy.Option{policy.Sync, policy.NoSUID, policy.NoDev},
		Size:    policy.Size{Min: 4096, Max: 8192},
		Mounts:  []policy.Mount{{Container: "c", Path: "/mnt/full"}},
	}
	if diff := cmp.Diff(want, loaded.Volumes()["full"]); diff != "" {
		t.Error(diff)
	}
	if got := loaded.Volumes()["plain"].Size.Max; got != 1<<20 {
		t.Errorf("size %d", got)
	}
}

func TestClassesHaveTheirNames(t *testing.T) {
	for name, want := range map[string]codes.Code{
		"DataLoss": codes.DataLoss, "Unavailable": codes.Unavailable, "PermissionDenied": codes.PermissionDenied, "": codes.Unknown, "Nonsense": codes.Unknown,
	} {
		if got := class(name); got != want {
			t.Errorf("%q is %v", name, got)
		}
	}
}
