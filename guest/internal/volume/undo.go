package volume

import "context"

// layers is what has been set up, in order: the reverse of each step.
type layers []func(context.Context) error

func (l *layers) push(remove func(context.Context) error) {
	*l = append(*l, remove)
}

// unwind removes the layers, the last one first. It goes on after a failure, so that as little as possible stays, unless ctx has ended:
// then what is below cannot go either. What could not be removed stays in l.
func (l *layers) unwind(ctx context.Context) error {
	var failed error
	var left layers
	for i := len(*l) - 1; i >= 0; i-- {
		err := (*l)[i](ctx)
		if err == nil {
			continue
		}
		failed = oneLine(failed, err)
		left = append(layers{(*l)[i]}, left...)
		if ctx.Err() != nil {
			left = append((*l)[:i:i], left...)
			break
		}
	}
	*l = left
	return failed
}
