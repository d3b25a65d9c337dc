// Package config reads the shim's configuration, /etc/sealvol/shim.toml.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

const (
	// Path is where the configuration is. Without that file the defaults count.
	Path = "/etc/sealvol/shim.toml"
	// Env names another file, which must be there.
	Env = "SEALVOL_SHIM_CONFIG"
)

// Config is the configuration. Each path is absolute and clean.
type Config struct {
	// StockShim is the Kata shim that ours fronts.
	StockShim string `toml:"stock_shim"`
	// StateDir holds a folder for each sandbox. It should not outlive a boot.
	StateDir string `toml:"state_dir"`
	// LogLevel is debug, info, warn or error.
	LogLevel slog.Level `toml:"log_level"`
}

// Load reads the configuration. One that does not fit is an errdefs.ErrInvalidArgument.
func Load() (Config, error) {
	config := Config{
		StockShim: "/opt/kata/bin/containerd-shim-kata-v2",
		StateDir:  "/run/sealvol/shim",
	}
	file, named := os.LookupEnv(Env)
	if !named {
		file = Path
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return config, nil
	}
	if err != nil {
		return Config{}, err
	}
	decoder := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := decoder.Decode(&config); err != nil {
		var unknown *toml.StrictMissingError
		if errors.As(err, &unknown) {
			err = errors.New(unknown.String())
		}
		return Config{}, fmt.Errorf("%s: %v: %w", file, err, errdefs.ErrInvalidArgument)
	}
	for key, path := range map[string]string{"stock_shim": config.StockShim, "state_dir": config.StateDir} {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			return Config{}, fmt.Errorf("%s: %s = %q is not an absolute, clean path: %w", file, key, path, errdefs.ErrInvalidArgument)
		}
	}
	return config, nil
}
