package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// config is guest.toml. The file is part of the guest image and so measured with it.
type config struct {
	// LogLevel is "debug", "info", "warn" or "error".
	LogLevel slog.Level `toml:"log_level"`
	// Policy is the file with the policy of pods that bring none; "" is one that allows any
	// container and no block storage.
	Policy string `toml:"policy"`
	// PolicySource is the least trusted source that a policy may come from.
	PolicySource policySource `toml:"policy_source"`
	// InsecureTEE is a file with an attestation report of SEV-SNP that stands for the TEE of a
	// machine that has none, for tests. It proves nothing.
	InsecureTEE string `toml:"insecure_tee"`
	// Mkfs is the path of mkfs.ext4.
	Mkfs string `toml:"mkfs"`
	// MkfsXFS is the path of mkfs.xfs. It need not be there when no policy wants xfs.
	MkfsXFS string `toml:"mkfs_xfs"`
	// Cryptsetup is the path of cryptsetup, for the layering luks2.
	Cryptsetup string `toml:"cryptsetup"`
	// PatchedKernel says that a kernel older than 6.8 has the dm-crypt fixes that sealing needs.
	PatchedKernel bool `toml:"patched_kernel"`
	// VsockPorts are ports on which the image means something else to listen.
	VsockPorts []uint32 `toml:"vsock_ports"`

	Agent struct {
		Path         string   `toml:"path"`
		Config       string   `toml:"config"`        // the agent's own configuration file
		Socket       string   `toml:"socket"`        // as server_addr in that file
		StartTimeout duration `toml:"start_timeout"` // for example "60s"
	} `toml:"agent"`
}

// policySource says where a pod's policy may come from.
type policySource string

const (
	// sourceInitData: from init-data that is bound to the TEE, and nothing else.
	sourceInitData policySource = "init-data"
	// sourceImage: the image's own, and nothing else.
	sourceImage policySource = "image"
	// sourceSetPolicy: from bound init-data; without it from the host's first SetPolicy; until
	// then, the image's own.
	sourceSetPolicy policySource = "set-policy"
)

type duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = duration(v)
	return err
}

func defaults() config {
	c := config{LogLevel: slog.LevelInfo, PolicySource: sourceSetPolicy, Mkfs: "/usr/sbin/mkfs.ext4", MkfsXFS: "/usr/sbin/mkfs.xfs", Cryptsetup: "/usr/sbin/cryptsetup"}
	c.Agent.Path = "/usr/bin/kata-agent"
	c.Agent.Config = "/etc/sealvol/agent.toml"
	c.Agent.Socket = filepath.Join(runDir, "agent/agent.sock")
	c.Agent.StartTimeout = duration(time.Minute)
	return c
}

// loadConfig reads guest.toml; a file that is absent leaves the defaults. Unknown keys are
// errdefs.ErrInvalidArgument, as are relative paths.
func loadConfig(file string) (config, error) {
	c := defaults()
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	} else if err != nil {
		return config{}, fmt.Errorf("configuration: %w", err)
	}
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&c); err != nil {
		if strict := (*toml.StrictMissingError)(nil); errors.As(err, &strict) {
			return config{}, fmt.Errorf("%s: unknown keys:\n%s: %w", file, strict.String(), errdefs.ErrInvalidArgument)
		}
		return config{}, fmt.Errorf("%s: %v: %w", file, err, errdefs.ErrInvalidArgument)
	}
	for key, path := range map[string]string{
		"agent.path": c.Agent.Path, "agent.config": c.Agent.Config, "agent.socket": c.Agent.Socket, "mkfs": c.Mkfs, "mkfs_xfs": c.MkfsXFS,
		"cryptsetup": c.Cryptsetup,
	} {
		if !filepath.IsAbs(path) {
			return config{}, fmt.Errorf("%s: %s = %q is not an absolute path: %w", file, key, path, errdefs.ErrInvalidArgument)
		}
	}
	for key, path := range map[string]string{"policy": c.Policy, "insecure_tee": c.InsecureTEE} {
		if path != "" && !filepath.IsAbs(path) {
			return config{}, fmt.Errorf("%s: %s = %q is not an absolute path: %w", file, key, path, errdefs.ErrInvalidArgument)
		}
	}
	switch c.PolicySource {
	case sourceInitData, sourceImage, sourceSetPolicy:
	default:
		return config{}, fmt.Errorf("%s: policy_source = %q is none of %s, %s and %s: %w",
			file, c.PolicySource, sourceInitData, sourceImage, sourceSetPolicy, errdefs.ErrInvalidArgument)
	}
	if c.PolicySource == sourceImage && c.Policy == "" {
		return config{}, fmt.Errorf("%s: policy_source = %q needs policy, the image's own: %w", file, sourceImage, errdefs.ErrInvalidArgument)
	}
	if c.Agent.StartTimeout <= 0 {
		return config{}, fmt.Errorf("%s: agent.start_timeout must be positive: %w", file, errdefs.ErrInvalidArgument)
	}
	return c, nil
}
