package gate

import (
	"context"
	"fmt"

	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

const (
	agentService  = "grpc.AgentService"
	healthService = "grpc.Health"
)

// verdict is what becomes of the requests of one method.
type verdict int

const (
	never  verdict = iota // refused, whatever it says
	pass                  // decoded, re-encoded, sent on if the policy has nothing against it
	judged                // the gate's own handler decides
)

type judge func(g *Gate, ctx context.Context, req proto.Message) (proto.Message, error)

// rule is one line of the table. The reason of a method that is never passed is told to
// the host.
type rule struct {
	verdict verdict
	reason  string
	judge   judge
	// end marks the judged methods that only take away: a poisoned sandbox has no other.
	// They outlive the host's deadline, since half an end is none.
	end bool
	// last marks the one after which nothing comes.
	last bool
}

func judgedBy[M proto.Message](f func(*Gate, context.Context, M) (proto.Message, error), reason string) rule {
	return rule{verdict: judged, reason: reason, judge: func(g *Gate, ctx context.Context, req proto.Message) (proto.Message, error) {
		return f(g, ctx, req.(M))
	}}
}

func ending(r rule, last bool) rule {
	r.end, r.last = true, last
	return r
}

// rules says for each method of Kata 3.20's agent what becomes of it. A method that is not
// here is refused: an agent that grows one gets nothing from the host until someone has
// thought about it.
func rules() map[string]map[string]rule {
	return map[string]map[string]rule{
		healthService: {
			"Check":   {verdict: pass, reason: "reads whether the agent serves"},
			"Version": {verdict: pass, reason: "reads the agent's version"},
		},
		agentService: {
			"SetPolicy":       judgedBy((*Gate).setPolicy, "decides what everything else may do; once"),
			"CreateSandbox":   judgedBy((*Gate).createSandbox, "mounts, modules and hooks; a second one deletes the agent's files"),
			"DestroySandbox":  ending(judgedBy((*Gate).destroySandbox, "ends the volumes too"), true),
			"CreateContainer": judgedBy((*Gate).createContainer, "gives a container its files, devices and volumes"),
			"StartContainer":  judgedBy((*Gate).startContainer, "only a container whose mounts are what the policy says may run"),
			"RemoveContainer": ending(judgedBy((*Gate).removeContainer, "the last container of a volume closes it"), false),
			"ExecProcess":     judgedBy((*Gate).execProcess, "runs a command beside the volumes"),
			"UpdateContainer": judgedBy((*Gate).updateContainer, "carries device rules beside the limits"),

			"CopyFile":                       judgedBy((*Gate).copyFile, "writes a file at a path of the host's choice"),
			"UpdateEphemeralMounts":          judgedBy((*Gate).updateEphemeralMounts, "mounts strings of the host's choice"),
			"RemoveStaleVirtiofsShareMounts": judgedBy((*Gate).removeStaleMounts, "unmounts below the share, so never while a volume is attached"),
			"GetVolumeStats":                 judgedBy((*Gate).getVolumeStats, "names a path; the agent does not have ours"),

			"SignalProcess":   {verdict: pass, reason: "ending a process is the host's right; it reads and writes nothing"},
			"WaitProcess":     {verdict: pass, reason: "reads an exit status"},
			"StatsContainer":  {verdict: pass, reason: "reads the cgroup's counters"},
			"PauseContainer":  {verdict: pass, reason: "freezing a container is the host's right: it can stop the CPUs too"},
			"ResumeContainer": {verdict: pass, reason: "undoes PauseContainer"},
			"WriteStdin":      {verdict: pass, reason: "standard input of a process that the policy named"},
			"CloseStdin":      {verdict: pass, reason: "as WriteStdin"},
			"ReadStdout":      {verdict: pass, reason: "what a container prints goes to the host by design"},
			"ReadStderr":      {verdict: pass, reason: "as ReadStdout"},
			"TtyWinResize":    {verdict: pass, reason: "sets the size of a terminal"},
			"GetOOMEvent":     {verdict: pass, reason: "reads which container ran out of memory"},

			"UpdateInterface": {verdict: pass, reason: "the network is the host's; containers must not trust it"},
			"UpdateRoutes":    {verdict: pass, reason: "as UpdateInterface"},
			"ListInterfaces":  {verdict: pass, reason: "reads what the host configured"},
			"ListRoutes":      {verdict: pass, reason: "reads what the host configured"},
			"AddARPNeighbors": {verdict: pass, reason: "as UpdateInterface"},
			"GetIPTables":     {verdict: pass, reason: "reads the packet filter"},

			"OnlineCPUMem":     {verdict: pass, reason: "brings up CPUs and memory that the kernel has accepted already"},
			"GetGuestDetails":  {verdict: pass, reason: "reads what the kernel and the agent can do"},
			"GetMetrics":       {verdict: pass, reason: "reads counters of the guest and its processes"},
			"SetGuestDateTime": {verdict: pass, reason: "the guest's clock is the host's; no key, nonce or check depends on it"},

			"SetIPTables": {verdict: never, reason: "iptables-restore takes an -M option that names a program to execute"},
			"ReseedRandomDev": {verdict: never,
				reason: "the agent credits bytes that the host knows as entropy, and keys could be made of them"},
			"MemHotplugByProbe":  {verdict: never, reason: "makes memory of an address of the host's choice"},
			"AddSwap":            {verdict: never, reason: "keys and tags must not reach a disk"},
			"AddSwapPath":        {verdict: never, reason: "keys and tags must not reach a disk"},
			"MemAgentMemcgSet":   {verdict: never, reason: "can make the guest swap"},
			"MemAgentCompactSet": {verdict: never, reason: "nothing that Kata needs, and it tunes the kernel"},
			"ResizeVolume":       {verdict: never, reason: "a volume's size is the policy's, and the path the host's"},
			"GetDiagnosticData":  {verdict: never, reason: "reads files of the guest for the host"},
		},
	}
}

// method is a rule with the types of its messages.
type method struct {
	rule
	service, name string
	in, out       protoreflect.MessageType
}

// methods joins the rules with the agent's descriptor. Rules for methods that this version
// of the protocol does not have keep their reason and no types.
func methods() map[string]method {
	all := map[string]method{}
	for service, rules := range rules() {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
		if err != nil {
			panic(fmt.Sprintf("the agent's stubs lack %s: %v", service, err))
		}
		for name, r := range rules {
			m := method{rule: r, service: service, name: name}
			if md := d.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(name)); md != nil {
				m.in, m.out = messageType(md.Input()), messageType(md.Output())
			} else if r.verdict != never {
				panic(fmt.Sprintf("%s has no method %s", service, name))
			}
			all[service+"/"+name] = m
		}
	}
	return all
}

func messageType(d protoreflect.MessageDescriptor) protoreflect.MessageType {
	t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		panic(fmt.Sprintf("the agent's stubs lack %s: %v", d.FullName(), err))
	}
	return t
}

// The stubs must be linked in for their descriptors to be found.
var _ agent.AgentServiceService
