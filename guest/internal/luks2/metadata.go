package luks2

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"

	strictjson "sigs.k8s.io/json"
)

// Metadata is what tells one checked header from another: all else in it is as demanded. Only Parse makes one.
type Metadata struct {
	uuid     string
	sequence uint64
}

// UUID is the header's own. It is part of the mappings' UUID and of the description of their key.
func (m Metadata) UUID() string { return m.uuid }

// Parse reads the two copies of a header, without the keyslot area that follows them, and demands that they say exactly what Format
// asked for: one keyslot, one segment and one digest, each field of them known and as demanded, and nothing else.
func Parse(raw []byte) (Metadata, error) {
	switch {
	case len(raw) < metadataBytes:
		return Metadata{}, fmt.Errorf("%d bytes, not %d: %w", len(raw), metadataBytes, ErrTruncated)
	case len(raw) > metadataBytes:
		return Metadata{}, fmt.Errorf("%d bytes, not %d: %w", len(raw), metadataBytes, ErrOversize)
	}
	first, err := parseCopy(raw[:copyBytes], 0, firstMagic)
	if err != nil {
		return Metadata{}, fmt.Errorf("first copy: %w", err)
	}
	second, err := parseCopy(raw[copyBytes:], copyBytes, secondMagic)
	if err != nil {
		return Metadata{}, fmt.Errorf("second copy: %w", err)
	}
	// cryptsetup takes the copy with the greater sequence number, and writes it over the other.
	if first.uuid != second.uuid || first.sequence != second.sequence || !bytes.Equal(first.json, second.json) {
		return Metadata{}, ErrCopies
	}
	if err := checkJSON(first.json); err != nil {
		return Metadata{}, err
	}
	return Metadata{uuid: first.uuid, sequence: first.sequence}, nil
}

// metadata is the JSON of a header: the fields that are demanded, and those that are known in order to be refused by name. Its 64-bit
// numbers are strings.
type metadata struct {
	Keyslots map[string]keyslot         `json:"keyslots"`
	Tokens   map[string]json.RawMessage `json:"tokens"`
	Segments map[string]segment         `json:"segments"`
	Digests  map[string]digest          `json:"digests"`
	Config   config                     `json:"config"`
}

type keyslot struct {
	Type    string `json:"type"`
	KeySize int    `json:"key_size"`
	AF      struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	} `json:"af"`
	Area struct {
		Type       string `json:"type"`
		Offset     string `json:"offset"`
		Size       string `json:"size"`
		Encryption string `json:"encryption"`
		KeySize    int    `json:"key_size"`
	} `json:"area"`
	KDF struct {
		Type       string `json:"type"`
		Hash       string `json:"hash"`
		Iterations int    `json:"iterations"`
		Salt       string `json:"salt"`
	} `json:"kdf"`
}

type segment struct {
	Type       string `json:"type"`
	Offset     string `json:"offset"`
	Size       string `json:"size"`
	IVTweak    string `json:"iv_tweak"`
	Encryption string `json:"encryption"`
	SectorSize int    `json:"sector_size"`
	Integrity  *struct {
		Type              string `json:"type"`
		JournalEncryption string `json:"journal_encryption"`
		JournalIntegrity  string `json:"journal_integrity"`
	} `json:"integrity,omitempty"`
	Flags []string `json:"flags,omitempty"`
}

type digest struct {
	Type       string   `json:"type"`
	Keyslots   []string `json:"keyslots"`
	Segments   []string `json:"segments"`
	Hash       string   `json:"hash"`
	Iterations int      `json:"iterations"`
	Salt       string   `json:"salt"`
	Digest     string   `json:"digest"`
}

type config struct {
	JSONSize     string          `json:"json_size"`
	KeyslotsSize string          `json:"keyslots_size"`
	Flags        []string        `json:"flags,omitempty"`
	Requirements json.RawMessage `json:"requirements,omitempty"`
}

func checkJSON(text []byte) error {
	m, err := decode(text)
	if err != nil {
		return err
	}
	for _, check := range []func(metadata) error{checkConfig, checkTokens, checkKeyslots, checkSegments, checkDigests} {
		if err := check(m); err != nil {
			return err
		}
	}
	return checkComplete(text, m)
}

