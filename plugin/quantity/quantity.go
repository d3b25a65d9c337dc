// Package quantity reads the sizes that authors of pods write: in an annotation
// for the plugin, and in volumeAttributes for a CSI driver; the tool that writes
// policies reads them as these two do. It imports
// shim/hotplug, for the largest size, and no other package of the project.
package quantity

import (
	"fmt"
	"regexp"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/sealvol/sealvol/shim/hotplug"
)

// bytesRE are Kubernetes' quantities, but for exponents and digits without end:
// its parser would write out what they stand for.
var bytesRE = regexp.MustCompile(`^[0-9]{1,20}(\.[0-9]{1,20})?([KMGTPE]i|[kMGTPE]|e[0-9]{1,2})?$`)

// Bytes gives the bytes of a quantity such as "1.5Gi", rounded up, from 1 to
// [hotplug.MaxBytes].
func Bytes(text string) (int64, error) {
	if !bytesRE.MatchString(text) {
		return 0, fmt.Errorf("%.40q is no quantity of bytes, such as \"10Gi\"", text)
	}
	q, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, fmt.Errorf("%q: %w", text, err)
	}
	if q.Sign() <= 0 || q.CmpInt64(hotplug.MaxBytes) > 0 {
		return 0, fmt.Errorf("%q is not between 1 and %d bytes", text, int64(hotplug.MaxBytes))
	}
	return q.Value(), nil
}
