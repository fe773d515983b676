package front

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/render"
)

// delta is the way from some objects to others, as it travels between processes, perhaps of
// different versions.
type delta struct {
	// From and To name the objects, each by a word that no others have; From is empty if it
	// leads from none to all.
	From, To string
	Settings settings
	Changes  map[string]change // by kind
}

// settings are what of the objects are no lists.
type settings struct {
	Node, Domain                       string
	DNS                                netip.Addr
	PodCIDRs, ClusterCIDR, ServiceCIDR []netip.Prefix
}

func settingsOf(o *Objects) settings {
	return settings{o.Node, o.Domain, o.DNS, o.PodCIDRs, o.ClusterCIDR, o.ServiceCIDR}
}

func (s settings) equal(o settings) bool {
	return s.Node == o.Node && s.Domain == o.Domain && s.DNS == o.DNS &&
		slices.Equal(s.PodCIDRs, o.PodCIDRs) && slices.Equal(s.ClusterCIDR, o.ClusterCIDR) && slices.Equal(s.ServiceCIDR, o.ServiceCIDR)
}

// change of one kind's objects.
type change struct {
	Gone []name
	Come [][]byte // in the encoding of Kubernetes (protobuf)
}

type name struct{ Namespace, Name string }

func (n name) compare(o name) int {
	return cmp.Or(cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name))
}

func nameOf(o metav1.Object) name { return name{o.GetNamespace(), o.GetName()} }

// kinds are the lists that travel; what is served needs no others.
var kinds = map[string]kind{
	"services":  listOf(func(o *Objects) *[]*corev1.Service { return &o.Services }),
	"slices":    listOf(func(o *Objects) *[]*discoveryv1.EndpointSlice { return &o.Slices }),
	"nodes":     listOf(func(o *Objects) *[]*corev1.Node { return &o.Nodes }),
	"ingresses": listOf(func(o *Objects) *[]*networkingv1.Ingress { return &o.Ingresses }),
	"classes":   listOf(func(o *Objects) *[]*networkingv1.IngressClass { return &o.Classes }),
	"secrets":   listOf(func(o *Objects) *[]*corev1.Secret { return &o.Secrets }),
}

// kind is one list.
type kind struct {
	between func(before, after *Objects) (change, error)
	apply   func(o *Objects, c change) error
}

// message is an object that travels.
type message[T any] interface {
	*T
	metav1.Object
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
}

func listOf[T any, P message[T]](list func(*Objects) *[]P) kind {
	return kind{
		between: func(before, after *Objects) (c change, err error) {
			gone, come := render.Changes(*list(before), *list(after))
			for _, o := range gone {
				c.Gone = append(c.Gone, nameOf(o))
			}
			for _, o := range come {
				data, err := o.Marshal()
				if err != nil {
					return c, fmt.Errorf("%s/%s: %w", o.GetNamespace(), o.GetName(), err)
				}
				c.Come = append(c.Come, data)
			}
			return c, nil
		},
		apply: func(o *Objects, c change) error {
			come := make([]P, len(c.Come))
			for i, data := range c.Come {
				come[i] = new(T)
				if err := come[i].Unmarshal(data); err != nil {
					return err
				}
			}
			*list(o) = merge(*list(o), c.Gone, come)
			return nil
		},
	}
}

// between is the way from before, which is named from, to after, which gets a name.
func between(from string, before, after *Objects) (delta, error) {
	d := delta{From: from, To: rand.Text(), Changes: map[string]change{}, Settings: settingsOf(after)}
	for word, k := range kinds {
		c, err := k.between(before, after)
		if err != nil {
			return d, fmt.Errorf("%s: %w", word, err)
		}
		if len(c.Gone)+len(c.Come) > 0 {
			d.Changes[word] = c
		}
	}
	return d, nil
}

// apply is where d leads from o. It shares all that does not change with o.
func (d *delta) apply(o Objects) (Objects, error) {
	s := &d.Settings
	o.Node, o.Domain, o.DNS, o.PodCIDRs, o.ClusterCIDR, o.ServiceCIDR = s.Node, s.Domain, s.DNS, s.PodCIDRs, s.ClusterCIDR, s.ServiceCIDR
	for word, c := range d.Changes {
		k, ok := kinds[word]
		if !ok {
			continue // of another version, which can do without here
		}
		if err := k.apply(&o, c); err != nil {
			return o, fmt.Errorf("%s: %w", word, err)
		}
	}
	return o, nil
}

// merge returns list, which is in the order of names, without those that are gone and with
// those that come, in the same order.
func merge[P metav1.Object](list []P, gone []name, come []P) []P {
	type step struct {
		name
		come []P // one, or none
	}
	steps := make([]step, 0, len(gone)+len(come))
	for _, n := range gone {
		steps = append(steps, step{name: n})
	}
	for _, o := range come {
		steps = append(steps, step{nameOf(o), []P{o}})
	}
	slices.SortStableFunc(steps, func(a, b step) int {
		return cmp.Or(a.compare(b.name), cmp.Compare(len(a.come), len(b.come)))
	})
	out := make([]P, 0, len(list)+len(come))
	for _, s := range steps {
		at, found := slices.BinarySearchFunc(list, s.name, func(o P, n name) int { return nameOf(o).compare(n) })
		out = append(out, list[:at]...)
		if list = list[at:]; found {
			list = list[1:]
		}
		out = append(out, s.come...)
	}
	return append(out, list...)
}
