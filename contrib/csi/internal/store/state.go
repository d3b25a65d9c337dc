package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	strictjson "sigs.k8s.io/json"

	"github.com/sealvol/sealvol/shim/hotplug"
)

const (
	version = 1
	maxSize = 4096 // of volume.json, in bytes
)

// state is what volume.json says.
type state struct {
	id    string
	bytes int64
}

type wireState struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Bytes   int64  `json:"bytes"`
}

func readState(path string) (state, error) {
	file, err := os.Open(path)
	if err != nil {
		return state{}, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxSize+1))
	if err != nil {
		return state{}, err
	}
	s, err := parseState(data)
	if err != nil {
		return state{}, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// parseState reads volume.json. That of a newer driver is an errdefs.ErrFailedPrecondition,
// whatever else it has that is not known here.
func parseState(data []byte) (state, error) {
	if len(data) > maxSize {
		return state{}, fmt.Errorf("more than %d bytes", maxSize)
	}
	if !utf8.Valid(data) {
		return state{}, errors.New("not UTF-8")
	}
	var newer struct{ Version int }
	if json.Unmarshal(data, &newer) == nil && newer.Version > version {
		return state{}, fmt.Errorf("version %d, not %d: update the driver: %w", newer.Version, version, errdefs.ErrFailedPrecondition)
	}
	var wire wireState
	strict, err := strictjson.UnmarshalStrict(data, &wire)
	if err := errors.Join(append(strict, err)...); err != nil {
		return state{}, errors.New(strings.ReplaceAll(err.Error(), "\n", ", "))
	}
	switch {
	case wire.Version != version:
		return state{}, fmt.Errorf("version %d, not %d", wire.Version, version)
	case wire.Bytes <= 0:
		return state{}, fmt.Errorf("%d bytes", wire.Bytes)
	}
	return state{wire.ID, wire.Bytes}, hotplug.CheckName(wire.ID)
}

func (s state) encode() ([]byte, error) { return json.Marshal(wireState{version, s.id, s.bytes}) }
