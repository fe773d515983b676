package cli

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/netplane/ingress/route"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

func (w *sheet) ingress(o *networkingv1.Ingress, routes *route.Table) {
	class := "<default>"
	if o.Spec.IngressClassName != nil {
		class = *o.Spec.IngressClassName
	}
	w.line("Class:", class)
	if routes != nil && !slices.ContainsFunc(routes.Ingresses, func(x route.Ingress) bool { return x.Namespace == o.Namespace && x.Name == o.Name }) {
		w.line("Served:", "not by Decree: its class has another controller than "+api.IngressController)
	}
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
	if routes == nil {
		return
	}
	for _, x := range routes.Warnings {
		if x.Namespace == o.Namespace && x.Name == o.Name {
			w.line("Without Effect:", x.Message)
		}
	}
}

// routes is the table that nodes have, as far as the objects of a namespace matter for it.
func routes(ctx context.Context, c *client.Client, namespace string) (*route.Table, error) {
	var o route.Objects
	var errs [5]error
	here := client.ListOptions{Namespace: namespace}
	o.Ingresses, _, errs[0] = client.List[*networkingv1.Ingress](ctx, c, client.ListOptions{})
	o.Classes, _, errs[1] = client.List[*networkingv1.IngressClass](ctx, c, client.ListOptions{})
	o.Services, _, errs[2] = client.List[*corev1.Service](ctx, c, here)
	o.Slices, _, errs[3] = client.List[*discoveryv1.EndpointSlice](ctx, c, here)
	o.Secrets, _, errs[4] = client.List[*corev1.Secret](ctx, c, here)
	return route.Build(o, nil), errors.Join(errs[:]...)
}

// backendText is a service and its port.
func backendText(b *networkingv1.IngressBackend) string {
	if b.Service == nil {
		return "<none>"
	}
	return b.Service.Name + ":" + cmp.Or(b.Service.Port.Name, strconv.Itoa(int(b.Service.Port.Number)))
}
