// Mkimage writes the images that the tests run:
//
//	mkimage guest -o FILE -service FILE -agent FILE [-kernel DIR] [-file /PATH=SOURCE]...
//	mkimage container -o FILE -ref REFERENCE [-file /PATH=SOURCE]... COMMAND [ARGUMENT...]
//
// The first is the initial RAM disk of a Kata guest, the second an archive of a container image made of
// busybox. Each -file adds a program of this machine, with the libraries that it needs, or replaces a file.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/sealvol/sealvol/integration/image"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("want guest or container")
	}
	var (
		guest image.Guest
		files []string
		flags = flag.NewFlagSet(args[0], flag.ContinueOnError)
		out   = flags.String("o", "", "`file` to write")
		ref   = flags.String("ref", "", "the image's complete `reference`")
	)
	flags.StringVar(&guest.Service, "service", "", "sealvol-guest")
	flags.StringVar(&guest.Agent, "agent", "", "kata-agent")
	flags.StringVar(&guest.Kernel, "kernel", "", "`folder` with lib/modules of the guest's kernel; without: it has no modules")
	flags.Func("file", "add a file, `/PATH=SOURCE`", func(s string) error {
		files = append(files, s)
		return nil
	})
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}

	var (
		tree  *image.Tree
		err   error
		write func(io.Writer) error
	)
	switch args[0] {
	case "guest":
		tree, err = guest.Tree()
		write = func(w io.Writer) error { return tree.WriteCPIO(w) }
	case "container":
		tree, err = image.Busybox()
		write = func(w io.Writer) error {
			return tree.WriteImages(w, map[string]v1.ImageConfig{*ref: {Env: []string{"PATH=/bin"}, Cmd: flags.Args()}})
		}
	default:
		err = fmt.Errorf("%q: want guest or container", args[0])
	}
	if err != nil {
		return err
	}
	for _, file := range files {
		name, source, ok := strings.Cut(file, "=")
		if !ok || !strings.HasPrefix(name, "/") {
			return fmt.Errorf("-file %s: want /PATH=SOURCE", file)
		}
		if err := tree.Add(name, source); err != nil {
			return err
		}
	}
	f, err := os.Create(*out)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	return errors.Join(write(w), w.Flush(), f.Close())
}
