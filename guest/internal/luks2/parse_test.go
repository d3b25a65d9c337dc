package luks2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// realHeader is what cryptsetup 2.6.1 made with the flags of Format, without the keyslot area.
func realHeader(t testing.TB) []byte {
	t.Helper()
	raw, err := os.ReadFile("testdata/header")
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// seal makes both checksums right again.
func seal(raw []byte) []byte {
	for _, half := range halves(raw) {
		sum := checksum(half)
		copy(half[checksumStart:], sum[:])
	}
	return raw
}

func halves(raw []byte) [2][]byte { return [2][]byte{raw[:copyBytes], raw[copyBytes:]} }

// withJSON puts another text into both copies.
func withJSON(t *testing.T, raw []byte, text string) []byte {
	t.Helper()
	for _, half := range halves(raw) {
		area := half[binaryBytes:]
		if len(text) > len(area) {
			t.Fatal("JSON is too long for the test")
		}
		clear(area)
		copy(area, text)
	}
	return seal(raw)
}

func jsonText(t *testing.T, raw []byte) string {
	t.Helper()
	text, err := fixedText(raw[binaryBytes:copyBytes])
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestParseTakesTheRealHeader(t *testing.T) {
	t.Parallel()
	m, err := Parse(realHeader(t))
	if err != nil {
		t.Fatal(err)
	}
	want := Metadata{uuid: "b54c12d6-1102-4b3d-93f4-72bfd4ad76c1", sequence: 3}
	if m != want || m.UUID() != want.uuid {
		t.Errorf("%+v, want %+v", m, want)
	}
}

// Offsets of the format's specification, so that binaryHeader does not prove itself.
const (
	atVersion   = 6
	atSize      = 8
	atSequence  = 16
	atLabel     = 24
	atAlgorithm = 72
	atSalt      = 104
	atUUID      = 168
	atSubsystem = 208
	atOffset    = 256
)

func both(raw []byte, change func(half []byte)) []byte {
	for _, half := range halves(raw) {
		change(half)
	}
	return seal(raw)
}

func TestParseRefusesBinaryHeader(t *testing.T) {
	t.Parallel()
	be := binary.BigEndian
	for name, c := range map[string]struct {
		change func(raw []byte) []byte
		want   error
	}{
		"nothing":               {func([]byte) []byte { return nil }, ErrTruncated},
		"one copy":              {func(r []byte) []byte { return r[:copyBytes] }, ErrTruncated},
		"a byte missing":        {func(r []byte) []byte { return r[:len(r)-1] }, ErrTruncated},
		"a byte more":           {func(r []byte) []byte { return append(r, 0) }, ErrOversize},
		"zeros":                 {func(r []byte) []byte { clear(r); return seal(r) }, ErrMagic},
		"magic of the first":    {func(r []byte) []byte { r[0] ^= 1; return seal(r) }, ErrMagic},
		"magic of the second":   {func(r []byte) []byte { r[copyBytes] ^= 1; return seal(r) }, ErrMagic},
		"first copy twice":      {func(r []byte) []byte { copy(r[copyBytes:], r[:copyBytes]); return r }, ErrMagic},
		"copies swapped":        {func(r []byte) []byte { return append(r[copyBytes:], r[:copyBytes]...) }, ErrMagic},
		"LUKS1":                 {func(r []byte) []byte { return both(r, func(h []byte) { be.PutUint16(h[atVersion:], 1) }) }, ErrVersion},
		"version 3":             {func(r []byte) []byte { return both(r, func(h []byte) { be.PutUint16(h[atVersion:], 3) }) }, ErrVersion},
		"size 0":                {func(r []byte) []byte { return both(r, func(h []byte) { be.PutUint64(h[atSize:], 0) }) }, ErrHeaderSize},
		"size 32 KiB":           {func(r []byte) []byte { return both(r, func(h []byte) { be.PutUint64(h[atSize:], 32<<10) }) }, ErrHeaderSize},
		"size without end":      {func(r []byte) []byte { return both(r, func(h []byte) { be.PutUint64(h[atSize:], 1<<63) }) }, ErrHeaderSize},
		"checksum of the first": {func(r []byte) []byte { r[checksumStart] ^= 1; return r }, ErrChecksum},
		"checksum of the second": {func(r []byte) []byte {
			r[copyBytes+checksumStart+31] ^= 1
			return r
		}, ErrChecksum},
		"checksum field's end":      {func(r []byte) []byte { r[checksumEnd-1] = 1; return r }, ErrChecksum},
		"JSON under a checksum":     {func(r []byte) []byte { r[binaryBytes+20] ^= 1; return r }, ErrChecksum},
		"salt under a checksum":     {func(r []byte) []byte { r[atSalt] ^= 1; return r }, ErrChecksum},
		"checksum algorithm sha1":   {func(r []byte) []byte { return both(r, func(h []byte) { copy(h[atAlgorithm:], "sha1\x00\x00") }) }, ErrChecksumAlgorithm},
		"checksum algorithm's tail": {func(r []byte) []byte { return both(r, func(h []byte) { h[atAlgorithm+31] = 'x' }) }, ErrChecksumAlgorithm},
		"no checksum algorithm":     {func(r []byte) []byte { return both(r, func(h []byte) { clear(h[atAlgorithm:][:32]) }) }, ErrChecksumAlgorithm},
		"offset of the first":       {func(r []byte) []byte { be.PutUint64(r[atOffset:], copyBytes); return seal(r) }, ErrHeaderOffset},
		"offset of the second":      {func(r []byte) []byte { be.PutUint64(r[copyBytes+atOffset:], 0); return seal(r) }, ErrHeaderOffset},
		"sequence 0":                {func(r []byte) []byte { return both(r, func(h []byte) { be.PutUint64(h[atSequence:], 0) }) }, ErrSequence},
		"sequence of the first":     {func(r []byte) []byte { be.PutUint64(r[atSequence:], 4); return seal(r) }, ErrCopies},
		"sequence of the second":    {func(r []byte) []byte { be.PutUint64(r[copyBytes+atSequence:], 4); return seal(r) }, ErrCopies},
		"UUID of the second":        {func(r []byte) []byte { r[copyBytes+atUUID] = '0'; return seal(r) }, ErrCopies},
		"JSON of the second": {func(r []byte) []byte {
			copy(r[copyBytes+binaryBytes+bytes.Index(r[copyBytes+binaryBytes:], []byte("sha256")):], "sha512")
			return seal(r)
		}, ErrCopies},
		"label":                {func(r []byte) []byte { return both(r, func(h []byte) { h[atLabel] = 'x' }) }, ErrLabel},
		"label's tail":         {func(r []byte) []byte { return both(r, func(h []byte) { h[atLabel+47] = 'x' }) }, ErrLabel},
		"subsystem":            {func(r []byte) []byte { return both(r, func(h []byte) { h[atSubsystem] = 'x' }) }, ErrLabel},
		"no UUID":              {func(r []byte) []byte { return both(r, func(h []byte) { clear(h[atUUID:][:40]) }) }, ErrUUID},
		"UUID with a slash":    {func(r []byte) []byte { return both(r, func(h []byte) { h[atUUID+1] = '/' }) }, ErrUUID},
		"UUID with an escape":  {func(r []byte) []byte { return both(r, func(h []byte) { h[atUUID+1] = '\n' }) }, ErrUUID},
		"UUID's tail":          {func(r []byte) []byte { return both(r, func(h []byte) { h[atUUID+39] = 'x' }) }, ErrUUID},
		"UUID is too long":     {func(r []byte) []byte { return both(r, func(h []byte) { h[atUUID+36] = '0' }) }, ErrUUID},
		"padding":              {func(r []byte) []byte { return both(r, func(h []byte) { h[264] = 1 }) }, ErrPadding},
		"padding before sum":   {func(r []byte) []byte { return both(r, func(h []byte) { h[447] = 1 }) }, ErrPadding},
		"padding after sum":    {func(r []byte) []byte { return both(r, func(h []byte) { h[512] = 1 }) }, ErrPadding},
		"padding's end":        {func(r []byte) []byte { return both(r, func(h []byte) { h[4095] = 1 }) }, ErrPadding},
		"behind the JSON":      {func(r []byte) []byte { return both(r, func(h []byte) { h[copyBytes-1] = ' ' }) }, ErrPadding},
		"second JSON":          {func(r []byte) []byte { return both(r, func(h []byte) { copy(h[8192:], "{}") }) }, ErrPadding},
		"JSON without an end":  {func(r []byte) []byte { return both(r, func(h []byte) { fill(h[binaryBytes:], ' ') }) }, ErrPadding},
		"JSON behind a zero":   {func(r []byte) []byte { return both(r, func(h []byte) { h[binaryBytes] = 0 }) }, ErrPadding},
		"no JSON":              {func(r []byte) []byte { return both(r, func(h []byte) { clear(h[binaryBytes:]) }) }, ErrJSON},
		"white space at first": {func(r []byte) []byte { return both(r, func(h []byte) { shift(h[binaryBytes:]) }) }, ErrJSON},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			refuses(t, c.change(realHeader(t)), c.want)
		})
	}
}

