package api

import (
	"fmt"
	"reflect"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// The resources of the registry.
const (
	Namespaces      Resource = "namespaces"
	Nodes           Resource = "nodes"
	Pods            Resource = "pods"
	Services        Resource = "services"
	ConfigMaps      Resource = "configmaps"
	Secrets         Resource = "secrets"
	Events          Resource = "events"
	Deployments     Resource = "deployments.apps"
	ReplicaSets     Resource = "replicasets.apps"
	EndpointSlices  Resource = "endpointslices.discovery.k8s.io"
	NetworkPolicies Resource = "networkpolicies.networking.k8s.io"
	Ingresses       Resource = "ingresses.networking.k8s.io"
	IngressClasses  Resource = "ingressclasses.networking.k8s.io"
	Sources         Resource = "sources.decree.dev"
	Revisions       Resource = "revisions.decree.dev"
	AddressPools    Resource = "addresspools.decree.dev"
	Servers         Resource = "servers.decree.dev"
	Authorities     Resource = "authorities.decree.dev" // internal
	JoinTokens      Resource = "jointokens.decree.dev"  // internal
	Machines        Resource = "machines.decree.dev"    // internal
)

// Kind is everything Decree needs to know about a kind to serve it.
type Kind struct {
	schema.GroupVersionKind
	Resource   Resource
	Plural     string // path segment of the REST API: "deployments"
	Singular   string
	ShortNames []string
	Namespaced bool
	// Internal kinds are replicated like the others, and never served.
	Internal bool
	// CUE is the definition that validates the kind in the schemas module, as
	// "import/path#Definition". Empty: the kind cannot be written in Git, Decree
	// derives it.
	CUE string
	// New returns an empty object with apiVersion and kind set.
	New func() Object
	// Default fills what a user left out, in place. Nil: nothing to fill.
	Default func(Object)
	// Columns of the table that kubectl and decree print, after NAME. A kind that
	// has a column "Name" of its own gets no other.
	Columns []Column
	// Fields are what field selectors may name, besides metadata.name and
	// metadata.namespace.
	Fields map[string]func(Object) string
}

// Column is one column of a kind's table (KEP-1623, meta.k8s.io/v1 Table).
type Column struct {
	Name string
	// Type is "string", "integer" or "date".
	Type string
	// Wide columns are shown with -o wide only.
	Wide bool
	// Value renders the cell; now is the reader's clock.
	Value func(o Object, now time.Time) any
}

// FromGit reports whether users may write objects of this kind in Git.
func (k *Kind) FromGit() bool { return k.CUE != "" }

// kinds is the registry. One entry makes a kind known everywhere.
var kinds = []*Kind{
	{GroupVersionKind: core("Namespace"), Plural: "namespaces", ShortNames: []string{"ns"}, CUE: "k8s.io/api/core/v1#Namespace", New: fresh[corev1.Namespace], Columns: namespaceColumns, Fields: namespaceFields},
	{GroupVersionKind: core("Node"), Plural: "nodes", ShortNames: []string{"no"}, New: fresh[corev1.Node], Columns: nodeColumns, Fields: nodeFields},
	{GroupVersionKind: core("Pod"), Plural: "pods", ShortNames: []string{"po"}, Namespaced: true, CUE: "k8s.io/api/core/v1#Pod", New: fresh[corev1.Pod], Columns: podColumns, Fields: podFields},
	{GroupVersionKind: core("Service"), Plural: "services", ShortNames: []string{"svc"}, Namespaced: true, CUE: "k8s.io/api/core/v1#Service", New: fresh[corev1.Service], Columns: serviceColumns, Fields: serviceFields},
	{GroupVersionKind: core("ConfigMap"), Plural: "configmaps", ShortNames: []string{"cm"}, Namespaced: true, CUE: "k8s.io/api/core/v1#ConfigMap", New: fresh[corev1.ConfigMap], Columns: configMapColumns},
	{GroupVersionKind: core("Secret"), Plural: "secrets", Namespaced: true, CUE: "k8s.io/api/core/v1#Secret", New: fresh[corev1.Secret], Columns: secretColumns, Fields: secretFields},
	{GroupVersionKind: core("Event"), Plural: "events", ShortNames: []string{"ev"}, Namespaced: true, New: fresh[corev1.Event], Columns: eventColumns, Fields: eventFields},
	{GroupVersionKind: appsv1.SchemeGroupVersion.WithKind("Deployment"), Plural: "deployments", ShortNames: []string{"deploy"}, Namespaced: true, CUE: "k8s.io/api/apps/v1#Deployment", New: fresh[appsv1.Deployment], Columns: deploymentColumns},
	{GroupVersionKind: appsv1.SchemeGroupVersion.WithKind("ReplicaSet"), Plural: "replicasets", ShortNames: []string{"rs"}, Namespaced: true, CUE: "k8s.io/api/apps/v1#ReplicaSet", New: fresh[appsv1.ReplicaSet], Columns: replicaSetColumns},
	{GroupVersionKind: discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), Plural: "endpointslices", Namespaced: true, New: fresh[discoveryv1.EndpointSlice], Columns: endpointSliceColumns},
	{GroupVersionKind: networkingv1.SchemeGroupVersion.WithKind("NetworkPolicy"), Plural: "networkpolicies", ShortNames: []string{"netpol"}, Namespaced: true, CUE: "k8s.io/api/networking/v1#NetworkPolicy", New: fresh[networkingv1.NetworkPolicy], Columns: networkPolicyColumns},
	{GroupVersionKind: networkingv1.SchemeGroupVersion.WithKind("Ingress"), Plural: "ingresses", ShortNames: []string{"ing"}, Namespaced: true, CUE: "k8s.io/api/networking/v1#Ingress", New: fresh[networkingv1.Ingress], Columns: ingressColumns},
	{GroupVersionKind: networkingv1.SchemeGroupVersion.WithKind("IngressClass"), Plural: "ingressclasses", CUE: "k8s.io/api/networking/v1#IngressClass", New: fresh[networkingv1.IngressClass], Columns: ingressClassColumns},
	{GroupVersionKind: GroupVersion.WithKind("Source"), Plural: "sources", ShortNames: []string{"src"}, CUE: "decree.dev/v1#Source", New: fresh[Source], Columns: sourceColumns},
	{GroupVersionKind: GroupVersion.WithKind("Revision"), Plural: "revisions", ShortNames: []string{"rev"}, New: fresh[Revision], Columns: revisionColumns, Fields: revisionFields},
	{GroupVersionKind: GroupVersion.WithKind("Server"), Plural: "servers", New: fresh[Server], Columns: serverColumns},
	{GroupVersionKind: GroupVersion.WithKind("Authority"), Plural: "authorities", Internal: true, New: fresh[Authority]},
	{GroupVersionKind: GroupVersion.WithKind("JoinToken"), Plural: "jointokens", Internal: true, New: fresh[JoinToken]},
	{GroupVersionKind: GroupVersion.WithKind("AddressPool"), Plural: "addresspools", ShortNames: []string{"pool"}, CUE: "decree.dev/v1#AddressPool", New: fresh[AddressPool], Columns: poolColumns},
	{GroupVersionKind: GroupVersion.WithKind("Machine"), Plural: "machines", Internal: true, New: fresh[Machine]},
}

