package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/sealvol/sealvol/plugin/published"
	"github.com/sealvol/sealvol/shim/hotplug"
)

// config is the plugin's configuration; nri.conf at the root of the repository
// documents it.
type config struct {
	handlers  handlerPatterns
	published published.Dir
	logLevel  slog.Level
}

// handlerPatterns are path.Match patterns of runtime handlers, all well formed.
type handlerPatterns []string

// match tells whether pods of a runtime handler may have sealed volumes. The
// default runtime's handler is empty and is matched only by an empty pattern:
// nobody who writes "*" means a runtime that he has not named.
func (patterns handlerPatterns) match(handler string) bool {
	for _, pattern := range patterns {
		if ok, _ := path.Match(pattern, handler); ok && (handler != "" || pattern == "") {
			return true
		}
	}
	return false
}

func defaultConfig() config {
	return config{handlers: handlerPatterns{"kata*"}, published: published.Root, logLevel: slog.LevelInfo}
}

// parseConfig reads a configuration. What it does not set is the default;
// unknown keys and values are an [errdefs.ErrInvalidArgument].
func parseConfig(text []byte) (config, error) {
	c := defaultConfig()
	wire := struct {
		RuntimeHandlers []string    `toml:"runtime_handlers"`
		PublishedDir    string      `toml:"published_dir"`
		LogLevel        *slog.Level `toml:"log_level"`
	}{c.handlers, string(c.published), &c.logLevel}
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&wire)
	if unknown := (*toml.StrictMissingError)(nil); errors.As(err, &unknown) {
		err = fmt.Errorf("unknown key %q", strings.Join(unknown.Errors[0].Key(), "."))
	}
	if err != nil {
		return config{}, fmt.Errorf("configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(wire.RuntimeHandlers) == 0 {
		return config{}, fmt.Errorf("configuration: runtime_handlers is empty: no pod could have a volume: %w", errdefs.ErrInvalidArgument)
	}
	for _, pattern := range wire.RuntimeHandlers {
		if _, err := path.Match(pattern, ""); err != nil {
			return config{}, fmt.Errorf("configuration: runtime_handlers: pattern %q: %w: %w", pattern, err, errdefs.ErrInvalidArgument)
		}
	}
	if err := hotplug.CheckPath(wire.PublishedDir); err != nil {
		return config{}, fmt.Errorf("configuration: published_dir %w: %w", err, errdefs.ErrInvalidArgument)
	}
	c.handlers, c.published = wire.RuntimeHandlers, published.Dir(wire.PublishedDir)
	return c, nil
}
