package gate

import (
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/sealvol/sealvol/guest/internal/device"
)

// sharedTrue is the field shared = 8 of the agent's Storage, a bool that is true, on the wire. Kata 3.28 added it, and to 4.1 nothing else
// in any request that the gate lets through; the message types here are of 3.20.
const sharedTrue = "\x40\x01"

// dropShared takes the field from the storage of a disk, where it means nothing: it asks the agent not to unmount a block device
// (emptydir_mode) before the sandbox ends, and no block device ever reaches the agent. A volume of the policy lives that long anyway, and
// all other disks are denied. On a storage that the agent may get, twice, or beside another field, it stays an unknown one, and so the
// request is refused. The policy does not see it.
func dropShared(m protoreflect.Message) {
	s, ok := m.Interface().(*agent.Storage)
	if !ok || string(m.GetUnknown()) != sharedTrue {
		return
	}
	if _, err := device.Parse(s.Driver, s.Source); err == nil {
		m.SetUnknown(nil)
	}
}
