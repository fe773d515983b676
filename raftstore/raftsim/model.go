package raftsim

import (
	"math"
	"time"

	"github.com/anishathalye/porcupine"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
)

// checkPorcupine asks porcupine whether the clients' history of each object is that of
// a register with compare-and-set. It knows nothing of the order of revisions but what
// the answers say.
func (c *cluster) checkPorcupine(p *past) {
	wrote := map[string]uint64{}
	for r, e := range p.changes {
		if e.typ != raftstore.Deleted {
			wrote[e.name+"="+e.value] = r
		}
	}
	for i := range singles {
		c.checkRegister(single(i), entry{}, wrote)
	}
	for i := range pairs {
		a, b := pair(i)
		c.checkRegister(a, entry{"first", wrote[a+"=first"]}, wrote)
		c.checkRegister(b, entry{"first", wrote[b+"=first"]}, wrote)
	}
}

// patience is how long porcupine may think, in real time.
const patience = 10 * time.Second

func (c *cluster) checkRegister(name string, first entry, wrote map[string]uint64) {
	var ops []porcupine.Operation
	for _, o := range c.history.ops {
		if o.verb != list && !o.about(name) {
			continue
		}
		step := registerStep{operation: o, name: name, revision: o.revision}
		end := o.end
		if o.outcome == unknown {
			end = math.MaxInt64
			step.revision = wrote[name+"="+o.value]
			if o.verb != remove && step.revision == 0 {
				continue // it never happened
			}
		} else if o.verb == both && len(o.names) == 2 && name == o.names[0] {
			step.revision--
		}
		ops = append(ops, porcupine.Operation{ClientId: o.client, Input: step, Call: o.call, Output: nil, Return: end})
	}
	if porcupine.CheckOperationsTimeout(register(first), ops, patience) != porcupine.Ok {
		c.fail("porcupine: the history of %s is not linearizable", name)
	}
}

// registerStep is an operation as one object sees it.
type registerStep struct {
	*operation
	name     string
	revision uint64
}

// register is one object: absent when its value is empty.
func register(first entry) porcupine.Model {
	return (&porcupine.NondeterministicModel{
		Init: func() []any { return []any{first} },
		Step: func(state, input, _ any) []any { return input.(registerStep).next(state.(entry)) },
	}).ToModel()
}

// next returns the states that an object can have after the step, none if the step
// cannot have happened.
func (s registerStep) next(now entry) []any {
	absent := now == entry{}
	var holds bool
	switch s.verb {
	case get, list:
		if s.seen[s.name] == now {
			return []any{now}
		}
		return nil
	case create:
		holds = absent
	case cas:
		holds = now.revision == s.expect
	default:
		holds = !absent
	}
	after := entry{s.value, s.revision}
	if s.verb == remove {
		after = entry{}
	}
	switch {
	case s.outcome == unknown && s.verb == remove && holds:
		return []any{now, after}
	case s.outcome == unknown && s.verb == remove:
		return []any{now}
	case s.outcome == rejected && s.code == 0: // never proposed
		return []any{now}
	case s.outcome == rejected:
		if s.explains(now) {
			return []any{now}
		}
		return nil
	case holds:
		return []any{after}
	}
	return nil
}

// explains reports whether the rejection is the right one.
func (s registerStep) explains(now entry) bool {
	absent := now == entry{}
	switch s.code {
	case command.Exists:
		return s.verb == create && !absent
	case command.NotFound:
		return s.verb != create && absent
	case command.Conflict:
		return s.verb == cas && !absent && now.revision != s.expect
	}
	return false
}
