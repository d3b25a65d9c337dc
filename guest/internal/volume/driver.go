package volume

import (
	"os"
	"strconv"
	"strings"
)

// cipherDriver is the implementation that the kernel takes for a cipher of dm-crypt's "capi:" form: of those that a file in the format of
// /proc/crypto lists under its name, tested and not for the kernel's inner use, the one with the highest priority. It is "" when there is none.
func cipherDriver(file, cipher string) (string, error) {
	list, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	name := strings.TrimPrefix(cipher, "capi:")
	name = name[:strings.LastIndexByte(name, '-')] // the IV generator
	best, driver := -1, ""
	for entry := range strings.SplitSeq(string(list), "\n\n") {
		fields := map[string]string{}
		for line := range strings.Lines(entry) {
			key, value, _ := strings.Cut(line, ":")
			fields[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
		priority, err := strconv.Atoi(fields["priority"])
		if err == nil && fields["name"] == name && fields["internal"] == "no" && fields["selftest"] == "passed" && priority > best {
			best, driver = priority, fields["driver"]
		}
	}
	return driver, nil
}
