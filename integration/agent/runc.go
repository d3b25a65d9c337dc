package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// runc runs the runc binary found in PATH.
type runc struct {
	root    string // runc's state directory
	noPivot bool
}

// run executes one runc command. A nil stdio means /dev/null. runc shares
// standard error with the container, so its own message comes from a log file.
func (r runc) run(ctx context.Context, stdio *childFiles, args ...string) error {
	if err := os.MkdirAll(r.root, 0o700); err != nil {
		return err
	}
	log, err := os.CreateTemp(stateDir, "runc-*.log")
	if err != nil {
		return err
	}
	defer os.Remove(log.Name())
	defer log.Close()
	cmd := exec.CommandContext(ctx, "runc", append([]string{"--root", r.root, "--log", log.Name(), "--log-format", "json"}, args...)...)
	if stdio != nil {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio.in, stdio.out, stdio.err
	}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("runc %s: %w: %s", args[0], err, lastMessage(log.Name()))
	}
	return nil
}

// spawn runs a runc command that leaves a process behind (create, or exec
// --detach) and returns the process, connected to its standard I/O. The
// process belongs to this one from then on.
func (r runc) spawn(ctx context.Context, terminal bool, verb, id string, args ...string) (_ *process, err error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(stateDir, "spawn-") // short: the path of a socket has 107 bytes at most
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	pidFile := filepath.Join(dir, "pid")
	args = append([]string{verb, "--pid-file", pidFile}, args...)

	var io *stdio
	var child *childFiles
	var console *consoleSocket
	if terminal {
		if console, err = listenConsole(filepath.Join(dir, "tty")); err != nil {
			return nil, err
		}
		defer console.Close()
		args = append(args, "--console-socket", console.path)
	} else {
		if io, child, err = newPipes(); err != nil {
			return nil, err
		}
		defer child.Close()
	}
	defer func() {
		if err != nil && io != nil {
			io.Close()
		}
	}()
	if err := r.run(ctx, child, append(args, id)...); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, fmt.Errorf("pid file: %w", err)
	}
	if terminal {
		if io, err = console.receive(); err != nil {
			return nil, err
		}
	}
	return watch(pid, io)
}

// lastMessage returns the last line of a runc log in JSON.
func lastMessage(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	var entry struct{ Msg string }
	if json.Unmarshal(lines[len(lines)-1], &entry) != nil {
		return string(lines[len(lines)-1])
	}
	return entry.Msg
}
