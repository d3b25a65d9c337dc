package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
)

// recorded are the methods that are kept: those that a policy judges. Others of a pod are the same for every one.
var recorded = []string{"CreateSandbox", "CreateContainer", "ExecProcess", "UpdateEphemeralMounts", "CopyFile"}

// A request is one of a file of recorded/.
type request struct {
	RPC       string          `json:"rpc"`
	Container string          `json:"container"` // its name; "" for the sandbox
	Request   json.RawMessage `json:"request"`
}

// The requests of a pod, with the kind and the name of the object that has it.
type requests struct {
	Kind     string    `json:"kind"`
	Name     string    `json:"name"`
	Requests []request `json:"requests"`
}

// shareID is what Kata puts into the names of shared files: eight random bytes.
var shareID = regexp.MustCompile(`-[0-9a-f]{16}-`)

// plain replaces what differs between two recordings: ids, each by as many equal digits, and Kata's random bytes by a count. ids are those
// of the sandbox and its containers in their order.
func plain(text []byte, ids []string) []byte {
	for i, id := range ids {
		text = bytes.ReplaceAll(text, []byte(id), []byte(strings.Repeat(fmt.Sprintf("%x", i+1), len(id))))
	}
	seen := map[string]string{}
	return shareID.ReplaceAllFunc(text, func(match []byte) []byte {
		if seen[string(match)] == "" {
			seen[string(match)] = fmt.Sprintf("-%016x-", len(seen)+1)
		}
		return []byte(seen[string(match)])
	})
}

// write writes the requests of a manifest's pods, one request a line, keys sorted.
func write(file string, pods []requests) error {
	var b bytes.Buffer
	b.WriteString("{\"pods\": [\n")
	for i, p := range pods {
		fmt.Fprintf(&b, "  {\"kind\": %q, \"name\": %q, \"requests\": [\n", p.Kind, p.Name)
		for j, r := range p.Requests {
			// A detour over maps sorts the keys, and takes away protojson's random spaces.
			var message any
			if err := json.Unmarshal(r.Request, &message); err != nil {
				return err
			}
			var line bytes.Buffer
			encoder := json.NewEncoder(&line)
			encoder.SetEscapeHTML(false)
			if err := encoder.Encode(message); err != nil {
				return err
			}
			fmt.Fprintf(&b, "    {\"rpc\": %q, \"container\": %q, \"request\": %s}%s\n", r.RPC, r.Container, bytes.TrimSpace(line.Bytes()), comma(j, len(p.Requests)))
		}
		fmt.Fprintf(&b, "  ]}%s\n", comma(i, len(pods)))
	}
	b.WriteString("]}\n")
	return os.WriteFile(file, b.Bytes(), 0o644)
}

func comma(i, n int) string {
	if i == n-1 {
		return ""
	}
	return ","
}