func fill(b []byte, with byte) {
	for i := range b {
		if b[i] == 0 {
			b[i] = with
		}
	}
}

func shift(b []byte) {
	copy(b[1:], bytes.Clone(b))
	b[0] = ' '
}

func refuses(t *testing.T, raw []byte, want error) {
	t.Helper()
	m, err := Parse(raw)
	if !errors.Is(err, want) || m != (Metadata{}) {
		t.Fatalf("%+v, %v, want %v", m, err, want)
	}
	if errdefs.IsDataLoss(err) == errdefs.IsFailedPrecondition(err) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%q has not one class or not one line", err)
	}
}

func TestParseRefusesJSON(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		old, new string // replaced once
		want     error
	}{
		"unknown field":               {`{"keyslots"`, `{"x":1,"keyslots"`, ErrUnknownField},
		"unknown field in a keyslot":  {`"key_size":96`, `"priority":2,"key_size":96`, ErrUnknownField},
		"unknown field in an area":    {`"type":"raw"`, `"type":"raw","hash":"sha256"`, ErrUnknownField},
		"unknown field in a KDF":      {`"type":"pbkdf2"`, `"type":"pbkdf2","time":1`, ErrUnknownField},
		"unknown field in a segment":  {`"iv_tweak"`, `"x":"0","iv_tweak"`, ErrUnknownField},
		"unknown field in integrity":  {`"journal_integrity":"none"`, `"journal_integrity":"none","key_size":32`, ErrUnknownField},
		"unknown field in a digest":   {`"keyslots":["0"]`, `"x":[],"keyslots":["0"]`, ErrUnknownField},
		"unknown field in config":     {`"json_size"`, `"x":"1","json_size"`, ErrUnknownField},
		"wrongly cased field":         {`"tokens"`, `"Tokens"`, ErrUnknownField},
		"wrongly cased field beside":  {`"tokens":{}`, `"tokens":{},"Tokens":{"0":{}}`, ErrUnknownField},
		"field that only looks alike": {`"tokens"`, `"to\u212Aens"`, ErrUnknownField},
		"repeated field":              {`"tokens":{}`, `"tokens":{},"tokens":{}`, ErrUnknownField},
		"repeated field, escaped":     {`"sector_size":4096`, `"sector_size":4096,"sector\u005fsize":512`, ErrUnknownField},
		"repeated keyslot":            {`"keyslots":{`, `"keyslots":{"0":{},`, ErrUnknownField},
		"repeated segment":            {`"segments":{`, `"segments":{"0":{"type":"linear"},`, ErrUnknownField},
		"repeated digest":             {`"digests":{`, `"digests":{"0":{},`, ErrUnknownField},
		"missing tokens":              {`"tokens":{},`, ``, ErrUnknownField},
		"null tokens":                 {`"tokens":{}`, `"tokens":null`, ErrUnknownField},
		"null beside":                 {`"iv_tweak":"0"`, `"iv_tweak":"0","flags":null`, ErrUnknownField},
		"empty flags of a segment":    {`"iv_tweak":"0"`, `"iv_tweak":"0","flags":[]`, ErrUnknownField},
		"null requirements":           {`"keyslots_size"`, `"requirements":null,"keyslots_size"`, ErrRequirements},
		"number in place of a string": {`"offset":"0"`, `"offset":0`, ErrJSON},
		"string in place of a number": {`"sector_size":4096`, `"sector_size":"4096"`, ErrJSON},
		"number as a float":           {`"sector_size":4096`, `"sector_size":4096.0`, ErrJSON},
		"number as a power":           {`"sector_size":4096`, `"sector_size":4096e0`, ErrJSON},
		"number that wraps around":    {`"sector_size":4096`, `"sector_size":18446744073709555712`, ErrJSON},
		"octal number":                {`"sector_size":4096`, `"sector_size":010000`, ErrJSON},
		"comment":                     {`"tokens":{}`, `"tokens":{/**/}`, ErrJSON},
		"single quotes":               {`"tokens"`, `'tokens'`, ErrJSON},
		"trailing comma":              {`"tokens":{}`, `"tokens":{},,`, ErrJSON},
		"array at the top":            {`{"keyslots"`, `[{"keyslots"`, ErrJSON},
		"cut short":                   {`"}}`, `"}`, ErrJSON},
		"second value":                {`"keyslots_size":"385024"}}`, `"keyslots_size":"385024"}}{}`, ErrJSON},

		"smaller JSON area":       {`"json_size":"12288"`, `"json_size":"8192"`, ErrConfig},
		"leading zero":            {`"json_size":"12288"`, `"json_size":"012288"`, ErrConfig},
		"no JSON size":            {`"json_size":"12288",`, ``, ErrConfig},
		"larger keyslot area":     {`"keyslots_size":"385024"`, `"keyslots_size":"16744448"`, ErrConfig},
		"negative keyslot area":   {`"keyslots_size":"385024"`, `"keyslots_size":"-1"`, ErrConfig},
		"no config":               {`,"config":{"json_size":"12288","keyslots_size":"385024"}`, ``, ErrConfig},
		"discards":                {`"json_size"`, `"flags":["allow-discards"],"json_size"`, ErrFlags},
		"no journal":              {`"json_size"`, `"flags":["no-journal"],"json_size"`, ErrFlags},
		"no flags":                {`"json_size"`, `"flags":[],"json_size"`, ErrUnknownField},
		"reencryption":            {`"json_size"`, `"requirements":{"mandatory":["online-reencrypt-v2"]},"json_size"`, ErrRequirements},
		"no requirements":         {`"json_size"`, `"requirements":{},"json_size"`, ErrRequirements},
		"token":                   {`"tokens":{}`, `"tokens":{"0":{"type":"luks2-keyring","keyslots":["0"],"key_description":"x"}}`, ErrToken},
		"token of another type":   {`"tokens":{}`, `"tokens":{"0":{"type":"systemd-tpm2","keyslots":[]}}`, ErrToken},
		"null token":              {`"tokens":{}`, `"tokens":{"0":null}`, ErrToken},
		"no keyslot":              {`"keyslots":{"0":`, `"keyslots":{},"x":{"0":`, ErrUnknownField},
		"keyslot of another name": {`"keyslots":{"0":`, `"keyslots":{"1":`, ErrKeyslots},
		"keyslot 00":              {`"keyslots":{"0":`, `"keyslots":{"00":`, ErrKeyslots},
		"second keyslot":          {`"keyslots":{`, `"keyslots":{"1":{"type":"luks2"},`, ErrKeyslots},
		"keyslot of reencryption": {`"type":"luks2"`, `"type":"reencrypt"`, ErrKeyslots},
		"null keyslot":            {`"keyslots":{`, `"keyslots":{"1":null,`, ErrKeyslots},

		"key without the HMAC's":      {`"key_size":96`, `"key_size":64`, ErrKeySize},
		"short key":                   {`"key_size":96`, `"key_size":1`, ErrKeySize},
		"no key":                      {`"key_size":96,`, ``, ErrKeySize},
		"negative key":                {`"key_size":96`, `"key_size":-96`, ErrKeySize},
		"few stripes":                 {`"stripes":4000`, `"stripes":1`, ErrAntiForensic},
		"weak hash of stripes":        {`"stripes":4000,"hash":"sha256"`, `"stripes":4000,"hash":"sha1"`, ErrAntiForensic},
		"other splitter":              {`"type":"luks1"`, `"type":"luks2"`, ErrAntiForensic},
		"few iterations":              {`"iterations":1000,"salt":"Z`, `"iterations":1,"salt":"Z`, ErrKDF},
		"many iterations":             {`"iterations":1000,"salt":"Z`, `"iterations":2147483647,"salt":"Z`, ErrKDF},
		"argon2id":                    {`"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"Z`, `"type":"argon2id","hash":"sha256","iterations":1000,"salt":"Z`, ErrKDF},
		"weak hash of the KDF":        {`"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"Z`, `"type":"pbkdf2","hash":"sha1","iterations":1000,"salt":"Z`, ErrKDF},
		"short salt":                  {`"salt":"Z+7lZxBu1AOhz4ownAuIWYbDvZu8224Qa0G2ZWiwLLo="`, `"salt":"Z+7l"`, ErrKDF},
		"long salt":                   {`"salt":"Z+7l`, `"salt":"Z+7lZ+7l`, ErrKDF},
		"salt that is no base64":      {`"salt":"Z+7l`, `"salt":"Z-7l`, ErrKDF},
		"salt with a line end":        {`"salt":"Z+7l`, `"salt":"Z+7l\n`, ErrKDF},
		"area of another type":        {`"type":"raw"`, `"type":"journal"`, ErrArea},
		"area over the header":        {`"offset":"32768"`, `"offset":"0"`, ErrArea},
		"area over the second":        {`"offset":"32768"`, `"offset":"28672"`, ErrArea},
		"area outside":                {`"offset":"32768"`, `"offset":"417792"`, ErrArea},
		"area that wraps around":      {`"offset":"32768"`, `"offset":"18446744073709518848"`, ErrArea},
		"larger area":                 {`"size":"385024"`, `"size":"389120"`, ErrArea},
		"area too small":              {`"size":"385024"`, `"size":"4096"`, ErrArea},
		"null cipher of the keyslot":  {`"encryption":"aes-xts-plain64","key_size":64`, `"encryption":"cipher_null-ecb","key_size":64`, ErrAreaCipher},
		"weak cipher of the keyslot":  {`"encryption":"aes-xts-plain64","key_size":64`, `"encryption":"aes-ecb","key_size":64`, ErrAreaCipher},
		"short key of the keyslot":    {`"encryption":"aes-xts-plain64","key_size":64`, `"encryption":"aes-xts-plain64","key_size":32`, ErrAreaCipher},
		"no segment":                  {`"segments":{"0":`, `"segments":{},"x":{"0":`, ErrUnknownField},
		"segment of another name":     {`"segments":{"0":`, `"segments":{"1":`, ErrSegments},
		"second segment":              {`"segments":{`, `"segments":{"1":{"type":"crypt"},`, ErrSegments},
		"segment without encryption":  {`"type":"crypt"`, `"type":"linear"`, ErrSegments},
		"backup segment":              {`"iv_tweak":"0"`, `"iv_tweak":"0","flags":["backup-final"]`, ErrSegmentFlags},
		"segment that starts later":   {`"offset":"0"`, `"offset":"4096"`, ErrSegmentRange},
		"segment that ends earlier":   {`"size":"dynamic"`, `"size":"4096"`, ErrSegmentRange},
		"null cipher":                 {`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"cipher_null-ecb","sector_size"`, ErrCipher},
		"null cipher, other spelling": {`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"capi:authenc(hmac(sha256),ecb(cipher_null))-null","sector_size"`, ErrCipher},
		"cipher with a zero byte":     {`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"aes-xts-plain64\u0000","sector_size"`, ErrCipher},
		"IVs that repeat":             {`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"aes-xts-null","sector_size"`, ErrCipher},
		"random IVs":                  {`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"aes-xts-random","sector_size"`, ErrCipher},
		"shifted IVs":                 {`"iv_tweak":"0"`, `"iv_tweak":"8"`, ErrIV},
		"sectors of 512 bytes":        {`"sector_size":4096`, `"sector_size":512`, ErrSectorSize},
		"no integrity":                {`,"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`, ``, ErrIntegrity},
		"null integrity":              {`"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`, `"integrity":null`, ErrIntegrity},
		"integrity without a key":     {`"type":"hmac(sha256)"`, `"type":"none"`, ErrIntegrity},
		"checksum for integrity":      {`"type":"hmac(sha256)"`, `"type":"crc32c"`, ErrIntegrity},
		"encrypted journal":           {`"journal_encryption":"none"`, `"journal_encryption":"ctr(aes)"`, ErrIntegrity},
		"authentic journal":           {`"journal_integrity":"none"`, `"journal_integrity":"hmac(sha256)"`, ErrIntegrity},

		"no digest":                  {`"digests":{"0":`, `"digests":{},"x":{"0":`, ErrUnknownField},
		"digest of another name":     {`"digests":{"0":`, `"digests":{"1":`, ErrDigests},
		"second digest":              {`"digests":{`, `"digests":{"1":{"type":"pbkdf2"},`, ErrDigests},
		"digest without a keyslot":   {`"keyslots":["0"]`, `"keyslots":[]`, ErrDigests},
		"digest of two keyslots":     {`"keyslots":["0"]`, `"keyslots":["0","1"]`, ErrDigests},
		"digest without a segment":   {`"segments":["0"]`, `"segments":[]`, ErrDigests},
		"digest of another segment":  {`"segments":["0"]`, `"segments":["1"]`, ErrDigests},
		"digest of a segment twice":  {`"segments":["0"]`, `"segments":["0","0"]`, ErrDigests},
		"digest of another type":     {`"type":"pbkdf2","keyslots"`, `"type":"none","keyslots"`, ErrDigest},
		"digest with a weak hash":    {`"hash":"sha256","iterations":1000,"salt":"i`, `"hash":"sha1","iterations":1000,"salt":"i`, ErrDigest},
		"digest of few iterations":   {`"iterations":1000,"salt":"i`, `"iterations":1,"salt":"i`, ErrDigest},
		"digest of many iterations":  {`"iterations":1000,"salt":"i`, `"iterations":100000000,"salt":"i`, ErrDigest},
		"digest without salt":        {`"salt":"iI0AKpFXkzyFMVTyIuFnX4s8ZmV30AlIZApk4OXNAtQ="`, `"salt":""`, ErrDigest},
		"short digest":               {`"digest":"NMrs`, `"digest":"`, ErrDigest},
		"digest that is no base64":   {`"digest":"NMrs`, `"digest":"N rs`, ErrDigest},
		"digest with loose end bits": {`RsBuY="`, `RsBuZ="`, ErrDigest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			raw := realHeader(t)
			text := jsonText(t, raw)
			changed := strings.Replace(text, c.old, c.new, 1)
			if changed == text {
				t.Fatalf("%s is not in the real header", c.old)
			}
			refuses(t, withJSON(t, raw, changed), c.want)
		})
	}
}

