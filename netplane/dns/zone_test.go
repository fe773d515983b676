package dns

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"pgregory.net/rapid"
)

// contents is all that a zone answers from, in words.
func (z *zone) contents() map[string]string {
	out := map[string]string{}
	z.services.Root().Walk(func(k []byte, e *service) bool {
		out["service "+string(k)] = fmt.Sprintf("%p", e.svc)
		for _, s := range e.slices {
			out["service "+string(k)] += fmt.Sprintf(" %p", s)
		}
		return false
	})
	z.pointers.Root().Walk(func(k []byte, name string) bool {
		out[fmt.Sprintf("pointer %x", k)] = name
		return false
	})
	return out
}

// TestNext: a zone made from another one is as one made anew, whatever changed and in
// whatever order the objects are.
func TestNext(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := specCluster()
		z := newZone(d)
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			d.Services, d.Slices = slices.Clone(d.Services), slices.Clone(d.Slices)
			name := fmt.Sprint("s", rapid.IntRange(0, 5).Draw(t, "name"))
			at := slices.IndexFunc(d.Services, func(s *corev1.Service) bool { return s.Name == name })
			spec := corev1.ServiceSpec{ClusterIP: rapid.SampledFrom([]string{"None", "10.3.0.40", "10.3.0.41", ""}).Draw(t, "ip")}
			switch what := rapid.IntRange(0, 6).Draw(t, "change"); {
			case what == 0 && at >= 0:
				d.Services = slices.Delete(d.Services, at, at+1)
			case what == 1 && at >= 0:
				d.Services[at] = svc("default", name, spec)
			case what == 2 && at < 0:
				d.Services = slices.Insert(d.Services, rapid.IntRange(0, len(d.Services)).Draw(t, "at"), svc("default", name, spec))
			case what == 3:
				s := slice(name, discoveryv1.AddressTypeIPv4, endpointAt(fmt.Sprintf("10.3.0.%d", rapid.IntRange(70, 75).Draw(t, "pod")), rapid.SampledFrom([]string{"", "a"}).Draw(t, "host")))
				s.Name = fmt.Sprint(name, "-", rapid.IntRange(0, 2).Draw(t, "slice"))
				d.Slices = slices.DeleteFunc(d.Slices, func(o *discoveryv1.EndpointSlice) bool { return o.Name == s.Name })
				d.Slices = append(d.Slices, s)
			case what == 4:
				d.Slices = slices.DeleteFunc(d.Slices, func(o *discoveryv1.EndpointSlice) bool { return o.Labels[discoveryv1.LabelServiceName] == name })
			case what == 5:
				slices.Reverse(d.Services)
			case what == 6:
				d.Domain = rapid.SampledFrom([]string{"cluster.local", "other.test."}).Draw(t, "domain")
			}
			z = z.next(d)
			if got, want := z.contents(), newZone(d).contents(); !maps.Equal(got, want) {
				t.Fatalf("%v\nwant %v", got, want)
			}
		}
		if z.next(d) != z {
			t.Fatal("another zone, though nothing changed")
		}
	})
}

func BenchmarkNext(b *testing.B) {
	d := large(30_000)
	slices.SortFunc(d.Services, func(x, y *corev1.Service) int {
		return slices.Compare([]string{x.Namespace, x.Name}, []string{y.Namespace, y.Name})
	})
	z := newZone(d)
	for _, n := range []int{1, 300} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				next := d
				next.Services = slices.Clone(d.Services)
				for i := range n {
					c := *next.Services[i*97]
					next.Services[i*97] = &c
				}
				z = z.next(next)
			}
		})
	}
}
