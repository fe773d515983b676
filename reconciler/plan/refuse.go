package plan

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/schemas/api"
)

// reservedPrefix begins the names of labels and annotations that only Decree sets.
const reservedPrefix = "decree.dev/"

// checkReserved refuses names that carry an object's origin and built-in
// namespaces, which exist before any commit and outlive every one.
func (p *planner) checkReserved(it *item) {
	for _, set := range []struct {
		field string
		names map[string]string
	}{{"metadata.annotations", it.object.GetAnnotations()}, {"metadata.labels", it.object.GetLabels()}} {
		for _, name := range unionKeys(anyMap(set.names), nil) {
			if strings.HasPrefix(name, reservedPrefix) {
				p.refuse(it, join(set.field, name), "names under "+reservedPrefix+" are set by Decree", "remove it or choose another name")
			}
		}
	}
	if it.key.Resource == api.Namespaces && builtIn(it.key.Name) {
		p.refuse(it, "metadata.name", fmt.Sprintf("namespace %q exists in every cluster and belongs to no source", it.key.Name), "remove this object; others can use the namespace without it")
	}
}

func anyMap(m map[string]string) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

func builtIn(namespace string) bool {
	return namespace == metav1.NamespaceDefault || namespace == api.SystemNamespace
}

// checkOwner refuses objects that exist and belong to someone else.
func (p *planner) checkOwner(it *item) bool {
	origin, fromGit := api.OriginOf(it.current)
	switch ref := metav1.GetControllerOf(it.current); {
	case ref != nil:
		p.refuse(it, "metadata.name", fmt.Sprintf("an object of this name exists and is controlled by %s %q", ref.Kind, ref.Name), "rename it")
	case !fromGit:
		p.refuse(it, "metadata.name", "an object of this name exists and was not made by a commit", "rename it")
	case origin.Source != p.Source.Name:
		p.refuse(it, "metadata.name", "an object of this name comes from "+origin.String(), "rename it, or remove it there first")
	case it.current.GetDeletionTimestamp() != nil:
		p.refuse(it, "metadata.name", "an object of this name is still being terminated", "push again when it is gone, or rename it")
	default:
		return true
	}
	return false
}

// checkNamespaces refuses objects in namespaces that would not exist after the
// commit, and the deletion of namespaces that are still used.
func (p *planner) checkNamespaces() {
	deleted := map[string]api.Object{}
	for _, o := range p.deleting {
		if api.KeyOf(o).Resource == api.Namespaces {
			deleted[o.GetName()] = o
		}
	}
	for _, it := range p.items {
		ns := it.key.Namespace
		if ns == "" || builtIn(ns) {
			continue
		}
		key := api.Key{Resource: api.Namespaces, Name: ns}
		if p.desired[key] != nil {
			continue
		}
		if o := deleted[ns]; o != nil {
			origin, _ := api.OriginOf(o)
			p.refuse(it, "metadata.namespace", fmt.Sprintf("namespace %q is deleted by this commit (it was at %s)", ns, origin.Pos), "keep the Namespace, or remove what is in it as well")
		} else if _, exists := p.Current.Get(key); !exists {
			p.refuse(it, "metadata.namespace", fmt.Sprintf("namespace %q does not exist", ns), fmt.Sprintf("add a Namespace object named %q, or correct the name", ns))
		}
	}
	if len(deleted) > 0 {
		p.checkForeignObjects(deleted)
	}
}

// checkForeignObjects refuses to delete namespaces in which other sources have
// objects.
func (p *planner) checkForeignObjects(deleted map[string]api.Object) {
	for _, kind := range api.Kinds() {
		if !kind.FromGit() || !kind.Namespaced {
			continue
		}
		for o := range p.Current.List(kind.Resource, "") {
			ns := deleted[o.GetNamespace()]
			origin, ok := api.OriginOf(o)
			if ns == nil || !ok || origin.Source == p.Source.Name {
				continue
			}
			mine, _ := api.OriginOf(ns)
			p.out.Refusals = append(p.out.Refusals, api.Diagnostic{
				Pos: mine.Pos, Object: api.KeyOf(ns).String(),
				Message: fmt.Sprintf("the namespace would be deleted while it holds %s from %s", api.KeyOf(o), origin),
				Hint:    "remove that object there first, or keep the namespace",
			})
		}
	}
}

// checkSources refuses to delete Sources whose objects are in force: nobody could
// change or remove those any more.
func (p *planner) checkSources() {
	deleted, inForce := map[string]api.Object{}, map[string]int{}
	for _, o := range p.deleting {
		if api.KeyOf(o).Resource == api.Sources {
			deleted[o.GetName()] = o
		}
	}
	if len(deleted) == 0 {
		return
	}
	for _, kind := range api.Kinds() {
		for o := range p.Current.List(kind.Resource, "") {
			if origin, ok := api.OriginOf(o); ok {
				inForce[origin.Source]++
			}
		}
	}
	for name, o := range deleted {
		if inForce[name] == 0 {
			continue
		}
		origin, _ := api.OriginOf(o)
		p.out.Refusals = append(p.out.Refusals, api.Diagnostic{
			Pos: origin.Pos, Object: api.KeyOf(o).String(),
			Message: fmt.Sprintf("the source would be deleted while %d of its objects are in force", inForce[name]),
			Hint:    "remove the objects from that repository first, or set suspend in the Source to stop following it",
		})
	}
}

// smallChange is how many deletions are within the default budget whatever the size
// of the source: half of three objects would forbid to remove one application.
const smallChange = 5

