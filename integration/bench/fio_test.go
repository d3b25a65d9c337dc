package main

import "testing"

func TestParseReport(t *testing.T) {
	t.Parallel()
	const prefix = "bench : Saving output of prerun in bench.prerun.txt\n"
	for name, test := range map[string]struct {
		text string
		sync bool
		want measured
	}{
		"a write": {text: prefix + `{"fio version": "fio-3.33", "jobs": [{"error": 0, "read": {"io_bytes": 0},
			"write": {"io_bytes": 134217728, "bw_bytes": 1065220063, "iops": 1015.87}}]}`,
			want: measured{transfer: transfer{Bytes: 134217728, Bandwidth: 1065220063, IOPS: 1015.87}}},
		"a read": {text: `{"jobs": [{"read": {"io_bytes": 4096, "bw_bytes": 1, "iops": 2}, "write": {"io_bytes": 0}}]}`,
			want: measured{transfer: transfer{Bytes: 4096, Bandwidth: 1, IOPS: 2}}},
		"a write and fsync": {sync: true, text: `{"jobs": [{"write": {"io_bytes": 4096}, "sync": {"lat_ns": {"percentile": {"50.000000": 5, "99.000000": 9}}}}]}`,
			want: measured{transfer: transfer{Bytes: 4096}, syncP50: 5, syncP99: 9}},
		"an fsync that was not measured": {sync: true, text: `{"jobs": [{"write": {"io_bytes": 4096}, "sync": {"lat_ns": {}}}]}`},
		"nothing moved":                  {text: `{"jobs": [{"read": {"io_bytes": 0}, "write": {"io_bytes": 0}}]}`},
		"an error":                       {text: `{"jobs": [{"error": 5, "write": {"io_bytes": 4096}}]}`},
		"no job":                         {text: `{"jobs": []}`},
		"no report":                      {text: prefix},
		"nothing":                        {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parseReport([]byte(test.text), access{sync: test.sync})
			if got != test.want || (err == nil) != (test.want.Bytes > 0) {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}
