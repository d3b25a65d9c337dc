package luks2

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// sh stands in for cryptsetup: its action is a file of commands.
const sh = process("/bin/sh")

func script(t *testing.T, text string) (action string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func tempFile(t *testing.T) *os.File {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "header")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

func TestCryptsetupGetsHeaderKeyAndNothingElse(t *testing.T) {
	t.Setenv("SECRET", "of the parent")
	dir := t.TempDir()
	commands := script(t, `cd `+dir+`
printf '%s\n' "$@" >args
tr '\0' '\n' </proc/$$/environ >env
wc -c | tr -d ' ' >key
printf header >/proc/self/fd/3
`)
	header, key := tempFile(t), newKey(t, KeyBytes)
	if err := sh.run(t.Context(), header, key, commands, "--flag", "node"); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, name := range []string{"args", "env", "key"} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		got[name] = string(content)
	}
	want := map[string]string{
		"args": "--batch-mode\n--type=luks2\n--disable-locks\n--header=/proc/self/fd/3\n--key-file=-\n--keyfile-size=64\n--flag\nnode\n",
		"env":  "DM_DISABLE_UDEV=1\nLC_ALL=C\n",
		"key":  "64\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if content, err := os.ReadFile(header.Name()); err != nil || string(content) != "header" {
		t.Errorf("header %q, %v", content, err)
	}
}

func TestCryptsetupFails(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		script string
		is     func(error) bool
	}{
		"wrong parameters": {"exit 1", func(err error) bool { return !errdefs.IsUnauthorized(err) }},
		"wrong key":        {"exit 2", errdefs.IsUnauthorized},
		"no memory":        {"exit 3", errdefs.IsResourceExhausted},
		"wrong device":     {"exit 4", errdefs.IsFailedPrecondition},
		"device in use":    {"exit 5", errdefs.IsAlreadyExists},
		"killed":           {"kill -9 $$", func(err error) bool { return strings.Contains(err.Error(), "killed") }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := sh.run(t.Context(), tempFile(t), newKey(t, KeyBytes), script(t, "echo one >&2\necho two\n"+c.script))
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), `"one\ntwo"`) || strings.Contains(err.Error(), "\n") {
				t.Error(err)
			}
		})
	}
	t.Run("not there", func(t *testing.T) {
		t.Parallel()
		if err := process("/nowhere/cryptsetup").run(t.Context(), tempFile(t), newKey(t, KeyBytes), "open"); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	})
	t.Run("key is destroyed", func(t *testing.T) {
		t.Parallel()
		key := newKey(t, KeyBytes)
		key.Destroy()
		if err := sh.run(t.Context(), tempFile(t), key, script(t, "exit 0")); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	})
}

func TestCryptsetupEndsWithTheContext(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"told to":        "trap 'exit 0' TERM\n>started\nwhile :; do sleep 0.01; done\n",
		"when it is not": "trap '' TERM\n>started\nwhile :; do sleep 0.01; done\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			dir := t.TempDir()
			done := make(chan error)
			header, key := tempFile(t), newKey(t, KeyBytes)
			commands := script(t, "cd "+dir+"\n"+text)
			go func() { done <- sh.run(ctx, header, key, commands) }()
			for {
				if _, err := os.Stat(filepath.Join(dir, "started")); err == nil {
					break
				}
			}
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
}