// checkBudget refuses commits that delete more than the source allows.
func (p *planner) checkBudget() {
	n := len(p.deleting)
	if n == 0 || p.AllowDeletions < 0 {
		return
	}
	budget, least := intstr.FromString("50%"), smallChange
	if b := p.Source.Spec.DeletionBudget; b != nil {
		budget, least = *b, 1
	}
	d := api.Diagnostic{Hint: fmt.Sprintf("if this is meant, add the line %q to the end of the commit message, or raise deletionBudget in the Source (\"100%%\" allows everything)", fmt.Sprintf("%s: %d", trailer, n))}
	allowed, text := p.AllowDeletions, strconv.Itoa(p.AllowDeletions)+" by the commit message"
	if allowed == 0 {
		scaled, err := intstr.GetScaledValueFromIntOrPercent(&budget, p.owned, false)
		if err != nil {
			d.Message = fmt.Sprintf("the deletionBudget %q of source %q is neither a number nor a percentage: %v", budget.String(), p.Source.Name, err)
			d.Hint = `write a number such as 10, or a percentage such as "50%"`
			p.out.Refusals = append(p.out.Refusals, d)
			return
		}
		allowed, text = max(least, scaled), budget.String()
	}
	switch all := p.AllowDeletions == 0 && budget.Type == intstr.String && budget.StrVal == "100%"; {
	case len(p.items) == 0 && p.AllowDeletions == 0 && !all:
		d.Message = fmt.Sprintf("the commit has no objects at all, and would delete all %d of source %q", n, p.Source.Name)
	case n > allowed:
		d.Message = fmt.Sprintf("the commit would delete %d of the %d objects of source %q; the deletion budget is %s (%d)", n, p.owned, p.Source.Name, text, allowed)
	default:
		return
	}
	d.Found = "deletion of " + p.sample()
	p.out.Refusals = append(p.out.Refusals, d)
}

// sample names the first few objects to be deleted.
func (p *planner) sample() string {
	var names []string
	for _, o := range p.deleting[:min(len(p.deleting), 5)] {
		names = append(names, api.KeyOf(o).String())
	}
	if more := len(p.deleting) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// checkObject refuses selectors that do not select the template's pods: nothing
// in a cluster could make such an object right.
func checkObject(p *planner, it *item) {
	var selector *metav1.LabelSelector
	var template *corev1.PodTemplateSpec
	switch o := it.object.(type) {
	case *appsv1.Deployment:
		selector, template = o.Spec.Selector, &o.Spec.Template
	case *appsv1.ReplicaSet:
		selector, template = o.Spec.Selector, &o.Spec.Template
	default:
		return
	}
	s, err := metav1.LabelSelectorAsSelector(selector)
	switch {
	case err != nil:
		p.refuse(it, "spec.selector", err.Error(), "")
	case s.Empty() || selector == nil:
		p.refuse(it, "spec.selector", "the selector is empty", "repeat the labels of spec.template.metadata.labels in spec.selector.matchLabels")
	case !s.Matches(labels.Set(template.Labels)):
		p.refuse(it, "spec.selector", "the selector does not match the labels in spec.template.metadata.labels", "repeat these labels in spec.selector.matchLabels")
	}
}

const recreate = "give the new object another name; Decree then creates it and deletes this one"

// checkImmutable refuses changes of fields that must stay as they were created.
func checkImmutable(p *planner, it *item) {
	switch cur := it.current.(type) {
	case *appsv1.Deployment, *appsv1.ReplicaSet:
		p.refuseChange(it, "the selector cannot change: the pods that run would be lost", "spec.selector")
	case *corev1.Service:
		if new := it.object.(*corev1.Service); cur.Spec.ClusterIP != "" && new.Spec.Type != corev1.ServiceTypeExternalName {
			p.refuseChange(it, "the address of a service cannot change", "spec.clusterIP")
		}
	case *corev1.Pod:
		p.checkPod(it, cur)
	case *corev1.Secret:
		p.refuseChange(it, "the type of a secret cannot change", "type")
		if cur.Immutable != nil && *cur.Immutable {
			p.refuseChange(it, "the secret is immutable", "data", "immutable")
		}
	case *corev1.ConfigMap:
		if cur.Immutable != nil && *cur.Immutable {
			p.refuseChange(it, "the config map is immutable", "data", "binaryData", "immutable")
		}
	}
}

// refuseChange refuses the first edit at or under one of the fields.
func (p *planner) refuseChange(it *item, message string, fields ...string) {
	for _, e := range it.edits {
		if slices.ContainsFunc(fields, func(f string) bool {
			rest, under := strings.CutPrefix(e.Field, f)
			return under && (rest == "" || rest[0] == '.' || rest[0] == '[')
		}) {
			p.refuse(it, e.Field, message, recreate)
			return
		}
	}
}

// checkPod allows a Pod's images to change, and its labels and annotations.
func (p *planner) checkPod(it *item, cur *corev1.Pod) {
	old, new := cur.Spec.DeepCopy(), it.object.(*corev1.Pod).Spec.DeepCopy()
	for _, spec := range []*corev1.PodSpec{old, new} {
		for i := range spec.InitContainers {
			spec.InitContainers[i].Image, spec.InitContainers[i].ImagePullPolicy = "", ""
		}
		for i := range spec.Containers {
			spec.Containers[i].Image, spec.Containers[i].ImagePullPolicy = "", ""
		}
	}
	if reflect.DeepEqual(specTree(old), specTree(new)) {
		return
	}
	for _, e := range it.edits {
		if strings.HasPrefix(e.Field, "spec.") && !strings.HasSuffix(e.Field, ".image") && !strings.HasSuffix(e.Field, ".imagePullPolicy") {
			p.refuse(it, e.Field, "only the images of a pod can change", recreate+", or use a Deployment, which replaces its pods")
			return
		}
	}
}

func specTree(s *corev1.PodSpec) any { return tree(&corev1.Pod{Spec: *s})["spec"] }
