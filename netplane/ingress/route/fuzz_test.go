package route_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/netplane/ingress/route"
)

// covers is how the API documentation says it: element by element.
func covers(p networkingv1.HTTPIngressPath, path string) bool {
	if !strings.HasPrefix(path, "/") {
		return false
	}
	if p.PathType != nil && *p.PathType == networkingv1.PathTypeExact {
		return p.Path == path
	}
	want, have := strings.Split(strings.TrimSuffix(p.Path, "/"), "/"), strings.Split(path, "/")
	return len(want) <= len(have) && slices.Equal(want, have[:len(want)])
}

// naive finds the service of a request by looking at every rule, as the documentation of
// Ingress has it.
func naive(o route.Objects, host, path string) string {
	ings := slices.Clone(o.Ingresses)
	slices.SortFunc(ings, func(a, b *networkingv1.Ingress) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	_, parent, dot := strings.Cut(host, ".")
	wanted := []string{host}
	if dot {
		wanted = append(wanted, "*."+parent)
	}
	for _, h := range append(wanted, "") {
		type hit struct {
			length int
			exact  bool
			to     string
		}
		var hits []hit
		found, fallback := false, ""
		for _, ing := range ings {
			for _, r := range ing.Spec.Rules {
				if r.Host != h {
					continue
				}
				found = true
				if b := ing.Spec.DefaultBackend; b != nil && fallback == "" {
					fallback = b.Service.Name
				}
				for _, p := range r.HTTP.Paths {
					if covers(p, path) {
						hits = append(hits, hit{len(strings.TrimSuffix(p.Path, "/")), *p.PathType == networkingv1.PathTypeExact, p.Backend.Service.Name})
					}
				}
			}
		}
		if !found {
			continue
		}
		slices.SortStableFunc(hits, func(a, b hit) int {
			if a.exact != b.exact { // an exact one is all of the path, so none is longer
				if a.exact {
					return -1
				}
				return 1
			}
			return b.length - a.length
		})
		if len(hits) > 0 {
			return hits[0].to
		}
		if fallback != "" {
			return fallback
		}
		break
	}
	for _, ruled := range []bool{false, true} {
		for _, ing := range ings {
			if b := ing.Spec.DefaultBackend; b != nil && len(ing.Spec.Rules) > 0 == ruled {
				return b.Service.Name
			}
		}
	}
	return "nobody"
}

var (
	someHosts = []string{"", "a.example", "*.example", "b.a.example", "*.a.example", "example", "*.b"}
	someNames = []string{"", "a.example", "c.example", "b.a.example", "c.a.example", "example", "x.b", "other"}
	somePaths = []string{"/", "/a", "/a/", "/a/b", "/a/b/c", "/ab", "/b//"}
)

// objects makes ingresses of numbers.
func objects(next func(n int) int) route.Objects {
	var o route.Objects
	for i := range 1 + next(4) {
		ing := ingress(&o, fmt.Sprintf("i%d", i), next(3))
		service(&o, fmt.Sprintf("d%d", i), "10.98.0.1")
		if next(3) == 0 {
			b := backend(fmt.Sprintf("d%d", i))
			ing.Spec.DefaultBackend = &b
		}
		for j := range next(4) {
			r := rule(someHosts[next(len(someHosts))])
			for k := range 1 + next(3) {
				name := fmt.Sprintf("s%d-%d-%d", i, j, k)
				service(&o, name, "10.98.0.1")
				r.HTTP.Paths = append(r.HTTP.Paths, path([]string{"", "=", "~"}[next(3)]+somePaths[next(len(somePaths))], name))
			}
			ing.Spec.Rules = append(ing.Spec.Rules, r)
		}
	}
	return o
}

func agree(t interface{ Fatalf(string, ...any) }, o route.Objects, host, path string) {
	if got, want := led(route.Build(o, nil), host, path), naive(o, host, path); got != want {
		t.Fatalf("%s%s is led to %s, want %s: %+v", host, path, got, want, o.Ingresses)
	}
}

// TestMatchIsNaive compares the table with a look at every rule.
func TestMatchIsNaive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := objects(func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "n") })
		for range 20 {
			p := ""
			for range rapid.IntRange(0, 4).Draw(t, "elements") {
				p += "/" + rapid.SampledFrom([]string{"", "a", "b", "c", "ab"}).Draw(t, "element")
			}
			agree(t, o, rapid.SampledFrom(someNames).Draw(t, "host"), p)
		}
	})
}

// FuzzRoute builds tables of anything, and asks them for anything.
func FuzzRoute(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9}, "a.example", "/a/b")
	f.Add([]byte{3, 0, 2, 1, 1, 0, 2}, "b.a.example", "/a//")
	f.Fuzz(func(t *testing.T, shape []byte, host, path string) {
		i := 0
		o := objects(func(n int) int {
			if i == len(shape) {
				return 0
			}
			i++
			return int(shape[i-1]) % n
		})
		agree(t, o, host, path)
	})
}

// FuzzObjects builds tables of ingresses whose texts nobody has checked.
func FuzzObjects(f *testing.F) {
	f.Add("*.example", "/a", "http", "secret", "ingress.decree.dev/timeout", "5s", int32(80))
	f.Add("*.", "", "", "", "ingress.decree.dev/", "", int32(-1))
	f.Fuzz(func(t *testing.T, host, at, port, name, annotation, value string, number int32) {
		var o route.Objects
		svc := service(&o, "s", host, at)
		svc.Spec.Ports[0].Name, svc.Spec.ExternalName = port, name
		secret := about(name, 0)
		p := path("/", "s")
		p.Path, p.Backend.Service.Port = at, networkingv1.ServiceBackendPort{Name: port, Number: number}
		ing := ingress(&o, "i", 1, rule(host, p), networkingv1.IngressRule{Host: host})
		ing.Annotations = map[string]string{annotation: value, "ingress.decree.dev/acme": "true"}
		ing.Spec.TLS = []networkingv1.IngressTLS{{Hosts: []string{host}, SecretName: secret.Name}, {Hosts: []string{host}}, {SecretName: name}}
		tb := route.Build(o, nil)
		for _, h := range []string{host, at, strings.ToLower(host)} {
			if r := tb.Match(h, at); r != nil && (r.Ingress >= len(tb.Ingresses) || r.Backend >= len(tb.Backends)) {
				t.Fatalf("%+v leads nowhere", r)
			}
			tb.Certificate(h)
		}
	})
}
