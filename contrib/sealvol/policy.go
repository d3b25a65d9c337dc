package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/distribution/reference"

	"github.com/sealvol/sealvol/plugin/quantity"
	"github.com/sealvol/sealvol/policy"
	"github.com/sealvol/sealvol/policy/author"
)

const policyShort = "write a pod's policy from its YAML; show, check and lint policies"

const policyHelp = `Usage: sealvol policy -f FILE [-o FILE] [flags]
       sealvol policy show | check | lint ...

Writes the policy annotation into each pod template of a manifest that uses a
sealed volume: Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet,
ReplicationController, Job, CronJob, List, JSON, or several YAML documents. The
rest of the manifest stays byte for byte, and the same manifest always gives
the same text. Without -o the file itself is overwritten.

A volume is sealed if it is an ephemeral volumeClaimTemplate of the storage
class coco-local-csi, or if an annotation asks for it:

  volume.sealvol.io/data: '{"device": "/dev/data", "mountPath": "/mnt/data", "mode": "ephemeral"}'
                    on the pod: a raw block device (volumeDevices)
  volume.sealvol.io/scratch: '{"emptyDir": "scratch", "size": "10Gi"}'
                    on the pod: an emptyDir
  volume.sealvol.io/data: '{"mode": "ephemeral"}'
                    on a claim called data, or on the pod for its volume data:
                    the claim outlives the pod, its data does not

Examples:
  sealvol policy -f my-app.yaml                     # annotate it in place
  sealvol policy -f my-app.yaml -o - | kubectl apply -f -
  sealvol policy -f my-app.yaml --allow-exec 'sh ...'   # kubectl exec may run sh
  sealvol policy -f my-app.yaml --image-config busybox=busybox/   # an OCI layout
  sealvol policy show my-app.yaml                   # what it says, in words
  sealvol policy lint my-app.yaml                   # what it leaves open
  sealvol policy check -f request.json -p my-app.yaml   # would this be allowed?

Run it again, with the same flags, after each change of the manifest. What
cannot be known, as the arguments of a container whose image decides them,
is left open, with a warning. What a sealed pod cannot have is an error that
names the field.

Flags:
`

// policyTool writes and explains policies.
type policyTool struct {
	stdin  io.Reader
	stderr io.Writer
}

func (p policyTool) run(ctx context.Context, args []string, stdout io.Writer) error {
	if len(args) > 0 {
		switch args[0] {
		case "show":
			return p.show(ctx, args[1:], stdout)
		case "check":
			return p.check(ctx, args[1:], stdout)
		case "lint":
			return p.lint(ctx, args[1:], stdout)
		}
	}
	return p.write(ctx, args, stdout)
}

// parseFlags is done when it has printed the help.
func parseFlags(flags *flag.FlagSet, help string, args []string, stdout io.Writer) (done bool, err error) {
	flags.SetOutput(io.Discard) // its own reports would repeat ours
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(stdout)
		_, err := io.WriteString(stdout, help)
		flags.PrintDefaults()
		return true, err
	case err != nil:
		return true, fmt.Errorf("%w: %w", errUsage, err)
	}
	return false, nil
}

