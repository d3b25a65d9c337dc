package volume

import (
	"os"
	"path/filepath"
	"testing"
)

// As Linux 6.12 prints it, shortened.
const procCrypto = `name         : authenc(hmac(sha256),xts(aes))
driver       : authenc(hmac(sha256-ni),xts-aes-aesni)
module       : authenc
priority     : 5030
refcnt       : 2
selftest     : passed
internal     : no
type         : aead

name         : aegis128
driver       : aegis128-generic
priority     : 100
selftest     : passed
internal     : no
type         : aead

name         : aegis128
driver       : aegis128-aesni
priority     : 400
selftest     : passed
internal     : no
type         : aead

name         : aegis128
driver       : cryptd(aegis128-aesni)
priority     : 500
selftest     : passed
internal     : yes
type         : aead

name         : aegis128
driver       : aegis128-broken
priority     : 900
selftest     : unknown
internal     : no
type         : aead
`

func TestCipherDriverIsTheOneThatTheKernelTakes(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "crypto")
	if err := os.WriteFile(file, []byte(procCrypto), 0o600); err != nil {
		t.Fatal(err)
	}
	for cipher, want := range map[string]string{
		"capi:aegis128-random":                        "aegis128-aesni",
		"capi:authenc(hmac(sha256),xts(aes))-plain64": "authenc(hmac(sha256-ni),xts-aes-aesni)",
		"capi:authenc(hmac(sha512),xts(aes))-random":  "",
	} {
		if got, err := cipherDriver(file, cipher); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", cipher, got, err, want)
		}
	}
	if _, err := cipherDriver(file+"-absent", "capi:aegis128-random"); err == nil {
		t.Error("found a driver in a file that is not there")
	}
}
