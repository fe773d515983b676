package apiserver

import (
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/schemas/api"
)

// The verbs of authorization, as in Kubernetes. VerbReport is a node's report.
const (
	VerbGet    = "get"
	VerbList   = "list"
	VerbWatch  = "watch"
	VerbCreate = "create"
	VerbUpdate = "update"
	VerbPatch  = "patch"
	VerbDelete = "delete"
	VerbReport = "report"
)

// nonResource is the resource of paths that are not about objects (discovery,
// version, metrics, mounted handlers).
const nonResource api.Resource = ""

// Authorize decides whether who may do verb to the object, or to the whole
// collection when name is empty. It is a pure function of its arguments.
//
// Admins may do everything. A node may read what its agent and network plane need,
// pods and what they refer to only as far as they are bound to it, of other secrets the
// certificates that Ingresses name, as every node serves those, and report about itself; lists and watches that it may begin are filtered by the same rules.
// Everyone else may do nothing: roles come later.
func Authorize(who Identity, verb string, resource api.Resource, namespace, name string, view api.Reader) bool {
	return newScope(who, view).allows(verb, resource, namespace, name)
}

// scope answers many questions about one identity and one view: what the pods of a
// node refer to is collected once, when it is first asked for.
type scope struct {
	who  Identity
	node string // empty: not a node
	view api.Reader
	refs references
}

func newScope(who Identity, view api.Reader) *scope {
	node, _ := who.Node()
	return &scope{who: who, node: node, view: view}
}

func (s *scope) allows(verb string, resource api.Resource, namespace, name string) bool {
	if s.who.Admin() {
		return true
	}
	if s.node == "" {
		return false
	}
	read := verb == VerbGet || verb == VerbList || verb == VerbWatch
	switch resource {
	case nonResource:
		return verb == VerbGet
	case api.Services, api.EndpointSlices, api.Namespaces, api.NetworkPolicies, api.Ingresses, api.IngressClasses:
		return read
	case api.Nodes:
		return read || verb == VerbReport && name == s.node
	case api.Pods, api.ConfigMaps, api.Secrets:
		return read && (name == "" || s.sees(api.Key{Resource: resource, Namespace: namespace, Name: name}))
	}
	return false
}

// unfiltered reports whether a list of resource needs no look at its objects.
func (s *scope) unfiltered(resource api.Resource) bool {
	return s.who.Admin() || resource != api.Pods && resource != api.ConfigMaps && resource != api.Secrets
}

// sees reports whether the node may know the pod, config map or secret k.
func (s *scope) sees(k api.Key) bool {
	if k.Resource == api.Pods {
		p, ok := api.Get[*corev1.Pod](s.view, k.Namespace, k.Name)
		return ok && p.Spec.NodeName == s.node
	}
	if s.refs == nil {
		s.refs = referencesIn(s.view, s.node)
	}
	if o, ok := s.view.Get(k); ok {
		return s.refs.show(o)
	}
	return s.refs.any(k) // to be told that it is not there
}

// reference is one to a config map or a secret.
type reference struct {
	api.Key
	// certificate: by an Ingress, and only to a secret of type kubernetes.io/tls.
	certificate bool
}

// references counts those that let a node see what they lead to.
type references map[reference]int

func referencesIn(view api.Reader, node string) references {
	refs := references{}
	for p := range api.List[*corev1.Pod](view, "") {
		refs.change(node, nil, p)
	}
	for ing := range api.List[*networkingv1.Ingress](view, "") {
		refs.change(node, nil, ing)
	}
	return refs
}

// show reports whether o is what something refers to.
func (r references) show(o api.Object) bool {
	k := api.KeyOf(o)
	if r[reference{k, false}] > 0 {
		return true
	}
	s, ok := o.(*corev1.Secret)
	return ok && s.Type == corev1.SecretTypeTLS && r[reference{k, true}] > 0
}

// any reports whether something refers to k, whatever it is.
func (r references) any(k api.Key) bool { return r[reference{k, false}]+r[reference{k, true}] > 0 }

// change replaces a pod or an Ingress, each nil where it is none, and returns the
// references that are the first of their kind (true) or were the last (false).
func (r references) change(node string, before, after api.Object) map[reference]bool {
	changed := map[reference]bool{}
	old, now := referencesOf(node, before), referencesOf(node, after)
	for k := range now {
		if !old[k] {
			if r[k]++; r[k] == 1 {
				changed[k] = true
			}
		}
	}
	for k := range old {
		if !now[k] {
			if r[k]--; r[k] == 0 {
				delete(r, k)
				changed[k] = false
			}
		}
	}
	return changed
}

// referencesOf are those of one object that count for a node.
func referencesOf(node string, o api.Object) map[reference]bool {
	out := map[reference]bool{}
	switch o := o.(type) {
	case *corev1.Pod:
		if o.Spec.NodeName == node {
			podReferences(o, func(k api.Key) { out[reference{k, false}] = true })
		}
	case *networkingv1.Ingress:
		for i := range o.Spec.TLS {
			if name := o.Spec.TLS[i].SecretName; name != "" {
				out[reference{api.Key{Resource: api.Secrets, Namespace: o.Namespace, Name: name}, true}] = true
			}
		}
	}
	return out
}

// podReferences calls see for every config map and secret that p refers to; one may be
// reported several times.
func podReferences(p *corev1.Pod, see func(api.Key)) {
	configMap := func(name string) {
		see(api.Key{Resource: api.ConfigMaps, Namespace: p.Namespace, Name: name})
	}
	secret := func(name string) { see(api.Key{Resource: api.Secrets, Namespace: p.Namespace, Name: name}) }
	for _, ref := range p.Spec.ImagePullSecrets {
		secret(ref.Name)
	}
	for i := range p.Spec.Volumes {
		volumeReferences(&p.Spec.Volumes[i], configMap, secret)
	}
	for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range list {
			envReferences(list[i].Env, list[i].EnvFrom, configMap, secret)
		}
	}
	for i := range p.Spec.EphemeralContainers {
		c := &p.Spec.EphemeralContainers[i]
		envReferences(c.Env, c.EnvFrom, configMap, secret)
	}
}

func volumeReferences(v *corev1.Volume, configMap, secret func(string)) {
	if v.ConfigMap != nil {
		configMap(v.ConfigMap.Name)
	}
	if v.Secret != nil {
		secret(v.Secret.SecretName)
	}
	if v.Projected == nil {
		return
	}
	for _, s := range v.Projected.Sources {
		if s.ConfigMap != nil {
			configMap(s.ConfigMap.Name)
		}
		if s.Secret != nil {
			secret(s.Secret.Name)
		}
	}
}

func envReferences(env []corev1.EnvVar, from []corev1.EnvFromSource, configMap, secret func(string)) {
	for _, e := range env {
		if e.ValueFrom == nil {
			continue
		}
		if r := e.ValueFrom.ConfigMapKeyRef; r != nil {
			configMap(r.Name)
		}
		if r := e.ValueFrom.SecretKeyRef; r != nil {
			secret(r.Name)
		}
	}
	for _, e := range from {
		if e.ConfigMapRef != nil {
			configMap(e.ConfigMapRef.Name)
		}
		if e.SecretRef != nil {
			secret(e.SecretRef.Name)
		}
	}
}