// decode knows fields by their exact name. Errors do not quote the JSON, which is not ours.
func decode(text []byte) (metadata, error) {
	var m metadata
	// cryptsetup wants the brace first; Go would skip white space.
	if len(text) == 0 || text[0] != '{' {
		return metadata{}, ErrJSON
	}
	strict, err := strictjson.UnmarshalStrict(text, &m)
	if err != nil {
		return metadata{}, ErrJSON
	}
	if len(strict) > 0 {
		return metadata{}, ErrUnknownField
	}
	return m, nil
}

// checkComplete makes sure that what was checked is all there is: encoded again, it says the same. So null does not pass for empty, nor absent
// for zero.
func checkComplete(text []byte, m metadata) error {
	again, err := json.Marshal(m)
	if err != nil {
		return ErrJSON
	}
	var is, want any
	if json.Unmarshal(text, &is) != nil || json.Unmarshal(again, &want) != nil {
		return ErrJSON
	}
	if !reflect.DeepEqual(is, want) {
		return ErrUnknownField
	}
	return nil
}

func checkConfig(m metadata) error {
	switch c := m.Config; {
	case c.JSONSize != strconv.Itoa(copyBytes-binaryBytes) || c.KeyslotsSize != strconv.Itoa(keyslotBytes):
		return ErrConfig
	// Flags change how a volume is opened: with discards, or with a journal or none.
	case len(c.Flags) != 0:
		return ErrFlags
	case c.Requirements != nil:
		return ErrRequirements
	}
	return nil
}

// A token says where else a key might be.
func checkTokens(m metadata) error {
	switch {
	case m.Tokens == nil:
		return ErrUnknownField
	case len(m.Tokens) != 0:
		return ErrToken
	}
	return nil
}

func checkKeyslots(m metadata) error {
	k, ok := m.Keyslots["0"]
	switch {
	case !ok || len(m.Keyslots) != 1 || k.Type != "luks2":
		return ErrKeyslots
	case k.KeySize != volumeKeyBytes:
		return fmt.Errorf("%d bytes: %w", k.KeySize, ErrKeySize)
	case k.AF.Type != antiForensic || k.AF.Stripes != stripes || k.AF.Hash != hash:
		return ErrAntiForensic
	case k.KDF.Type != "pbkdf2" || k.KDF.Hash != hash || k.KDF.Iterations != iterations || !isBase64(k.KDF.Salt, 32):
		return ErrKDF
	case k.Area.Type != "raw" || k.Area.Offset != strconv.Itoa(metadataBytes) || k.Area.Size != strconv.Itoa(keyslotBytes):
		return ErrArea
	// With a null cipher here the keyslot would be the key of the data, in the clear.
	case k.Area.Encryption != cipher || k.Area.KeySize != xtsKeyBytes:
		return ErrAreaCipher
	}
	return nil
}

func checkSegments(m metadata) error {
	s, ok := m.Segments["0"]
	switch {
	case !ok || len(m.Segments) != 1 || s.Type != "crypt":
		return ErrSegments
	case len(s.Flags) != 0:
		return ErrSegmentFlags
	case s.Offset != "0" || s.Size != "dynamic":
		return ErrSegmentRange
	case s.Encryption != cipher:
		return ErrCipher
	case s.IVTweak != "0":
		return ErrIV
	case s.SectorSize != BlockBytes:
		return ErrSectorSize
	case s.Integrity == nil || s.Integrity.Type != integrity || s.Integrity.JournalEncryption != "none" || s.Integrity.JournalIntegrity != "none":
		return ErrIntegrity
	}
	return nil
}

func checkDigests(m metadata) error {
	zero := []string{"0"}
	d, ok := m.Digests["0"]
	switch {
	case !ok || len(m.Digests) != 1 || !reflect.DeepEqual(d.Keyslots, zero) || !reflect.DeepEqual(d.Segments, zero):
		return ErrDigests
	case d.Type != "pbkdf2" || d.Hash != hash || d.Iterations != iterations || !isBase64(d.Salt, 32) || !isBase64(d.Digest, 32):
		return ErrDigest
	}
	return nil
}

func isBase64(text string, bytes int) bool {
	decoded, err := base64.StdEncoding.Strict().DecodeString(text)
	// DecodeString skips line ends.
	return err == nil && len(decoded) == bytes && len(text) == base64.StdEncoding.EncodedLen(bytes)
}
