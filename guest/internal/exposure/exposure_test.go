package exposure_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/sealvol/sealvol/guest/internal/exposure"
)

func file(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestKernelCommandLine(t *testing.T) {
	t.Parallel()
	for line, key := range map[string]string{
		"":                               "",
		"console=hvc0 agent.log=debug\n": "",
		"agent.container_pipe_size=1 agent.unified_cgroup_hierarchy=1": "",
		"systemd.unit=x agent.debug_console quiet":                     "agent.debug_console",
		"agent.debug_console=0":                                        "agent.debug_console",
		"agent.debug_console_vport=1026":                               "agent.debug_console_vport",
		"agent.debug-console":                                          "agent.debug-console",
		`x="a b" "agent.server_addr=vsock://-1:9"`:                     "agent.server_addr",
		"agent.config_file=/run/x":                                     "agent.config_file",
		"agent.log_vport=1025":                                         "agent.log_vport",
		"agent.passfd_listener_port=1027":                              "agent.passfd_listener_port",
		"agent.devmode":                                                "agent.devmode",
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			err := exposure.KernelCommandLine(file(t, line))
			if key == "" && err != nil || key != "" && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), key+",")) {
				t.Errorf("got %v", err)
			}
		})
	}
	if err := exposure.KernelCommandLine("/absent"); err == nil {
		t.Error("a command line that cannot be read is fine")
	}
}

func TestListenersThatNobodyDeclaredAreRefused(t *testing.T) {
	t.Parallel()
	if err := exposure.Listeners([]uint32{1024, 1040}, []uint32{1024, 1040, 5}); err != nil {
		t.Error(err)
	}
	if err := exposure.Listeners([]uint32{1024, 1026}, []uint32{1024, 1040}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "1026") {
		t.Errorf("got %v", err)
	}
}

func TestSwapIsRefused(t *testing.T) {
	t.Parallel()
	const head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	for _, ok := range []string{"/absent", file(t, head), file(t, "")} {
		if err := exposure.Swap(ok); err != nil {
			t.Error(err)
		}
	}
	if err := exposure.Swap(file(t, head+"/dev/vdb partition 1 0 -2\n")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
}
