package rules

import (
	"fmt"
	"net/netip"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/schemas/api"
)

func (j *judge) ingress(o *networkingv1.Ingress) {
	s := &o.Spec
	options, errs := api.ParseIngressOptions(o.Annotations)
	for _, e := range errs {
		field := fmt.Sprintf("metadata.annotations[%q]", e.Name)
		if e.Expected == "" {
			j.add(Problem{Field: field, Message: "there is no such annotation", Expected: "one of " + strings.Join(api.IngressAnnotations(), ", ")})
			continue
		}
		j.add(Problem{Field: field, Message: "the value is not allowed", Expected: e.Expected, Found: fmt.Sprintf("%q", e.Found)})
	}
	if _, ok := o.Annotations[api.IngressClassAnnotation]; ok && s.IngressClassName != nil {
		j.add(Problem{Field: "spec.ingressClassName", Message: "the annotation " + api.IngressClassAnnotation + " names a class too", Hint: "remove one of them"})
	}
	if len(s.Rules) == 0 && s.DefaultBackend == nil {
		j.add(Problem{Field: "spec", Message: "an ingress leads somewhere", Expected: "rules, defaultBackend, or both", Found: "none"})
	}
	if s.DefaultBackend != nil {
		j.ingressBackend("spec.defaultBackend", s.DefaultBackend)
	}
	for i := range s.Rules {
		j.ingressRule(item("spec.rules", i, ""), &s.Rules[i])
	}
	for i := range s.TLS {
		j.ingressTLS(item("spec.tls", i, ""), &s.TLS[i], options.ACME)
	}
}

func (j *judge) ingressRule(at string, r *networkingv1.IngressRule) {
	j.ingressHost(at+".host", r.Host)
	if r.HTTP == nil {
		return
	}
	if len(r.HTTP.Paths) == 0 {
		j.add(Problem{Field: at + ".http.paths", Message: "the field is missing", Expected: "at least one path"})
	}
	for i := range r.HTTP.Paths {
		p, at := &r.HTTP.Paths[i], item(at+".http.paths", i, "")
		j.ingressBackend(at+".backend", &p.Backend)
		if p.PathType != nil {
			j.ingressPath(at+".path", p.Path, *p.PathType)
		}
	}
}

// ingressHost reports what the pattern of the definitions cannot. An address would be taken
// for a name by nobody.
func (j *judge) ingressHost(at, host string) {
	if _, err := netip.ParseAddr(host); err == nil {
		j.add(Problem{Field: at, Message: "the value is not allowed", Expected: "a DNS name, not an address", Found: fmt.Sprintf("%q", host)})
	}
}

// ingressPath is as strict as the Kubernetes API server: what a client normalises, or a
// proxy might, never matches.
func (j *judge) ingressPath(at, path string, kind networkingv1.PathType) {
	if kind == networkingv1.PathTypeImplementationSpecific {
		return
	}
	if path == "" {
		j.add(Problem{Field: at, Message: "the field is missing", Expected: fmt.Sprintf("a path that begins with '/', as pathType is %s", kind)})
		return
	}
	for _, bad := range []string{"//", "/./", "/../", "%2f", "%2F"} {
		if strings.Contains(path, bad) {
			j.add(Problem{Field: at, Message: "the value is not allowed", Expected: fmt.Sprintf("a path without %q", bad), Found: fmt.Sprintf("%q", path)})
		}
	}
	for _, bad := range []string{"/..", "/."} {
		if strings.HasSuffix(path, bad) {
			j.add(Problem{Field: at, Message: "the value is not allowed", Expected: fmt.Sprintf("a path that does not end with %q", bad), Found: fmt.Sprintf("%q", path)})
		}
	}
}

func (j *judge) ingressBackend(at string, b *networkingv1.IngressBackend) {
	if b.Service == nil {
		j.add(Problem{Field: at + ".service", Message: "the field is missing", Expected: "a service and its port"})
		return
	}
	p := &b.Service.Port
	j.exactlyOne(at+".service.port", "a port has a name or a number", choice{"name", p.Name != ""}, choice{"number", p.Number != 0})
}

func (j *judge) ingressTLS(at string, t *networkingv1.IngressTLS, acme bool) {
	for i, h := range t.Hosts {
		j.ingressHost(item(at+".hosts", i, ""), h)
		if acme && t.SecretName == "" && strings.HasPrefix(h, "*.") {
			j.add(Problem{Field: item(at+".hosts", i, ""), Message: "a certificate for all names of a domain cannot be obtained over HTTP", Hint: "name the hosts, or a secret", Found: fmt.Sprintf("%q", h)})
		}
	}
	if acme && t.SecretName == "" && len(t.Hosts) == 0 {
		j.add(Problem{Field: at + ".hosts", Message: "a certificate is obtained for names", Expected: "at least one host, or a secretName"})
	}
}

func (j *judge) ingressClass(o *networkingv1.IngressClass) {
	if v, ok := o.Annotations[networkingv1.AnnotationIsDefaultIngressClass]; ok && v != "true" && v != "false" {
		j.add(Problem{Field: fmt.Sprintf("metadata.annotations[%q]", networkingv1.AnnotationIsDefaultIngressClass), Message: "the value is not allowed", Expected: `"true" or "false"`, Found: fmt.Sprintf("%q", v)})
	}
}
