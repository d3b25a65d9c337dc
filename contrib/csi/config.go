package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/sealvol/sealvol/contrib/csi/internal/sandboxes"
	"github.com/sealvol/sealvol/plugin/published"
	"github.com/sealvol/sealvol/plugin/quantity"
	"github.com/sealvol/sealvol/shim/hotplug"
)

// config is the driver's configuration; csi.toml documents it.
type config struct {
	driver    string
	socket    string
	volumes   string
	capacity  int64 // bytes, 0: what the file system has
	published string
	bundles   string
	logLevel  slog.Level
}

// driverRE is a name of the specification's that is also a part of a label's key.
var driverRE = regexp.MustCompile(`^[a-z]([-.a-z0-9]{0,50}[a-z0-9])?$`)

func defaultConfig() config {
	return config{
		driver:    "coco-local-csi",
		socket:    "/var/lib/kubelet/plugins/coco-local-csi/csi.sock",
		volumes:   "/var/lib/sealvol/csi",
		published: published.Root,
		bundles:   sandboxes.Bundles,
		logLevel:  slog.LevelInfo,
	}
}

// parseConfig reads a configuration. What it does not set is the default; unknown
// keys and values are an [errdefs.ErrInvalidArgument].
func parseConfig(text []byte) (config, error) {
	c := defaultConfig()
	var capacity string
	wire := struct {
		Driver    *string     `toml:"driver"`
		Socket    *string     `toml:"socket"`
		Volumes   *string     `toml:"volumes"`
		Capacity  *string     `toml:"capacity"`
		Published *string     `toml:"published"`
		Bundles   *string     `toml:"bundles"`
		LogLevel  *slog.Level `toml:"log_level"`
	}{&c.driver, &c.socket, &c.volumes, &capacity, &c.published, &c.bundles, &c.logLevel}
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&wire)
	if unknown := (*toml.StrictMissingError)(nil); errors.As(err, &unknown) {
		err = fmt.Errorf("unknown key %q", strings.Join(unknown.Errors[0].Key(), "."))
	}
	if err == nil {
		c.capacity, err = parseCapacity(capacity)
	}
	if err == nil {
		err = c.check()
	}
	if err != nil {
		return config{}, fmt.Errorf("configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// parseCapacity reads a number of bytes as Kubernetes writes it; without one it is 0.
func parseCapacity(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	bytes, err := quantity.Bytes(text)
	if err != nil {
		return 0, fmt.Errorf("capacity %w", err)
	}
	return bytes, nil
}

func (c config) check() error {
	if !driverRE.MatchString(c.driver) {
		return fmt.Errorf("driver %q does not match %s", c.driver, driverRE)
	}
	for _, p := range [][2]string{{"socket", c.socket}, {"volumes", c.volumes}, {"published", c.published}, {"bundles", c.bundles}} {
		if err := hotplug.CheckPath(p[1]); err != nil {
			return fmt.Errorf("%s %w", p[0], err)
		}
	}
	return nil
}
