package volume

import (
	"context"
	"fmt"
)

// layers is what has been set up, in order, each with its reverse.
type layers []layer

type layer struct {
	what   string
	remove func(context.Context) error
}

func (l *layers) push(what string, remove func(context.Context) error) {
	*l = append(*l, layer{what, remove})
}

// unwind removes the layers, the last one first. It goes on after a failure, so that as little as possible stays, unless ctx has ended:
// then what is below cannot go either. What could not be removed stays in l.
func (l *layers) unwind(ctx context.Context) error {
	var failed error
	var left layers
	for i := len(*l) - 1; i >= 0; i-- {
		this := (*l)[i]
		err := this.remove(ctx)
		if err == nil {
			continue
		}
		err = fmt.Errorf("%s: %w", this.what, err)
		if failed == nil {
			failed = err
		} else {
			failed = fmt.Errorf("%w; %w", failed, err)
		}
		left = append(layers{this}, left...)
		if ctx.Err() != nil {
			left = append((*l)[:i:i], left...)
			break
		}
	}
	*l = left
	return failed
}
