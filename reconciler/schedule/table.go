package schedule

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/schemas/api"
)

// Table is what the scheduler knows about the nodes: what they have and what is
// taken. It is kept up to date change by change, which makes a pass over a few pods
// cheap in a cluster of thousands of nodes. It is not safe for concurrent use.
type Table struct {
	nodes  []*node // by name
	byName map[string]*node
	pods   map[types.UID]placed
}

// node is one row. A node that is not known itself (object is nil) takes no pods
// but keeps count of those bound to it.
type node struct {
	name        string
	object      *corev1.Node
	ready       bool
	allocatable amounts
	used        amounts
	scored      [2]int64 // used CPU and memory, with an assumption for pods that ask for none
	owners      map[types.UID]int32
}

// placed is what one pod takes from which node.
type placed struct {
	node  string
	owner types.UID
	needs amounts
	score [2]int64
}

// NewTable builds the table of all nodes and bound pods in r.
func NewTable(r api.Reader) *Table {
	t := &Table{byName: map[string]*node{}, pods: map[types.UID]placed{}}
	for n := range api.List[*corev1.Node](r, "") {
		t.SetNode(n)
	}
	for p := range api.List[*corev1.Pod](r, "") {
		t.SetPod(p)
	}
	return t
}

func (t *Table) row(name string) *node {
	if n := t.byName[name]; n != nil {
		return n
	}
	n := &node{name: name, owners: map[types.UID]int32{}}
	i, _ := slices.BinarySearchFunc(t.nodes, name, func(n *node, name string) int { return cmp.Compare(n.name, name) })
	t.nodes = slices.Insert(t.nodes, i, n)
	t.byName[name] = n
	return n
}

// SetNode adds a node or replaces what is known about it.
func (t *Table) SetNode(o *corev1.Node) {
	n := t.row(o.Name)
	n.object, n.ready = o, false
	for _, c := range o.Status.Conditions {
		if c.Type == corev1.NodeReady {
			n.ready = c.Status == corev1.ConditionTrue
		}
	}
	list := o.Status.Allocatable
	if list == nil {
		list = o.Status.Capacity
	}
	n.allocatable = amountsOf(list)
	if _, set := list[corev1.ResourcePods]; !set {
		n.allocatable.pods = defaultMaxPods
	}
}

// RemoveNode forgets a node; pods that are bound to it stay counted.
func (t *Table) RemoveNode(name string) {
	if n := t.byName[name]; n != nil {
		n.object, n.ready, n.allocatable = nil, false, amounts{}
		t.tidy(n)
	}
}

// tidy drops a row that neither is a node nor has pods.
func (t *Table) tidy(n *node) {
	if n.object != nil || n.used.pods > 0 {
		return
	}
	delete(t.byName, n.name)
	i, found := slices.BinarySearchFunc(t.nodes, n.name, func(n *node, name string) int { return cmp.Compare(n.name, name) })
	if found {
		t.nodes = slices.Delete(t.nodes, i, i+1)
	}
}

// SetPod records what a pod takes from the node it is bound to; a pod that is
// finished or not bound takes nothing. It is idempotent, and confirms what
// [Schedule] assumed. Pods on their way out count until they are gone.
func (t *Table) SetPod(p *corev1.Pod) {
	t.RemovePod(p.UID)
	if p.Spec.NodeName == "" || api.PodFinished(p) {
		return
	}
	t.assume(t.row(p.Spec.NodeName), p, shapeOf(p))
}

// RemovePod gives back what the pod took.
func (t *Table) RemovePod(uid types.UID) {
	was, known := t.pods[uid]
	if !known {
		return
	}
	delete(t.pods, uid)
	n := t.byName[was.node]
	n.used.add(was.needs, -1)
	n.scored[0] -= was.score[0]
	n.scored[1] -= was.score[1]
	if n.owners[was.owner]--; n.owners[was.owner] <= 0 {
		delete(n.owners, was.owner)
	}
	t.tidy(n)
}

// assume takes what a pod of shape s needs from n.
func (t *Table) assume(n *node, p *corev1.Pod, s *shape) {
	t.pods[p.UID] = placed{node: n.name, owner: s.owner, needs: s.needs, score: s.score}
	n.used.add(s.needs, 1)
	n.scored[0] += s.score[0]
	n.scored[1] += s.score[1]
	if s.owner != "" {
		n.owners[s.owner]++
	}
}

func ownerOf(p *corev1.Pod) types.UID {
	if ref := metav1.GetControllerOf(p); ref != nil {
		return ref.UID
	}
	return ""
}
