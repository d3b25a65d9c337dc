// Package qmp speaks to QEMU, which is the host that plugs disks in, takes them out and serves them, well or badly: to the one of the machine
// that a test runs in (integration/vmrun), and to those of a node's sandboxes.
package qmp

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
)

// Monitor is QEMU's monitor. It may be used by several goroutines at once.
type Monitor struct {
	mu   sync.Mutex
	conn io.ReadWriteCloser
	in   *bufio.Reader
}

// Open returns the monitor of this machine. There is one: QEMU greets once.
var Open = sync.OnceValues(func() (*Monitor, error) {
	file, err := os.OpenFile("/dev/virtio-ports/qmp", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return greet(file)
})

// Dial returns the monitor that a QEMU of this machine serves at a socket, to one client at a time.
func Dial(socket string) (*Monitor, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	m, err := greet(conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

func greet(conn io.ReadWriteCloser) (*Monitor, error) {
	m := &Monitor{conn: conn, in: bufio.NewReader(conn)}
	if _, err := m.in.ReadString('\n'); err != nil {
		return nil, err
	}
	return m, m.Execute("qmp_capabilities", nil)
}

// Close hangs up.
func (m *Monitor) Close() error { return m.conn.Close() }

// Execute sends a command and waits for its answer.
func (m *Monitor) Execute(command string, arguments any) error {
	_, err := m.execute(command, arguments, "")
	return err
}

// Human sends a command of the monitor that people type in, and returns what it prints.
func (m *Monitor) Human(line string) (string, error) {
	answer, err := m.execute("human-monitor-command", map[string]any{"command-line": line}, "")
	if err != nil {
		return "", err
	}
	var said string
	if err := json.Unmarshal(answer, &said); err != nil {
		return "", fmt.Errorf("%s: %w", line, err)
	}
	return said, nil
}

// Unplug takes a disk out and returns when the guest has let it go.
func (m *Monitor) Unplug(disk int) error { return m.Delete(ID(disk)) }

// Delete takes a device out and returns when the guest has let it go.
func (m *Monitor) Delete(id string) error {
	_, err := m.execute("device_del", map[string]any{"id": id}, "DEVICE_DELETED")
	return err
}

// Plug puts a disk in at a PCI path, for example "02/01". A full disk of the host's is an I/O error in the guest, as with vmrun's own.
func (m *Monitor) Plug(disk int, path string) error {
	bridge, slot, _ := strings.Cut(path, "/")
	n, err := strconv.ParseUint(bridge, 16, 8)
	if err != nil {
		return fmt.Errorf("PCI path %s: %w", path, err)
	}
	return m.Execute("device_add", map[string]any{
		"driver": "virtio-blk-pci", "id": ID(disk), "drive": ID(disk), "bus": fmt.Sprintf("bridge%d", n), "addr": "0x" + slot,
		"werror": "report",
	})
}

// ID is what vmrun calls a disk: both the device and the node behind it.
func ID(disk int) string { return fmt.Sprintf("disk%d", disk) }

// FileID is what vmrun calls the node of a disk's file, which stands behind the disk's.
func FileID(disk int) string { return fmt.Sprintf("file%d", disk) }

// execute sends a command and waits for its answer and, if one is named, for an event.
func (m *Monitor) execute(command string, arguments any, event string) (json.RawMessage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	message, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return nil, err
	}
	if _, err := m.conn.Write(append(message, '\n')); err != nil {
		return nil, err
	}
	var result json.RawMessage
	for result == nil || event != "" {
		line, err := m.in.ReadBytes('\n')
		if err != nil {
			return nil, err
		}
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
			Event string `json:"event"`
			Data  struct {
				Device string `json:"device"`
			} `json:"data"`
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return nil, fmt.Errorf("%s: %w", command, err)
		}
		switch {
		case answer.Error != nil:
			return nil, errors.New(command + ": " + answer.Error.Desc)
		case answer.Return != nil:
			result = answer.Return
		case answer.Event == event && answer.Data.Device != "":
			event = ""
		}
	}
	return result, nil
}
