// Package plan compares what a commit wants with what is in force and returns the
// difference as data: the mutations that carry it out, a description for people,
// or the reasons why the commit must not be applied. It is pure.
//
// It does not validate objects on their own (the CUE definitions do); it refuses
// what can only be seen beside the current state: changes of immutable fields,
// objects that belong to someone else, deletions over the budget, and namespaces
// that do not exist.
package plan

import (
	"cmp"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// Desired is one object of a commit, with where it is written.
type Desired struct {
	Object api.Object
	Pos    api.Position
	Fields map[string]api.Position
}

// Input is everything a plan depends on.
type Input struct {
	Source  *api.Source
	Commit  string // full hash
	Desired []Desired
	Current api.Reader
	// AllowDeletions, when not zero, replaces the source's deletion budget for this
	// commit: so many objects, or any number when negative. [AllowDeletions] reads
	// it from the commit's message.
	AllowDeletions int
}

// ChangeSet is the whole effect of one commit, or the reasons for refusing it.
type ChangeSet struct {
	// Mutations carry out the plan, in dependency order (namespaces first, deleted
	// last). Empty when Refusals is not.
	Mutations []api.Mutation `json:"-"`
	// Changes describes them for people and for the Revision record.
	Changes []api.Change `json:"changes,omitempty"`
	// Edits[i] are the fields that Changes[i] changes, with values; nil for creates
	// and deletes. At most MaxEdits each.
	Edits [][]Edit `json:"edits,omitempty"`
	// Unchanged counts objects that are already as the commit wants them.
	Unchanged int `json:"unchanged"`
	// Refusals say why the commit must not be applied.
	Refusals []api.Diagnostic `json:"refusals,omitempty"`
}

// MaxEdits is the most changed fields that are listed for one object.
const MaxEdits = 32

// Edit is one changed field of an updated object.
type Edit struct {
	Field string `json:"field"`
	// Old and New are JSON values shortened for a line; empty for an absent field,
	// and for both when Hidden (a Secret's content).
	Old    string       `json:"old,omitempty"`
	New    string       `json:"new,omitempty"`
	Hidden bool         `json:"hidden,omitempty"`
	Pos    api.Position `json:"pos"`
}

// Plan returns what in.Commit changes.
//
// An object whose content is the same keeps its annotations, the commit that last
// changed it included, and gives no mutation. The same goes for an object that only
// moved to another line or file: its recorded position is refreshed together with
// its content, because a commit that only moves text must not touch what runs.
//
// The objects in the input are not modified.
func Plan(in Input) ChangeSet {
	p := planner{Input: in, desired: make(map[api.Key]*item, len(in.Desired))}
	p.collect()
	p.collectDeletions()
	p.checkNamespaces()
	p.checkSources()
	for _, it := range p.items {
		p.compare(it)
	}
	p.checkBudget()
	if len(p.out.Refusals) > 0 {
		slices.SortStableFunc(p.out.Refusals, compareDiagnostics)
		return ChangeSet{Refusals: p.out.Refusals}
	}
	p.emit()
	return p.out
}

// item is one desired object on its way through the plan.
type item struct {
	Desired
	key     api.Key
	object  api.Object // own copy, defaulted, with origin
	current api.Object // nil when it is to be created
	edits   []Edit     // what an update changes
}

type planner struct {
	Input
	items    []*item
	desired  map[api.Key]*item
	deleting []api.Object
	owned    int // objects of this source in force
	out      ChangeSet
}

// refuse records why the commit cannot be applied because of it.
func (p *planner) refuse(it *item, field, message, hint string) {
	p.out.Refusals = append(p.out.Refusals, api.Diagnostic{
		Pos: it.position(field), Object: it.key.String(), Field: field, Message: message, Hint: hint,
	})
}

// collect copies and completes the desired objects, refusing duplicates.
func (p *planner) collect() {
	for _, d := range p.Desired {
		it := &item{Desired: d, object: api.Clone(d.Object)}
		kind := api.KindOf(it.object)
		switch {
		case kind.Namespaced && it.object.GetNamespace() == "":
			it.object.SetNamespace(metav1.NamespaceDefault)
		case !kind.Namespaced:
			it.object.SetNamespace("")
		}
		it.key = api.KeyOf(it.object)
		if !kind.FromGit() {
			p.refuse(it, "kind", fmt.Sprintf("%s objects are made by Decree and cannot be written in Git", kind.Kind), "remove it")
			continue
		}
		if first := p.desired[it.key]; first != nil {
			p.refuse(it, "metadata.name", "this object is written twice; the other place is "+first.Pos.String(), "remove or rename one of them")
			continue
		}
		p.checkReserved(it)
		it.object.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind)
		api.Default(it.object)
		api.Origin{Source: p.Source.Name, Commit: p.Commit, Pos: d.Pos}.Set(it.object)
		p.desired[it.key] = it
		p.items = append(p.items, it)
	}
}

