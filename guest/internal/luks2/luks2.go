// Package luks2 makes and opens volumes in cryptsetup's on-disk format, with the header in guest memory.
//
// The disk holds ciphertext and integrity tags alone. The header, which says how to read them, is a file that the host cannot reach:
//
//	guest memory   header: two copies of binary header and JSON, one keyslot (encrypted by the volume's key)
//	disk           dm-integrity superblock, unused journal, then tags and data by turns
//
//	NAME_dif  0 N integrity DATA 0 32 D …                         tags beside the data, no journal
//	NAME      0 N crypt capi:authenc(hmac(sha256),xts(aes))-plain64 … 0 2 integrity:32:aead sector_size:4096
//
// cryptsetup makes and opens both, as an administrator would, so that its tools show and read the volume. But what it is told to do is
// checked before it does it (Parse: nothing in the header is anything but what was demanded) and after (the live tables), since LUKS2 has
// a header that asks for no encryption at all (CVE-2025-59054).
//
// This layering finds every changed, moved or foreign block, but not an old one together with its old tag: the host may roll back a
// block or the whole disk. Package tagstore is what prevents that.
//
// A block that was never written reads as an error, and so does all that mkfs reads before it writes.
//
// The format is that of the LUKS2 On-Disk Format Specification, version 1.1.
package luks2

const (
	// KeyBytes is the length of a volume's key. It unlocks the keyslot as a passphrase would; the key of the data is another one, that
	// cryptsetup draws and keeps in the keyslot.
	KeyBytes = 64
	// BlockBytes is the unit that is encrypted and authenticated.
	BlockBytes = 4096
	// TagBytes is what dm-integrity keeps for each block: the HMAC. The IV is the block's number.
	TagBytes = 32
)

// What is demanded of a header. The key of the data is one for XTS (AES-256) and one for HMAC.
const (
	cipher          = "aes-xts-plain64"
	integrity       = "hmac(sha256)"
	hash            = "sha256"
	xtsKeyBytes     = 64
	hmacKeyBytes    = 32
	volumeKeyBytes  = xtsKeyBytes + hmacKeyBytes
	antiForensic    = "luks1"
	stripes         = 4000
	iterations      = 1000 // the least there is: the key is random, there is nothing to guess
	copyBytes       = 16 << 10
	metadataBytes   = 2 * copyBytes
	keyslotBytes    = (volumeKeyBytes*stripes + 4095) / 4096 * 4096
	headerBytes     = metadataBytes + keyslotBytes
	liveCipher      = "capi:authenc(hmac(sha256),xts(aes))-plain64"
	integritySuffix = "_dif" // of cryptsetup's name for the mapping below
)
