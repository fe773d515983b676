package schedule

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// obstacle is one reason that some nodes share.
type obstacle struct {
	nodes int
	lack  lack   // for a resource, with the most that any of them has free
	one   string // the reason for a single node: "has taint x", "is not ready"
	many  string
}

// explain says why a pod of this shape fits nowhere: how many nodes fail for which
// reason, the most frequent first. It is found once per pass: placing more pods
// does not make it better.
func (s *shape) explain(t *Table) string {
	if s.reason == "" {
		s.reason = s.obstacles(t)
	}
	return s.reason
}

func (s *shape) obstacles(t *Table) string {
	total, found := 0, map[string]*obstacle{}
	count := func(key string, o obstacle) {
		known := found[key]
		if known == nil {
			known = &o
			found[key] = known
		}
		known.nodes++
		known.lack.free = max(known.lack.free, o.lack.free)
	}
	for _, n := range t.nodes {
		if n.object == nil {
			continue
		}
		total++
		if o, ok := s.staticObstacle(n); ok {
			count(o.one, o)
			continue
		}
		for _, l := range n.lacking(&s.needs) {
			count("lack "+l.name, obstacle{lack: l})
		}
	}
	if total == 0 {
		return "the cluster has no nodes"
	}
	list := slices.SortedFunc(maps.Values(found), func(a, b *obstacle) int {
		return cmp.Or(cmp.Compare(b.nodes, a.nodes), cmp.Compare(a.text(), b.text()))
	})
	texts := make([]string, len(list))
	for i, o := range list {
		texts[i] = strconv.Itoa(o.nodes) + " " + o.text()
	}
	return fmt.Sprintf("0 of %d nodes: %s", total, strings.Join(texts, ", "))
}

func (o *obstacle) text() string {
	verb := "lack"
	if o.nodes == 1 {
		verb = "lacks"
	}
	switch {
	case o.lack.name == "":
		if o.nodes == 1 {
			return o.one
		}
		return o.many
	case o.lack.name == "pods":
		if o.nodes == 1 {
			return "runs as many pods as it may"
		}
		return "run as many pods as they may"
	case strings.HasPrefix(o.lack.name, portPrefix):
		if o.nodes == 1 {
			return "has " + o.lack.name + " in use"
		}
		return "have " + o.lack.name + " in use"
	}
	return fmt.Sprintf("%s %s (need %s, most free %s)", verb, o.lack.name, o.lack.format(o.lack.need), o.lack.format(o.lack.free))
}

// staticObstacle is why n is out of the question whatever its load.
func (s *shape) staticObstacle(n *node) (obstacle, bool) {
	if !n.ready {
		return obstacle{one: "is not ready", many: "are not ready"}, true
	}
	what := s.unsuited(n)
	taint, tainted := strings.CutPrefix(what, "taint ")
	switch {
	case what == "":
		return obstacle{}, false
	case tainted:
		rest := " taint " + taint + " that the pod does not tolerate"
		return obstacle{one: "has" + rest, many: "have" + rest}, true
	case what == "cordoned":
		return obstacle{one: "is cordoned", many: "are cordoned"}, true
	case what == "selector":
		rest := " not match the nodeSelector " + selectorText(s.spec.NodeSelector)
		return obstacle{one: "does" + rest, many: "do" + rest}, true
	}
	rest := " not match the required node affinity"
	return obstacle{one: "does" + rest, many: "do" + rest}, true
}

func selectorText(m map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, k+"="+m[k])
	}
	return strings.Join(parts, ",")
}

func taintText(t *corev1.Taint) string {
	text := t.Key
	if t.Value != "" {
		text += "=" + t.Value
	}
	return text + ":" + string(t.Effect)
}
