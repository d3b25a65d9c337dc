// Command record writes down what Kata's runtime sends to the guest for the pods of manifests. It plays kubelet on a node of the tests
// whose guests do nothing but listen (integration/record/agent):
//
//	record ROOT MANIFESTS RECORDED [NAME...]
//
// It expects a VM of its own: make record.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	kata "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/sealvol/sealvol/integration/image"
	"github.com/sealvol/sealvol/integration/node"
)

// diskSize is that of every volume: nothing is written to it.
const diskSize = 16 << 20

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: record ROOT MANIFESTS RECORDED [NAME...]")
		os.Exit(2)
	}
	if err := record(ctx, os.Args[1], os.Args[2], os.Args[3], os.Args[4:]); err != nil {
		fmt.Fprintln(os.Stderr, "record:", err)
		os.Exit(1)
	}
}

func record(ctx context.Context, root, manifests, out string, names []string) (err error) {
	if len(names) == 0 {
		files, err := filepath.Glob(filepath.Join(manifests, "*.yaml"))
		if err != nil {
			return err
		}
		for _, file := range files {
			names = append(names, strings.TrimSuffix(filepath.Base(file), ".yaml"))
		}
	}
	all := map[string]*manifest{}
	for _, name := range names {
		if all[name], err = readManifest(filepath.Join(manifests, name+".yaml")); err != nil {
			return err
		}
	}
	n, err := node.Start(ctx, root, func(step string) { fmt.Println("node:", step) })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Stop()) }()
	if err := importImages(ctx, n, filepath.Join(out, "images.json"), all); err != nil {
		return err
	}
	r := &recorder{node: n, plugin: &volumes{}}
	stop, err := r.plugin.serve(ctx, n.NRI())
	if err != nil {
		return err
	}
	defer stop()
	conn, err := grpc.NewClient("unix://"+n.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	r.runtime, r.images = cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)

	var failed []error
	for _, name := range names {
		if err := r.manifest(ctx, filepath.Join(out, name+".json"), all[name]); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", name, err))
			fmt.Printf("%s: %v\n", name, err)
		}
	}
	if len(failed) > 0 {
		fmt.Println(n.Logs(40))
	}
	return errors.Join(failed...)
}

// importImages gives every image of the manifests the same files, and the configuration that the file has for it.
func importImages(ctx context.Context, n *node.Node, file string, all map[string]*manifest) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var configs map[string]v1.ImageConfig
	if err := json.Unmarshal(text, &configs); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	images := map[string]v1.ImageConfig{}
	for _, m := range all {
		for _, t := range m.pods {
			for _, c := range slices.Concat(t.spec.InitContainers, t.spec.Containers) {
				name := c.Image
				if !strings.Contains(name, "/") {
					name = "docker.io/library/" + name
				}
				config, ok := configs[name]
				if !ok {
					config = v1.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}}
				}
				images[name] = config
			}
		}
	}
	tree, err := image.Busybox()
	if err != nil {
		return err
	}
	archive := filepath.Join(node.Dir, "images.tar")
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	if err := errors.Join(tree.WriteImages(w, images), w.Flush(), f.Close()); err != nil {
		return err
	}
	return n.Import(ctx, archive)
}

type recorder struct {
	node    *node.Node
	plugin  *volumes
	runtime cri.RuntimeServiceClient
	images  cri.ImageServiceClient
}

func (r *recorder) manifest(ctx context.Context, file string, m *manifest) error {
	var all []requests
	for _, t := range m.pods {
		began := time.Now()
		list, err := r.pod(ctx, newPod(t, m))
		if err != nil {
			return fmt.Errorf("%s %s: %w", t.kind, t.name, err)
		}
		all = append(all, requests{Kind: t.kind, Name: t.name, Requests: list})
		fmt.Printf("%-32s %-22s %-24s %2d requests, %4.1f s\n", strings.TrimSuffix(filepath.Base(file), ".json"), t.kind, t.name, len(list), time.Since(began).Seconds())
	}
	return write(file, all)
}