// collectDeletions finds the objects of this source that the commit left out.
func (p *planner) collectDeletions() {
	prune := p.Source.Spec.Prune == nil || *p.Source.Spec.Prune
	for _, kind := range api.Kinds() {
		if !kind.FromGit() {
			continue
		}
		for o := range p.Current.List(kind.Resource, "") {
			if origin, ok := api.OriginOf(o); !ok || origin.Source != p.Source.Name || metav1.GetControllerOf(o) != nil {
				continue
			}
			p.owned++
			if p.desired[api.KeyOf(o)] == nil && prune && o.GetDeletionTimestamp() == nil {
				p.deleting = append(p.deleting, o)
			}
		}
	}
}

// compare decides whether it is created, updated or already as desired.
func (p *planner) compare(it *item) {
	current, exists := p.Current.Get(it.key)
	if !exists {
		checkObject(p, it)
		return
	}
	it.current = current
	if !p.checkOwner(it) {
		return
	}
	keepAssigned(it.object, current)
	it.edits = differences(it)
	if len(it.edits) > 0 {
		checkObject(p, it)
		checkImmutable(p, it)
	}
}

// emit turns the decisions into mutations and changes, in dependency order.
func (p *planner) emit() {
	slices.SortStableFunc(p.items, func(a, b *item) int { return compareRank(a.key, b.key) })
	for _, it := range p.items {
		file := api.Position{File: it.Pos.File, Line: it.Pos.Line}.String()
		switch {
		case it.current == nil:
			p.add(api.Mutation{Verb: api.Create, Key: it.key, Object: it.object}, file, nil)
		case len(it.edits) > 0:
			// No revision: status moves on its own, other writers of the content do not
			// exist, and the state machine keeps the binding of a Pod.
			m := api.Mutation{Verb: api.Update, Key: it.key, Object: it.object, UID: it.current.GetUID()}
			p.add(m, file, it.edits)
		default:
			p.out.Unchanged++
		}
	}
	slices.SortStableFunc(p.deleting, func(a, b api.Object) int { return compareRank(api.KeyOf(b), api.KeyOf(a)) })
	for _, o := range p.deleting {
		origin, _ := api.OriginOf(o)
		p.add(api.Mutation{Verb: api.Delete, Key: api.KeyOf(o), UID: o.GetUID()}, origin.Pos.String(), nil)
	}
}

func (p *planner) add(m api.Mutation, file string, edits []Edit) {
	change := api.Change{Verb: m.Verb.String(), Key: m.Key, File: file}
	for _, e := range edits {
		change.Fields = append(change.Fields, e.Field)
	}
	p.out.Mutations = append(p.out.Mutations, m)
	p.out.Changes = append(p.out.Changes, change)
	p.out.Edits = append(p.out.Edits, edits)
}

// ranks order kinds so that what others refer to exists before them. Kinds that
// are not listed have defaultRank.
var ranks = map[api.Resource]int{
	api.Namespaces: 0, api.Secrets: 1, api.ConfigMaps: 1, api.Sources: 2, api.Services: 2,
	api.Pods: 4, api.ReplicaSets: 4, api.Deployments: 4,
}

const defaultRank = 3

func compareRank(a, b api.Key) int {
	rank := func(k api.Key) int {
		if r, ok := ranks[k.Resource]; ok {
			return r
		}
		return defaultRank
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Resource, b.Resource),
		cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

func compareDiagnostics(a, b api.Diagnostic) int {
	return cmp.Or(cmp.Compare(a.Pos.File, b.Pos.File), cmp.Compare(a.Pos.Line, b.Pos.Line),
		cmp.Compare(a.Pos.Column, b.Pos.Column), cmp.Compare(a.Object, b.Object), cmp.Compare(a.Field, b.Field))
}
