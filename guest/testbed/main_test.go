package main

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sealvol/sealvol/integration/testbed"
	"github.com/sealvol/sealvol/policy"
)

func TestRequestsThatCannotBeDoneAreAnswered(t *testing.T) {
	for name, test := range map[string]struct {
		request testbed.Request
		want    testbed.Answer
	}{
		"nothing that it does": {
			testbed.Request{ID: 7, Do: "dance"},
			testbed.Answer{ID: 7, Error: `do "dance": invalid argument`, Class: "InvalidArgument"},
		},
		"a volume that the policy has not": {
			testbed.Request{ID: 8, Do: testbed.DoAcquire, Volume: "v", Path: "02/01"},
			testbed.Answer{ID: 8, Error: "volume v: the policy has none of this name: permission denied", Class: "PermissionDenied"},
		},
		"a time that is none": {
			testbed.Request{ID: 9, Do: testbed.DoStatus, Timeout: "soon"},
			testbed.Answer{ID: 9, Error: `timeout: time: invalid duration "soon": invalid argument`, Class: "InvalidArgument"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			line, err := json.Marshal(test.request)
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			b := &bed{policy: policy.Default()}
			if err := b.serve(bytes.NewReader(append(line, '\n')), &out); err != nil {
				t.Fatal(err)
			}
			var got testbed.Answer
			if err := json.Unmarshal(out.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestALineThatIsNoRequestEndsTheTestbed(t *testing.T) {
	if err := (&bed{}).serve(strings.NewReader("hello\n"), io.Discard); err == nil {
		t.Error("no error")
	}
}