// The order of fields and the white space are cryptsetup's affair.
func TestParseTakesOtherSpelling(t *testing.T) {
	t.Parallel()
	raw := realHeader(t)
	var indented bytes.Buffer
	if err := json.Indent(&indented, []byte(jsonText(t, raw)), "", " "); err != nil {
		t.Fatal(err)
	}
	sorted, err := json.Marshal(tree(t, []byte(jsonText(t, raw))))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{indented.String(), string(sorted)} {
		if _, err := Parse(withJSON(t, raw, text)); err != nil {
			t.Errorf("%v: %s", err, text)
		}
	}
}

func tree(t *testing.T, text []byte) (tree map[string]any) {
	t.Helper()
	if err := json.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	return tree
}

// demanded is a header's JSON without what is random in it.
const demanded = `{
	"keyslots": {"0": {
		"type": "luks2", "key_size": 96, "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
		"area": {"type": "raw", "offset": "32768", "size": "385024", "encryption": "aes-xts-plain64", "key_size": 64},
		"kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": "-"}
	}},
	"tokens": {},
	"segments": {"0": {
		"type": "crypt", "offset": "0", "size": "dynamic", "iv_tweak": "0", "encryption": "aes-xts-plain64", "sector_size": 4096,
		"integrity": {"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}
	}},
	"digests": {"0": {"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256", "iterations": 1000, "salt": "-", "digest": "-"}},
	"config": {"json_size": "12288", "keyslots_size": "385024"}
}`

