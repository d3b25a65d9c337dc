package luks2

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"regexp"
)

// binaryHeader is struct luks2_hdr_disk, the first 4096 bytes of each copy, in big endian. The JSON follows.
type binaryHeader struct {
	Magic             [6]byte
	Version           uint16
	Size              uint64 // with the JSON
	Sequence          uint64
	Label             [48]byte
	ChecksumAlgorithm [32]byte
	Salt              [64]byte // random, so that no two checksums are alike
	UUID              [40]byte
	Subsystem         [48]byte
	Offset            uint64 // of this copy in the header
	_                 [184]byte
	Checksum          [64]byte // of the whole copy with this field zero
	_                 [7 * 512]byte
}

const binaryBytes = 4096

// Where the fields are that are looked at in the raw bytes.
const (
	paddingStart  = 264
	checksumStart = 448
	checksumEnd   = 512
)

var (
	firstMagic  = [6]byte{'L', 'U', 'K', 'S', 0xba, 0xbe}
	secondMagic = [6]byte{'S', 'K', 'U', 'L', 0xba, 0xbe}

	uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// header is one copy of the header, checked but for what its JSON says.
type header struct {
	uuid     string
	sequence uint64
	json     []byte
}

// parseCopy reads the copy of the header that is at an offset.
func parseCopy(raw []byte, offset uint64, magic [6]byte) (header, error) {
	var b binaryHeader
	if err := binary.Read(bytes.NewReader(raw), binary.BigEndian, &b); err != nil {
		return header{}, ErrTruncated
	}
	uuid, uuidErr := fixedText(b.UUID[:])
	switch {
	case b.Magic != magic:
		return header{}, ErrMagic
	case b.Version != 2:
		return header{}, fmt.Errorf("%d: %w", b.Version, ErrVersion)
	case b.Size != copyBytes:
		return header{}, fmt.Errorf("%d bytes: %w", b.Size, ErrHeaderSize)
	// What says how the checksum is made comes before the checksum, all else after it.
	case b.ChecksumAlgorithm != algorithm(hash):
		return header{}, ErrChecksumAlgorithm
	case b.Checksum != checksum(raw):
		return header{}, ErrChecksum
	case b.Offset != offset:
		return header{}, fmt.Errorf("%d, not %d: %w", b.Offset, offset, ErrHeaderOffset)
	case b.Sequence == 0:
		return header{}, ErrSequence
	case b.Label != [48]byte{} || b.Subsystem != [48]byte{}:
		return header{}, ErrLabel
	case uuidErr != nil || !uuidForm.MatchString(uuid):
		return header{}, ErrUUID
	case !zero(raw[paddingStart:checksumStart]) || !zero(raw[checksumEnd:binaryBytes]):
		return header{}, ErrPadding
	}
	text, err := fixedText(raw[binaryBytes:])
	if err != nil {
		return header{}, err
	}
	return header{uuid: uuid, sequence: b.Sequence, json: []byte(text)}, nil
}

// checksum is what belongs into a copy's checksum field. The field is longer than a SHA-256.
func checksum(raw []byte) (sum [64]byte) {
	h := sha256.New()
	h.Write(raw[:checksumStart])
	h.Write(make([]byte, checksumEnd-checksumStart))
	h.Write(raw[checksumEnd:])
	h.Sum(sum[:0])
	return sum
}

func algorithm(name string) (field [32]byte) {
	copy(field[:], name)
	return field
}

// fixedText is the string in a field that is filled up with zeros; there must be at least one.
func fixedText(field []byte) (string, error) {
	text, rest, found := bytes.Cut(field, []byte{0})
	if !found || !zero(rest) {
		return "", ErrPadding
	}
	return string(text), nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