func (p policyTool) write(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("policy", flag.ContinueOnError)
	file := flags.String("f", "", "manifest to read, `FILE` or - for standard input")
	output := flags.String("o", "", "`FILE` to write, - for standard output (default: the manifest itself)")
	var options author.Options
	flags.Func("class", "storage `CLASS` whose volumes are sealed, may be repeated (default "+author.DefaultClass+")", func(s string) error {
		options.Classes = append(options.Classes, s)
		return nil
	})
	flags.Func("claim", "`NAME` of a PersistentVolumeClaim to seal that is not in the manifest, may be repeated", func(s string) error {
		options.Claims = append(options.Claims, s)
		return nil
	})
	flags.Func("size", "`VOLUME=SIZE` of a volume whose claim is not in the manifest, may be repeated", func(s string) error {
		return addSize(&options, s)
	})
	flags.Func("allow-exec", "`COMMAND` that may be executed in every container, may be repeated: words, or a JSON array; a last ... stands for any rest", func(s string) error {
		command, err := parseCommand(s)
		options.Exec = append(options.Exec, command)
		return err
	})
	flags.Func("image-config", "`[IMAGE=]FILE`, may be repeated: what an image runs, from its OCI configuration (JSON) or the folder of an OCI layout", func(s string) error {
		return addImage(&options, s)
	})
	flags.BoolVar(&options.NormaliseImages, "normalise-images", false, "pin images with registry and tag, as clients of CRI other than kubelet name them")
	layering := flags.String("layering", string(policy.MemoryTags), "`LAYERING` of the volumes: memory-tags or luks2")
	fsType := flags.String("fs-type", string(policy.Ext4), "file system of the volumes, `TYPE` ext4 or xfs")
	if done, err := parseFlags(flags, policyHelp, args, stdout); done {
		return err
	}
	options.Layering, options.FSType = policy.Layering(*layering), policy.FSType(*fsType)
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("%w: unexpected argument %q", errUsage, flags.Arg(0))
	case *file == "":
		return fmt.Errorf("%w: which manifest? give it with -f", errUsage)
	case options.Layering != policy.MemoryTags && options.Layering != policy.LUKS2:
		return fmt.Errorf("%w: --layering %s is neither memory-tags nor luks2", errUsage, *layering)
	case options.FSType != policy.Ext4 && options.FSType != policy.XFS:
		return fmt.Errorf("%w: --fs-type %s is neither ext4 nor xfs", errUsage, *fsType)
	case *output == "":
		*output = *file
	}

	manifest, err := p.read(*file)
	if err != nil {
		return err
	}
	result, err := author.Annotate(ctx, manifest, options)
	if err != nil {
		return err
	}
	for _, w := range result.Warnings {
		fmt.Fprintln(p.stderr, "warning:", w)
	}
	if *output == "-" {
		_, err := stdout.Write(result.Manifest)
		return err
	}
	return writeFile(*output, result.Manifest)
}

// read reads a file, or standard input for "-".
func (p policyTool) read(name string) ([]byte, error) {
	in := p.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, author.MaxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(text) > author.MaxManifest {
		return nil, fmt.Errorf("%s: is longer than %d bytes", name, author.MaxManifest)
	}
	return text, nil
}

// writeFile writes a file whole or not at all. A file that is there keeps its mode; a link to it stays one.
func writeFile(name string, text []byte) (err error) {
	mode := os.FileMode(0o644)
	if target, err := filepath.EvalSymlinks(name); err == nil {
		name = target
		info, err := os.Stat(name)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s: is no regular file; write to standard output with -o -", name)
		}
		mode = info.Mode().Perm()
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func addSize(options *author.Options, s string) error {
	volume, text, found := strings.Cut(s, "=")
	if !found || volume == "" {
		return errors.New("want VOLUME=SIZE, as data=10Gi")
	}
	size, err := quantity.Bytes(text)
	if err != nil {
		return err
	}
	if options.Sizes == nil {
		options.Sizes = map[string]uint64{}
	}
	options.Sizes[volume] = uint64(size)
	return nil
}

// parseCommand reads a command's words: a JSON array, or what white space separates.
func parseCommand(s string) ([]string, error) {
	command := strings.Fields(s)
	if strings.HasPrefix(s, "[") {
		command = nil
		if err := json.Unmarshal([]byte(s), &command); err != nil {
			return nil, err
		}
	}
	if len(command) == 0 {
		return nil, errors.New("is empty")
	}
	return command, nil
}

func addImage(options *author.Options, s string) error {
	// A name has no = in it.
	name, file, found := strings.Cut(s, "=")
	if !found {
		name, file = "", s
	}
	if name != "" {
		named, err := reference.ParseDockerRef(name)
		if err != nil {
			return err
		}
		name = named.String()
	}
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	var config author.ImageConfig
	if info.IsDir() {
		config, err = author.ReadImageLayout(os.DirFS(file))
	} else {
		var text []byte
		if text, err = os.ReadFile(file); err == nil {
			config, err = author.ParseImageConfig(text)
		}
	}
	if err != nil {
		return err
	}
	if options.Images == nil {
		options.Images = map[string]author.ImageConfig{}
	}
	options.Images[name] = config
	return nil
}
