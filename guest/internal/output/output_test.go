package output

import (
	"os/exec"
	"strings"
	"testing"
)

func TestTextIsWhatAProgramSaid(t *testing.T) {
	t.Parallel()
	for script, want := range map[string]string{
		"echo one; echo two >&2":              "one\ntwo",
		"true":                                "",
		"head -c 9000 /dev/zero | tr '\\0' x": strings.Repeat("x", maxBytes),
	} {
		file, err := New()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		cmd := exec.Command("sh", "-c", script)
		cmd.Stdout, cmd.Stderr = file, file
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if got := Text(file); got != want {
			t.Errorf("%s: %q", script, got)
		}
	}
}