func core(kind string) schema.GroupVersionKind { return corev1.SchemeGroupVersion.WithKind(kind) }

// fresh allocates a T; init sets its TypeMeta through New.
func fresh[T any, P interface {
	*T
	Object
}]() Object {
	return P(new(T))
}

var (
	byResource = map[Resource]*Kind{}
	byGVK      = map[schema.GroupVersionKind]*Kind{}
	byType     = map[reflect.Type]*Kind{}
)

func init() {
	for _, k := range kinds {
		k.Resource = Resource(schema.GroupResource{Group: k.Group, Resource: k.Plural}.String())
		k.Singular = strings.ToLower(k.Kind)
		bare := k.New
		gvk := k.GroupVersionKind
		k.New = func() Object {
			o := bare()
			o.GetObjectKind().SetGroupVersionKind(gvk)
			return o
		}
		if k.Default == nil {
			k.Default = defaults[k.Resource]
		}
		if !k.Internal {
			served = append(served, k)
		}
		byResource[k.Resource], byGVK[gvk], byType[reflect.TypeOf(bare())] = k, k, k
	}
}

// Kinds returns all kinds in a fixed order. The slice must not be modified.
func Kinds() []*Kind { return kinds }

// Served returns the kinds that the API shows, in a fixed order. The slice must not
// be modified.
func Served() []*Kind { return served }

var served []*Kind

// KindFor returns the kind of a resource.
func KindFor(r Resource) (*Kind, bool) { k, ok := byResource[r]; return k, ok }

// KindForGVK returns the kind of an apiVersion and kind.
func KindForGVK(gvk schema.GroupVersionKind) (*Kind, bool) { k, ok := byGVK[gvk]; return k, ok }

// KindOf returns the kind of a Go object; a typed nil will do. It panics if the
// type is not registered.
func KindOf(o Object) *Kind {
	k, ok := byType[reflect.TypeOf(o)]
	if !ok {
		panic(fmt.Sprintf("api: %T is not a registered kind", o))
	}
	return k
}
