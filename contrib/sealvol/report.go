package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"google.golang.org/protobuf/encoding/protojson"
)

// report is what inspect prints.
type report struct {
	Sandbox string // empty when the guest was named by its CID
	CID     uint32
	Status  *sealvolv1.StatusResponse
	notes   []string // sealvol's own
}

// writeJSON writes {"sandbox", "cid", "notes", "status"}; status is
// sealvol.v1.StatusResponse in protobuf's JSON mapping with the names of the
// .proto file, so 64-bit numbers are strings.
func (r report) writeJSON(w io.Writer) error {
	status, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(r.Status)
	if err != nil {
		return err
	}
	notes := r.notes
	if notes == nil {
		notes = []string{}
	}
	// Indenting also undoes the spaces that protojson puts in at random.
	b, err := json.MarshalIndent(struct {
		Sandbox string          `json:"sandbox"`
		CID     uint32          `json:"cid"`
		Notes   []string        `json:"notes"`
		Status  json.RawMessage `json:"status"`
	}{r.Sandbox, r.CID, notes, status}, "", "  ")
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

func (r report) writeTable(w io.Writer) error {
	var b bytes.Buffer
	r.summary(&b)
	if len(r.Status.Volumes) == 0 {
		fmt.Fprint(&b, "\nno volumes\n")
	} else {
		fmt.Fprintln(&b)
		devices(&b, r.Status.Volumes)
	}
	for _, v := range r.Status.Volumes {
		fmt.Fprintln(&b)
		volume(&b, v)
	}
	if warnings := append(r.Status.Warnings, r.notes...); len(warnings) > 0 {
		fmt.Fprintln(&b)
		for _, s := range warnings {
			fmt.Fprintln(&b, "warning:", s)
		}
	}
	fmt.Fprint(&b, "\nThis came through the host and is not attested: it proves nothing about the guest.\n")
	for line := range bytes.Lines(b.Bytes()) { // tabwriter fills up the last column
		if _, err := fmt.Fprintf(w, "%s\n", bytes.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

func (r report) summary(b *bytes.Buffer) {
	s, p := r.Status, r.Status.GetPolicy()
	if r.Sandbox != "" {
		fmt.Fprintf(b, "sandbox:    %s\n", r.Sandbox)
	}
	fmt.Fprintf(b, "guest:      sealvol-guest %s, vsock CID %d, %s of memory\n", or(s.Version, "of unknown version"), r.CID, size(s.ResidentBytes))
	fmt.Fprintf(b, "TEE:        %s\n", or(s.Tee, "unknown"))
	if p == nil {
		fmt.Fprintln(b, "policy:     none")
		return
	}
	force := "in force"
	if !p.InForce {
		force = "NOT in force"
	}
	fmt.Fprintf(b, "policy:     sha256:%s\n            from %s, %s\n", or(p.Digest, "unknown"), or(p.Source, "an unknown source"), force)
	if d := p.InitData; d != nil {
		fmt.Fprintf(b, "init-data:  %s:%s\n", or(d.Algorithm, "unknown"), or(d.Digest, "unknown"))
	}
	if len(p.Containers) == 0 {
		return
	}
	fmt.Fprintln(b)
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CONTAINER\tROOTFS\tARGS\tID")
	for _, c := range p.Containers {
		args := "any"
		if c.ArgsPinned {
			args = "pinned"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", c.Name, or(c.Rootfs, "-"), args, or(c.Id, "-"))
	}
	t.Flush()
}

// devices draws the volumes as lsblk does, from the disk up to the mounts.
func devices(b *bytes.Buffer, volumes []*sealvolv1.Volume) {
	t := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tMAJ:MIN\tSIZE\tTYPE\tMOUNTPOINTS")
	for _, v := range volumes {
		number := "-"
		if n := len(v.Mappings); n > 0 {
			number = or(parseTable(v.Mappings[n-1].Table).device, "-")
		}
		fmt.Fprintf(t, "%s\t%s\t-\tdisk\t\n", or(v.Device, "("+v.Name+": no disk)"), number)
		depth := 0
		for i := len(v.Mappings) - 1; i >= 0; i-- {
			m := v.Mappings[i]
			var mounts []string
			if i == 0 {
				mounts = mountPoints(v)
			}
			first := ""
			if len(mounts) > 0 {
				first, mounts = mounts[0], mounts[1:]
			}
			fmt.Fprintf(t, "%s└─%s\t%s\t%s\t%s\t%s\n", strings.Repeat("  ", depth), m.Name, m.Number, size(m.SizeBytes), or(parseTable(m.Table).target, "-"), first)
			for _, more := range mounts {
				fmt.Fprintf(t, "\t\t\t\t%s\n", more)
			}
			depth++
		}
	}
	t.Flush()
}

func mountPoints(v *sealvolv1.Volume) (points []string) {
	for _, m := range v.Mounts {
		points = append(points, m.Container+":"+m.Path)
	}
	return points
}

// volume describes a volume as cryptsetup -v status does its mapping.
func volume(b *bytes.Buffer, v *sealvolv1.Volume) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(b, "  %-14s%s\n", name+":", fmt.Sprintf(format, args...))
	}
	if len(v.Mappings) > 0 {
		inUse := ""
		if len(v.Mounts) > 0 {
			inUse = " and is in use"
		}
		fmt.Fprintf(b, "/dev/mapper/%s is active%s.\n", v.Mappings[0].Name, inUse)
	} else {
		fmt.Fprintf(b, "Volume %s is inactive.\n", v.Name)
	}
	line("volume", "%s, %s", v.Name, or(v.State, "in an unknown state"))
	if v.Error != "" {
		line("error", "%s", v.Error)
	}
	line("type", "%s", or(v.Layering, "-"))
	if f := v.Faults; f != nil {
		more := ""
		if f.AtLeast {
			more = "at least "
		}
		line("faults", "%s%d, the first one a %s at sector %d", more, f.Count, or(f.FirstOperation, "failure"), f.FirstSector)
	}
	if v.Suite != "" {
		line("suite", "%s", v.Suite)
	}
	if v.CipherDriver != "" {
		line("driver", "%s", v.CipherDriver)
	}
	if len(v.Mappings) > 0 {
		mapping(line, v)
	}
	if v.SizeBytes > 0 {
		line("capacity", "%s", size(v.SizeBytes))
	}
	if v.PciPath != "" {
		line("disk", "%s at %s", or(v.Device, "unplugged"), v.PciPath)
	}
	if v.Created > 0 {
		line("sealed", "%s, opened %s, by the guest's clock", clock(v.Created), clock(v.Opened))
	}
	if v.FsType != "" {
		line("file system", "%s", v.FsType)
	}
	for _, m := range v.Mounts {
		mode := "read/write"
		if m.ReadOnly {
			mode = "readonly"
		}
		options := ""
		if len(m.Options) > 0 {
			options = " (" + strings.Join(m.Options, ",") + ")"
		}
		line("mounted", "in %s at %s, %s%s", m.Container, m.Path, mode, options)
	}
	if c := v.Counters; c != nil {
		line("tags", "%s of guest memory", size(c.TagBytes))
		line("mismatches", "%d counted by dm-integrity", c.Mismatches)
		line("ready after", "%v", time.Duration(c.ReadyMicros)*time.Microsecond)
	}
}

// clock is a time of sealvol.v1.
func clock(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }

// mapping writes the lines that come from the tables, with the names and
// words of cryptsetup.
func mapping(line func(name, format string, args ...any), v *sealvolv1.Volume) {
	top := parseTable(v.Mappings[0].Table)
	integrity := top.integrity
	below := or(top.device, "-")
	for _, m := range v.Mappings[1:] {
		t := parseTable(m.Table)
		if m.Number == top.device {
			below = "/dev/mapper/" + m.Name
		}
		if t.target == "integrity" && t.journaled {
			line("journal", "on")
		}
		integrity = or(integrity, t.integrity)
	}
	if top.target == "crypt" {
		line("cipher", "%s", top.cipher)
		line("keysize", "%d bits", top.keyBits)
		line("key location", "%s", top.keyLocation)
	}
	line("integrity", "%s", or(integrity, "none"))
	if top.tagBytes != "" {
		line("tag size", "%s bytes", top.tagBytes)
	}
	line("device", "%s", below)
	line("sector size", "%s", top.sectorBytes)
	line("offset", "%s sectors", or(top.offset, "-"))
	line("size", "%d sectors", top.sectors)
	mode := "read/write"
	if readOnly(v) {
		mode = "readonly"
	}
	line("mode", "%s", mode)
}

// readOnly: every container has it read-only, so nothing can write to it.
func readOnly(v *sealvolv1.Volume) bool {
	for _, m := range v.Mounts {
		if !m.ReadOnly {
			return false
		}
	}
	return len(v.Mounts) > 0
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}

// size is a number of bytes as lsblk writes it.
func size(n uint64) string {
	const units = "BKMGTPE"
	unit, v := 0, float64(n)
	for v >= 1024 {
		unit, v = unit+1, v/1024
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + units[unit:unit+1]
}
