package schedule

import (
	"container/heap"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/schemas/api"
)

// shape is everything about a pod that matters for its placement; pods of one
// template share it.
type shape struct {
	key    string
	owner  types.UID
	needs  amounts
	score  [2]int64 // needs in CPU and memory, or the assumption
	spec   *corev1.PodSpec
	left   int    // pods of this shape that are still to be placed
	reason string // why none could be placed, once known
}

func shapeOf(p *corev1.Pod) *shape {
	s := &shape{owner: ownerOf(p), needs: needsOf(p), spec: &p.Spec}
	s.score = [2]int64{s.needs.cpu, s.needs.memory}
	if s.score[0] == 0 {
		s.score[0] = assumedCPU
	}
	if s.score[1] == 0 {
		s.score[1] = assumedMemory
	}
	s.key = s.encode()
	return s
}

// encode writes all that placement depends on into one string.
func (s *shape) encode() string {
	b := make([]byte, 0, 128)
	b = append(b, s.owner...)
	for _, n := range []int64{s.needs.cpu, s.needs.memory, s.needs.storage} {
		b = strconv.AppendInt(append(b, ' '), n, 10)
	}
	for _, name := range slices.Sorted(maps.Keys(s.needs.extra)) {
		b = strconv.AppendInt(strconv.AppendQuote(b, string(name)), s.needs.extra[name], 10)
	}
	for _, k := range slices.Sorted(maps.Keys(s.spec.NodeSelector)) {
		b = strconv.AppendQuote(strconv.AppendQuote(b, k), s.spec.NodeSelector[k])
	}
	for i := range s.spec.Tolerations {
		t := &s.spec.Tolerations[i]
		for _, f := range []string{t.Key, string(t.Operator), t.Value, string(t.Effect)} {
			b = strconv.AppendQuote(b, f)
		}
	}
	if a := requiredAffinity(s.spec); a != nil {
		raw, err := json.Marshal(a)
		if err != nil {
			panic(fmt.Sprintf("schedule: encode node affinity: %v", err)) // registered types encode
		}
		b = append(b, raw...)
	}
	return string(b)
}

// suits reports whether n passes the filters that do not depend on its load.
func (s *shape) suits(n *node) bool {
	return n.object != nil && n.ready && s.unsuited(n) == ""
}

// unsuited names what about n the pod cannot accept, "" for nothing; it is the
// end of a sentence that begins with a number of nodes.
func (s *shape) unsuited(n *node) string {
	o := n.object
	if o.Spec.Unschedulable && !s.tolerates(&corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule}) {
		return "cordoned"
	}
	for k, v := range s.spec.NodeSelector {
		if have, ok := o.Labels[k]; !ok || have != v {
			return "selector"
		}
	}
	if a := requiredAffinity(s.spec); a != nil && !matchesAny(a.NodeSelectorTerms, o) {
		return "affinity"
	}
	for i := range o.Spec.Taints {
		if t := &o.Spec.Taints[i]; t.Effect != corev1.TaintEffectPreferNoSchedule && !s.tolerates(t) {
			return "taint " + taintText(t)
		}
	}
	return ""
}

func (s *shape) tolerates(t *corev1.Taint) bool {
	for i := range s.spec.Tolerations {
		if api.Tolerates(&s.spec.Tolerations[i], t) {
			return true
		}
	}
	return false
}

// The weights of a score. Spreading an owner's pods counts twice as much as an
// even load; a soft taint outweighs half of the load.
const (
	loadWeight   = 1000
	spreadWeight = 2000
	softTaint    = 500
)

// scoreOn rates n for one more pod of this shape. It never rises when a pod is
// added to n.
func (s *shape) scoreOn(n *node) int64 {
	free := func(have, used int64) int64 {
		if have <= 0 || used >= have {
			return 0
		}
		return int64(float64(have-used) / float64(have) * loadWeight)
	}
	score := (free(n.allocatable.cpu, n.scored[0]+s.score[0]) + free(n.allocatable.memory, n.scored[1]+s.score[1])) / 2
	if s.owner != "" {
		score += spreadWeight / int64(1+n.owners[s.owner])
	}
	for i := range n.object.Spec.Taints {
		if t := &n.object.Spec.Taints[i]; t.Effect == corev1.TaintEffectPreferNoSchedule && !s.tolerates(t) {
			score -= softTaint
		}
	}
	return score
}

// candidates is a heap of the nodes that suit a shape, the best on top. Scores in
// it may be outdated, but only ever too high.
type candidates []candidate

type candidate struct {
	node  *node
	score int64
}

func (c candidates) Len() int { return len(c) }
func (c candidates) Less(i, j int) bool {
	if c[i].score != c[j].score {
		return c[i].score > c[j].score
	}
	return c[i].node.name < c[j].node.name
}
func (c candidates) Swap(i, j int) { c[i], c[j] = c[j], c[i] }
func (c *candidates) Push(x any)   { *c = append(*c, x.(candidate)) }
func (c *candidates) Pop() any {
	old := *c
	x := old[len(old)-1]
	*c = old[:len(old)-1]
	return x
}

// place returns the best node for one more pod of shape s, nil if none fits. The
// top is brought up to date until it is what it claims to be; since no other score
// can have risen, it is then the best.
func (c *candidates) place(s *shape) *node {
	for len(*c) > 0 {
		top := &(*c)[0]
		if !top.node.fits(&s.needs) {
			heap.Pop(c)
			continue
		}
		score := s.scoreOn(top.node)
		if score == top.score {
			return top.node
		}
		top.score = score
		heap.Fix(c, 0)
	}
	return nil
}

// maxHeaps bounds the memory of a pass over pods of very many shapes.
const maxHeaps = 64

// heapCache holds the heaps of the shapes that are being placed.
type heapCache struct {
	heaps map[*shape]*candidates
	order []*shape // oldest first
}

func (h *heapCache) of(t *Table, s *shape) *candidates {
	if c := h.heaps[s]; c != nil {
		return c
	}
	c := make(candidates, 0, len(t.nodes))
	for _, n := range t.nodes {
		if s.suits(n) && n.fits(&s.needs) {
			c = append(c, candidate{n, s.scoreOn(n)})
		}
	}
	heap.Init(&c)
	if len(h.order) >= maxHeaps {
		h.drop(h.order[0])
	}
	if h.heaps == nil {
		h.heaps = map[*shape]*candidates{}
	}
	h.heaps[s] = &c
	h.order = append(h.order, s)
	return &c
}

func (h *heapCache) drop(s *shape) {
	delete(h.heaps, s)
	if i := slices.Index(h.order, s); i >= 0 {
		h.order = slices.Delete(h.order, i, i+1)
	}
}