// FuzzParse changes a header anywhere; with fix also its checksums, or nothing but a checksum would ever be wrong. What is accepted is
// compared, by other means than those of Parse, with what was demanded.
func FuzzParse(f *testing.F) {
	raw := realHeader(f)
	text, err := fixedText(raw[binaryBytes:copyBytes])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw[:512], []byte(text), true)
	f.Add(raw[:512], []byte(text), false)
	f.Add(raw[copyBytes:][:512], []byte(text), true)
	f.Add([]byte{}, []byte("{}"), true)
	f.Fuzz(func(t *testing.T, head, text []byte, fix bool) {
		raw := realHeader(t)
		for _, half := range halves(raw) {
			magic, offset := bytes.Clone(half[:6]), bytes.Clone(half[atOffset:][:8])
			copy(half[:binaryBytes], head)
			clear(half[binaryBytes:])
			copy(half[binaryBytes:], text)
			if fix {
				copy(half, magic)
				copy(half[atOffset:], offset)
			}
		}
		if fix {
			seal(raw)
		}
		m, err := Parse(raw)
		if err != nil {
			if errdefs.IsDataLoss(err) == errdefs.IsFailedPrecondition(err) || m != (Metadata{}) {
				t.Errorf("%+v, %v", m, err)
			}
			return
		}
		if m.UUID() == "" || m.sequence == 0 {
			t.Errorf("accepted %+v", m)
		}
		is := tree(t, bytes.TrimRight(text, "\x00"))
		kdf := is["keyslots"].(map[string]any)["0"].(map[string]any)["kdf"].(map[string]any)
		digest := is["digests"].(map[string]any)["0"].(map[string]any)
		kdf["salt"], digest["salt"], digest["digest"] = "-", "-", "-"
		if diff := cmp.Diff(tree(t, []byte(demanded)), is); diff != "" {
			t.Errorf("accepted what was not demanded: %s", diff)
		}
	})
}
