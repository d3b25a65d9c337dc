package luks2

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// A header is refused for one of these. Bytes that do not hold together are errdefs.ErrDataLoss: no one meant them. A header that does,
// but says something else than was demanded, is errdefs.ErrFailedPrecondition, an unsupported parameter: its checksum is right, so that
// somebody meant it, and reading the same header again gives the same answer. Neither is ever answered by making a new one.
var (
	ErrTruncated = dataLoss("is cut short")
	ErrOversize  = dataLoss("is larger than it may be")
	ErrMagic     = dataLoss("is none: wrong magic")
	ErrChecksum  = dataLoss("has a wrong checksum")
	ErrPadding   = dataLoss("has bytes that are not zero where nothing belongs")
	ErrCopies    = dataLoss("has two copies that differ")
	ErrJSON      = dataLoss("has malformed JSON")
	ErrForeign   = dataLoss("is not the one that was made")

	ErrVersion           = unsupported("has another version than 2")
	ErrHeaderSize        = unsupported("has another size than was demanded")
	ErrHeaderOffset      = unsupported("is not where it says it is")
	ErrSequence          = unsupported("has no sequence number")
	ErrLabel             = unsupported("has a label or a subsystem")
	ErrChecksumAlgorithm = unsupported("has another checksum algorithm than sha256")
	ErrUUID              = unsupported("has a malformed UUID")
	ErrUnknownField      = unsupported("has JSON with a field that is unknown, repeated, null or missing")
	ErrConfig            = unsupported("has areas of other sizes than was demanded")
	ErrFlags             = unsupported("has activation flags")
	ErrRequirements      = unsupported("has requirements, as reencryption sets them")
	ErrToken             = unsupported("has a token")
	ErrKeyslots          = unsupported("has not exactly one keyslot, 0, of type luks2")
	ErrKeySize           = unsupported("has a key of another size than the cipher and the HMAC need")
	ErrAntiForensic      = unsupported("has another anti-forensic splitter than was demanded")
	ErrKDF               = unsupported("has another key derivation than was demanded")
	ErrArea              = unsupported("has a keyslot area that is not where it belongs")
	ErrAreaCipher        = unsupported("has a keyslot in another cipher than aes-xts-plain64")
	ErrSegments          = unsupported("has not exactly one segment, 0, of type crypt")
	ErrSegmentFlags      = unsupported("has a segment with flags")
	ErrSegmentRange      = unsupported("has a segment that is not the whole device")
	ErrCipher            = unsupported("has another cipher than aes-xts-plain64")
	ErrIV                = unsupported("has an IV that does not start at 0")
	ErrSectorSize        = unsupported("has another sector size than 4096")
	ErrIntegrity         = unsupported("has not hmac(sha256) with an open journal for integrity")
	ErrDigests           = unsupported("has not exactly one digest, 0, of keyslot 0 and segment 0")
	ErrDigest            = unsupported("has another digest than was demanded")
)

func dataLoss(what string) error { return fmt.Errorf("LUKS2 header %s: %w", what, errdefs.ErrDataLoss) }

func unsupported(what string) error {
	return fmt.Errorf("LUKS2 header %s: %w", what, errdefs.ErrFailedPrecondition)
}
