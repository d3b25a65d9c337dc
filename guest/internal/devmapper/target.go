package devmapper

import (
	"fmt"

	"github.com/sealvol/sealvol/guest/internal/blockdev"
)

// Target is one line of a table: what stands behind a mapping. The types of this package are all there are.
type Target interface {
	kind() string
	params() string
}

// Linear shows a part of another device.
//
//	0 SECTORS linear DEVICE START
type Linear struct {
	Device blockdev.Number
	Start  uint64 // sectors of 512 bytes
}

func (Linear) kind() string { return "linear" }

func (t Linear) params() string { return fmt.Sprintf("%v %d", t.Device, t.Start) }

// Integrity adds room for a tag to every block of another device. The tags are on a device of their own, the journal is off ("D").
//
//	0 SECTORS integrity DATA 0 TAG_BYTES D 4 block_size:BLOCK meta_device:META journal_sectors:N buffer_sectors:N
//
// The tags' device must have room for the whole of the data device, whatever SECTORS says. The first sectors of a new one must be
// zeros: that makes the kernel write its superblock there.
type Integrity struct {
	Data, Meta     blockdev.Number
	TagBytes       int
	BlockBytes     int
	JournalSectors int
	BufferSectors  int // sectors of tags that are read and written together
}

func (Integrity) kind() string { return "integrity" }

func (t Integrity) params() string {
	return fmt.Sprintf("%v 0 %d D 4 block_size:%d meta_device:%v journal_sectors:%d buffer_sectors:%d",
		t.Data, t.TagBytes, t.BlockBytes, t.Meta, t.JournalSectors, t.BufferSectors)
}

// Crypt encrypts and authenticates every block of another device, an Integrity mapping that keeps IV and tag.
//
//	0 SECTORS crypt CIPHER :KEY_BYTES:logon:DESCRIPTION 0 DEVICE 0 2 integrity:TAG_BYTES:aead sector_size:BLOCK
//
// The key never is in a table: it is a key of type "logon" that the calling thread can find under DESCRIPTION while the table is
// loaded. The kernel copies it then, and shows the description when it is asked for the table.
type Crypt struct {
	Cipher      string // "capi:…-random"
	KeyBytes    int
	Description string
	Device      blockdev.Number
	TagBytes    int // IV and tag together
	BlockBytes  int
}

func (Crypt) kind() string { return "crypt" }

func (t Crypt) params() string {
	return fmt.Sprintf("%s :%d:logon:%s 0 %v 0 2 integrity:%d:aead sector_size:%d",
		t.Cipher, t.KeyBytes, t.Description, t.Device, t.TagBytes, t.BlockBytes)
}
