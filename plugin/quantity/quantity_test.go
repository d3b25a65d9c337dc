package quantity

import (
	"strings"
	"testing"
)

func TestBytes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"1": 1, "1Gi": 1 << 30, "1.5Gi": 3 << 29, "2G": 2e9, "3e6": 3e6, "0.5": 1, "1Ei": 1 << 60} {
		if got, err := Bytes(text); err != nil || got != want {
			t.Errorf("%q is %d (%v), not %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "big", "0", "0.0Gi", "-1Gi", "+1Gi", "1m", "1500m", "1GB", "1 Gi", "1Gi\n", "8Ei", "1e99", ".5Gi"} {
		if got, err := Bytes(text); err == nil {
			t.Errorf("%q is %d (%v)", text, got, err)
		}
	}
}

// Kubernetes' parser writes out what an exponent stands for: these would take
// minutes and gigabytes of a daemon that runs as root.
func TestAttackASizeThatTakesAllMemory(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"1.1111111111111111111111e100000000", "1e2000000000", "1.1111111111111111111111e2000000000", "1E-2000000000",
		"1" + strings.Repeat("0", 1<<20), "0." + strings.Repeat("0", 1<<20) + "1",
	} {
		got, err := Bytes(text)
		if err == nil {
			t.Errorf("%.40q is %d (%v)", text, got, err)
		} else if len(err.Error()) > 200 {
			t.Errorf("the refusal repeats %d bytes", len(err.Error()))
		}
	}
}

func FuzzBytes(f *testing.F) {
	f.Add("1.5Gi")
	f.Add("1e99")
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := Bytes(text); err == nil && (got <= 0 || len(text) > 64) {
			t.Fatalf("%q is %d bytes", text, got)
		}
	})
}
