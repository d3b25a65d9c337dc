package main

import (
	"strconv"
	"strings"
)

// table is a device-mapper table of one line, as far as it is shown. The
// formats are those of the kernel's admin-guide/device-mapper/dm-crypt and
// dm-integrity. An unknown target has only its type.
type table struct {
	target  string // "linear", "integrity", "crypt"
	sectors uint64 // of 512 bytes
	device  string // what it stands on, "major:minor"
	offset  string // sectors on that device

	cipher      string
	keyBits     int
	keyLocation string
	integrity   string // "aead", "hmac(sha256)", …; empty for none
	tagBytes    string
	sectorBytes string
	journaled   bool
}

// parseTable never fails: what it does not understand stays empty.
func parseTable(line string) table {
	t := table{sectorBytes: "512"}
	f := strings.Fields(line)
	if len(f) < 3 {
		return t
	}
	t.sectors, _ = strconv.ParseUint(f[1], 10, 64)
	t.target = f[2]
	switch f = f[3:]; {
	case t.target == "linear" && len(f) >= 2: // DEVICE START
		t.device, t.offset = f[0], f[1]
	case t.target == "integrity" && len(f) >= 4: // DEVICE RESERVED TAG_BYTES MODE N OPTION…
		t.device, t.offset, t.tagBytes = f[0], f[1], f[2]
		t.journaled = f[3] == "J"
		for _, o := range f[4:] {
			if v, ok := strings.CutPrefix(o, "block_size:"); ok {
				t.sectorBytes = v
			}
			if v, ok := strings.CutPrefix(o, "internal_hash:"); ok {
				t.integrity, _, _ = strings.Cut(v, ":")
			}
		}
	case t.target == "crypt" && len(f) >= 5: // CIPHER KEY IV_OFFSET DEVICE OFFSET N OPTION…
		t.cipher, t.device, t.offset = strings.TrimPrefix(f[0], "capi:"), f[3], f[4]
		t.keyBits, t.keyLocation = keyOf(f[1])
		for _, o := range f[5:] {
			if v, ok := strings.CutPrefix(o, "sector_size:"); ok {
				t.sectorBytes = v
			}
			if v, ok := strings.CutPrefix(o, "integrity:"); ok { // TAG_BYTES:TYPE
				t.tagBytes, t.integrity, _ = strings.Cut(v, ":")
			}
		}
		if hash, ok := strings.CutPrefix(t.cipher, "authenc("); ok && t.integrity == "aead" {
			t.integrity, _, _ = strings.Cut(hash, ",")
		}
	}
	return t
}

// keyOf tells size and place of a key from a table: hex, or the form
// :BYTES:TYPE:DESCRIPTION of a key in the kernel's keyring.
func keyOf(field string) (bits int, location string) {
	if name, ok := strings.CutPrefix(field, ":"); ok {
		size, _, _ := strings.Cut(name, ":")
		n, _ := strconv.Atoi(size)
		return n * 8, "keyring"
	}
	return len(field) * 4, "dm-crypt"
}
