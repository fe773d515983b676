package cli

import (
	"cmp"
	"strconv"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
)

func (w *sheet) ingress(o *networkingv1.Ingress) {
	class := "<default>"
	if o.Spec.IngressClassName != nil {
		class = *o.Spec.IngressClassName
	}
	w.line("Class:", class)
	var addresses []string
	for _, in := range o.Status.LoadBalancer.Ingress {
		addresses = append(addresses, cmp.Or(in.IP, in.Hostname))
	}
	w.line("Address:", orNone(strings.Join(addresses, ", ")))
	if b := o.Spec.DefaultBackend; b != nil {
		w.line("Default Backend:", backendText(b))
	}
	for i := range o.Spec.TLS {
		t := &o.Spec.TLS[i]
		secret := "without a secret"
		if t.SecretName != "" {
			secret = "by secret " + t.SecretName
		}
		w.line("TLS:", cmp.Or(strings.Join(t.Hosts, ", "), "all hosts")+" "+secret)
	}
	if len(o.Spec.Rules) > 0 {
		w.line("Rules:")
		w.line("  HOST", "PATH", "TYPE", "BACKEND")
	}
	for i := range o.Spec.Rules {
		r := &o.Spec.Rules[i]
		host := cmp.Or(r.Host, "*")
		if r.HTTP == nil {
			w.line("  "+host, "<all>", "", "the default backend")
			continue
		}
		for j := range r.HTTP.Paths {
			p := &r.HTTP.Paths[j]
			kind := ""
			if p.PathType != nil {
				kind = string(*p.PathType)
			}
			w.line("  "+host, cmp.Or(p.Path, "/"), kind, backendText(&p.Backend))
		}
	}
}

// backendText is a service and its port.
func backendText(b *networkingv1.IngressBackend) string {
	if b.Service == nil {
		return "<none>"
	}
	return b.Service.Name + ":" + cmp.Or(b.Service.Port.Name, strconv.Itoa(int(b.Service.Port.Number)))
}
