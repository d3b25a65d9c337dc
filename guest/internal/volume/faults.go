package volume

import (
	"context"
	"log/slog"

	"github.com/containerd/errdefs"

	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
	"github.com/sealvol/sealvol/guest/internal/blockdev"
	"github.com/sealvol/sealvol/guest/internal/ioerror"
)

// watchFaults begins to watch for I/O that fails. A kernel that cannot tell makes no volume less safe: what fails is an error for who asked for
// it; only nobody sees that a volume is degraded.
func watchFaults(log *slog.Logger) (w watcher, stop func() error, err error) {
	opened, err := ioerror.Open(log)
	if errdefs.IsFailedPrecondition(err) {
		log.Warn("volumes will not be shown as degraded", "error", err)
		return blind{}, func() error { return nil }, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return opened, opened.Close, nil
}

// blind is a watcher that sees nothing.
type blind struct{}

func (blind) Watch(blockdev.Number, func(ioerror.Fault))   {}
func (blind) Faults(blockdev.Number) (none ioerror.Report) { return none }
func (blind) Forget(blockdev.Number)                       {}

// watch counts the faults of the volume's topmost mapping, where all that an application can see of them passes, until the mapping goes.
func (m *Manager) watch(v *volume) {
	m.kernel.faults.Watch(v.crypt.Number, func(first ioerror.Fault) {
		v.log.Error("volume is degraded: I/O failed", "what", first.String())
	})
	v.layers.push(func(context.Context) error {
		v.faults = sum(v.faults, m.kernel.faults.Faults(v.crypt.Number))
		m.kernel.faults.Forget(v.crypt.Number)
		return nil
	})
}

// sum joins what was counted in two times, the earlier one first.
func sum(earlier, later ioerror.Report) ioerror.Report {
	both := ioerror.Report{Count: earlier.Count + later.Count, First: earlier.First, Incomplete: earlier.Incomplete || later.Incomplete}
	if earlier.Count == 0 {
		both.First = later.First
	}
	return both
}

// showFaults describes faults; nil where there is none to show.
func showFaults(r ioerror.Report) *sealvolv1.Faults {
	if r.Count == 0 {
		return nil
	}
	return &sealvolv1.Faults{Count: r.Count, AtLeast: r.Incomplete, FirstSector: r.First.Sector, FirstOperation: string(r.First.Op)}
}
