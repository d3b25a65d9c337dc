package testbed

import "encoding/json"

// The testbed reads one request a line from its standard input and writes one answer a line, in the order in which the work ends.

// Request asks the testbed for something.
type Request struct {
	ID        uint64 `json:"id"`
	Do        string `json:"do"` // one of the constants below
	Container string `json:"container,omitempty"`
	Volume    string `json:"volume,omitempty"`
	Path      string `json:"path,omitempty"`    // PCI path, for example "02/01"
	Timeout   string `json:"timeout,omitempty"` // for example "30s"; without it there is no limit
}

// What the testbed does.
const (
	DoAcquire = "acquire" // Container, Volume, Path
	DoRelease = "release" // Container
	DoAttach  = "attach"  // Volume
	DoDetach  = "detach"  // Volume
	DoNumber  = "number"  // Volume
	DoStatus  = "status"
	DoDestroy = "destroy" // ends all volumes and begins anew, with the same policy
	DoMemory  = "memory"
)

// Answer is what came of a request.
type Answer struct {
	ID     uint64            `json:"id"`
	Error  string            `json:"error"`            // one line; "": none
	Class  string            `json:"class"`            // of the error, for example "DataLoss"
	Dir    string            `json:"dir,omitempty"`    // of attach
	Number string            `json:"number,omitempty"` // "major:minor"
	Status []json.RawMessage `json:"status,omitempty"` // each a sealvol.v1.Volume as protojson
	Memory *Memory           `json:"memory,omitempty"`
}

// Memory is what the testbed itself holds.
type Memory struct {
	Goroutines int   `json:"goroutines"`
	Heap       int64 `json:"heap"`     // bytes that something points to
	Resident   int64 `json:"resident"` // bytes
	Files      int   `json:"files"`    // open descriptors
}