// pod runs a pod from its sandbox to its end and gives the requests.
func (r *recorder) pod(ctx context.Context, p *pod) (_ []request, err error) {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	if err := p.makeVolumes(); err != nil {
		return nil, err
	}
	undo, err := p.mountMemory()
	defer func() { err = errors.Join(err, undo()) }()
	if err != nil {
		return nil, err
	}
	giveBack, err := r.makeDisks(ctx, p)
	defer func() { err = errors.Join(err, giveBack()) }()
	if err != nil {
		return nil, err
	}

	config := p.sandbox()
	sandbox, err := r.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: *p.spec.RuntimeClassName})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.node.RemovePod(context.WithoutCancel(ctx), sandbox.PodSandboxId)) }()
	ids, names := []string{sandbox.PodSandboxId}, []string{""}
	for i, c := range slices.Concat(p.spec.InitContainers, p.spec.Containers) {
		id, err := r.container(ctx, p, c, sandbox.PodSandboxId, config)
		if err != nil {
			return nil, fmt.Errorf("container %s: %w", c.Name, err)
		}
		ids, names = append(ids, id), append(names, c.Name)
		if i < len(p.spec.InitContainers) && c.RestartPolicy == nil {
			if _, err := r.runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id}); err != nil {
				return nil, fmt.Errorf("container %s: %w", c.Name, err)
			}
		}
	}
	return r.requests(ctx, ids, names)
}

// makeDisks makes a disk for each of the pod's sealed volumes.
func (r *recorder) makeDisks(ctx context.Context, p *pod) (undo func() error, err error) {
	var undos []func() error
	undo = func() error {
		var errs []error
		for _, f := range undos {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	byPath := map[string]string{}
	for _, v := range p.spec.Volumes {
		if !p.sealed(v) {
			continue
		}
		path, err := p.volumePath(v)
		if err != nil {
			return undo, err
		}
		_, device, giveBack, err := r.node.Disk(ctx, p.uid+"-"+v.Name, diskSize)
		if err != nil {
			return undo, err
		}
		undos = append(undos, giveBack)
		p.devices[v.Name], byPath[path] = device, device
	}
	r.plugin.set(byPath)
	return undo, nil
}

// container creates and starts a container, and executes what its hooks and probes would.
func (r *recorder) container(ctx context.Context, p *pod, c corev1.Container, sandbox string, pod *cri.PodSandboxConfig) (string, error) {
	image, err := r.images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: c.Image}})
	if err != nil {
		return "", err
	}
	if image.Image == nil {
		return "", fmt.Errorf("image %s is not there", c.Image)
	}
	config, err := p.container(c, image.Image.Id)
	if err != nil {
		return "", err
	}
	created, err := r.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sandbox, Config: config, SandboxConfig: pod})
	if err != nil {
		return "", err
	}
	if _, err := r.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return "", err
	}
	for _, command := range commands(c) {
		if _, err := r.runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: created.ContainerId, Cmd: command, Timeout: 30}); err != nil {
			return "", err
		}
	}
	return created.ContainerId, nil
}

// commands are those of a container's hooks and probes. Kubelet expands probes by the variables that the manifest spells out.
func commands(c corev1.Container) [][]string {
	values := map[string]string{}
	for _, v := range c.Env {
		if v.ValueFrom == nil {
			values[v.Name] = expand(v.Value, values)
		}
	}
	var all [][]string
	hook := func(h *corev1.LifecycleHandler) {
		if h != nil && h.Exec != nil {
			all = append(all, h.Exec.Command)
		}
	}
	if c.Lifecycle != nil {
		hook(c.Lifecycle.PostStart)
	}
	for _, probe := range []*corev1.Probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
		if probe != nil && probe.Exec != nil {
			all = append(all, expandAll(probe.Exec.Command, values))
		}
	}
	if c.Lifecycle != nil {
		hook(c.Lifecycle.PreStop)
	}
	return all
}

// requests asks the guest what it was sent, and puts plain names in the place of ids.
func (r *recorder) requests(ctx context.Context, ids, names []string) ([]request, error) {
	agent, hangUp, err := r.node.DialAgent(ctx, ids[0])
	if err != nil {
		return nil, err
	}
	defer hangUp()
	metrics, err := agent.GetMetrics(ctx, &kata.GetMetricsRequest{})
	if err != nil {
		return nil, err
	}
	var all []request
	for decoder := json.NewDecoder(strings.NewReader(metrics.Metrics)); ; {
		var one request
		if err := decoder.Decode(&one); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if !slices.Contains(recorded, one.RPC) {
			continue
		}
		var about struct {
			Container string          `json:"container_id"`
			Exec      string          `json:"exec_id"`
			Storages  json.RawMessage `json:"storages"`
		}
		if err := json.Unmarshal(one.Request, &about); err != nil {
			return nil, err
		}
		if one.RPC == "UpdateEphemeralMounts" && about.Storages == nil {
			continue // It says nothing.
		}
		if i := slices.Index(ids, about.Container); i >= 0 {
			one.Container = names[i]
		}
		if about.Exec != "" && !slices.Contains(ids, about.Exec) {
			ids, names = append(ids, about.Exec), append(names, "")
		}
		all = append(all, one)
	}
	for i := range all {
		all[i].Request = plain(all[i].Request, ids)
	}
	return all, nil
}
