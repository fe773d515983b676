// Package diff finds the fewest operations that turn one service table into
// another. It is pure; the backends carry the operations out.
package diff

import "decree.dev/decree/netplane/render"

// Op is the change of one service port. Have is nil for a new one, Want is nil for
// one to remove; they are never both nil and never equal.
type Op struct {
	Have, Want *render.Service
}

// Port is the service port that changes.
func (o Op) Port() render.Port {
	if o.Want != nil {
		return o.Want.Port
	}
	return o.Have.Port
}

// Services returns the changes from have to want, both ordered by port, in the
// order of their ports. The result points into both arguments.
func Services(have, want []render.Service) []Op {
	return ServicesBy(have, want, (*render.Service).Equal)
}

// ServicesBy is Services for those who look at more of a service than Equal does.
func ServicesBy(have, want []render.Service, equal func(a, b *render.Service) bool) []Op {
	var ops []Op
	for len(have) > 0 || len(want) > 0 {
		switch c := compare(have, want); {
		case c < 0:
			ops = append(ops, Op{Have: &have[0]})
			have = have[1:]
		case c > 0:
			ops = append(ops, Op{Want: &want[0]})
			want = want[1:]
		default:
			if !equal(&have[0], &want[0]) {
				ops = append(ops, Op{Have: &have[0], Want: &want[0]})
			}
			have, want = have[1:], want[1:]
		}
	}
	return ops
}

// compare orders the heads of two lists; a list that ended comes last.
func compare(have, want []render.Service) int {
	switch {
	case len(have) == 0:
		return 1
	case len(want) == 0:
		return -1
	}
	return have[0].Compare(want[0].Port)
}
