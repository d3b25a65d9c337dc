package policy

import (
	"bytes"
	"fmt"
)

// passed are the rules that the agent asks its policy for, on requests that the gate lets through. The agent names a rule by the type
// of the request's message, and an undefined rule is an error to it. Not here, and so refused by the agent too unless the author says
// otherwise: AddSwapRequest, AddSwapPathRequest, GetDiagnosticDataRequest, MemAgentCompactConfig, MemAgentMemcgConfig,
// MemHotplugByProbeRequest, PullImageRequest, ReseedRandomDevRequest, ResizeVolumeRequest, SetIPTablesRequest, SetPolicyRequest and
// VolumeStatsRequest, which the gate answers itself.
var passed = []string{
	"AddARPNeighborsRequest",
	"CloseStdinRequest",
	"CopyFileRequest",
	"CreateContainerRequest",
	"CreateSandboxRequest",
	"DestroySandboxRequest",
	"ExecProcessRequest",
	"GetIPTablesRequest",
	"GetMetricsRequest",
	"GetOOMEventRequest",
	"GuestDetailsRequest",
	"ListInterfacesRequest",
	"ListRoutesRequest",
	"OnlineCPUMemRequest",
	"PauseContainerRequest",
	"ReadStreamRequest",
	"RemoveContainerRequest",
	"RemoveStaleVirtiofsShareMountsRequest",
	"ResumeContainerRequest",
	"SetGuestDateTimeRequest",
	"SignalProcessRequest",
	"StartContainerRequest",
	"StatsContainerRequest",
	"TtyWinResizeRequest",
	"UpdateContainerRequest",
	"UpdateEphemeralMountsRequest",
	"UpdateInterfaceRequest",
	"UpdateRoutesRequest",
	"WaitProcessRequest",
	"WriteStreamRequest",
}

// AgentText is what the agent gets in SetPolicy: the text, and an allowing rule for each request that the gate passes and the text has
// none for. The gate is what enforces the policy; the agent must only not stand in its way.
func (p *Policy) AgentText() []byte {
	var b bytes.Buffer
	b.Write(p.text)
	b.WriteString("\n\n# Added by the guest: what its gate lets through.\n")
	for _, rule := range passed {
		if !p.rules[rule] {
			fmt.Fprintf(&b, "default %s := true\n", rule)
		}
	}
	return b.Bytes()
}
