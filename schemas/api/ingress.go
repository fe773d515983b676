package api

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

const (
	// IngressController is the controller of IngressClasses whose Ingresses Decree serves.
	IngressController = "decree.dev/ingress"
	// AnnotationIngress begins the names of annotations that say how an Ingress is served.
	AnnotationIngress = "ingress.decree.dev/"
	// LabelIngressNode of a Node says whether it serves Ingresses: "true" or "false".
	LabelIngressNode = "ingress.decree.dev/serves"
)

// The protocols that backends speak: values of the annotation backend-protocol.
const (
	BackendHTTP  = "HTTP"
	BackendHTTPS = "HTTPS" // HTTP/1.1 or HTTP/2 in TLS; the certificate is not verified
	BackendH2C   = "H2C"   // HTTP/2 without TLS
	BackendGRPC  = "GRPC"  // another name for H2C
)

// The bounds of times that annotations give.
const (
	DefaultIngressTimeout        = time.Minute
	DefaultIngressConnectTimeout = 5 * time.Second
	DefaultIngressRetries        = 2
	maxIngressTimeout            = 24 * time.Hour
	maxIngressRetries            = 10
)

// IngressOptions is what the annotations of an Ingress say. It is comparable.
type IngressOptions struct {
	// Timeout is how long a backend may take to begin its response once it has the whole
	// request, ConnectTimeout how long it may take to accept a connection.
	Timeout, ConnectTimeout time.Duration
	// Retries is how many more endpoints are asked when one ends the connection without a
	// response to a request that is idempotent (RFC 9110, 9.2.2) and has no body. A
	// connection that cannot be made is no try.
	Retries int
	// MaxBody is the longest request body in bytes; zero: any.
	MaxBody int64
	// RPS is how many requests a second one client may begin, Connections how many it may
	// have under way; zero: any number.
	RPS, Connections int
	// Redirect sends clients that come without TLS to https, where the Ingress has TLS for
	// the host.
	Redirect bool
	// Protocol of the backends: BackendHTTP, BackendHTTPS or BackendH2C.
	Protocol string
	// Rewrite takes the place of what a path of type Prefix matched; empty: nothing does.
	Rewrite string
	// ACME: certificates for TLS hosts without a secret are obtained.
	ACME bool
}

// AnnotationError says what is wrong with one annotation.
type AnnotationError struct {
	Name     string
	Expected string // empty: there is no annotation of this name
	Found    string
}

// Error implements error.
func (e AnnotationError) Error() string {
	if e.Expected == "" {
		return fmt.Sprintf("there is no annotation %s; expected one of %s", e.Name, strings.Join(IngressAnnotations(), ", "))
	}
	return fmt.Sprintf("%s: expected %s; found %q", e.Name, e.Expected, e.Found)
}

// ingressAnnotations sets one option each, or says what it expected.
var ingressAnnotations = map[string]func(o *IngressOptions, value string) (expected string){
	"timeout":         func(o *IngressOptions, v string) string { return ingressDuration(&o.Timeout, v) },
	"connect-timeout": func(o *IngressOptions, v string) string { return ingressDuration(&o.ConnectTimeout, v) },
	"retries":         func(o *IngressOptions, v string) string { return ingressNumber(&o.Retries, v, 0, maxIngressRetries) },
	"max-body-size": func(o *IngressOptions, v string) string {
		q, err := resource.ParseQuantity(v)
		n, whole := q.AsInt64()
		if err != nil || !whole || n < 1 {
			return `a size such as "10Mi"`
		}
		o.MaxBody = n
		return ""
	},
	"limit-rps":         func(o *IngressOptions, v string) string { return ingressNumber(&o.RPS, v, 1, 1_000_000) },
	"limit-connections": func(o *IngressOptions, v string) string { return ingressNumber(&o.Connections, v, 1, 1_000_000) },
	"ssl-redirect":      func(o *IngressOptions, v string) string { return ingressBool(&o.Redirect, v) },
	"backend-protocol": func(o *IngressOptions, v string) string {
		if o.Protocol = v; v == BackendGRPC {
			o.Protocol = BackendH2C
		}
		if !slices.Contains([]string{BackendHTTP, BackendHTTPS, BackendH2C}, o.Protocol) {
			o.Protocol = BackendHTTP
			return "one of " + strings.Join([]string{BackendHTTP, BackendHTTPS, BackendH2C, BackendGRPC}, ", ")
		}
		return ""
	},
	"rewrite-prefix": func(o *IngressOptions, v string) string {
		if !strings.HasPrefix(v, "/") || strings.ContainsAny(v, "?#% \t\r\n") {
			return "a path that begins with '/'"
		}
		o.Rewrite = v
		return ""
	},
	"acme": func(o *IngressOptions, v string) string { return ingressBool(&o.ACME, v) },
}

func ingressDuration(d *time.Duration, v string) string {
	got, err := time.ParseDuration(v)
	if err != nil || got <= 0 || got > maxIngressTimeout {
		return fmt.Sprintf(`a duration such as "30s", at most %s`, maxIngressTimeout)
	}
	*d = got
	return ""
}

func ingressNumber(n *int, v string, least, most int) string {
	got, err := strconv.Atoi(v)
	if err != nil || got < least || got > most {
		return fmt.Sprintf("a number, %d to %d", least, most)
	}
	*n = got
	return ""
}

func ingressBool(b *bool, v string) string {
	if v != "true" && v != "false" {
		return `"true" or "false"`
	}
	*b = v == "true"
	return ""
}

// IngressAnnotations are the names of all annotations that an Ingress may have for Decree,
// in order.
func IngressAnnotations() []string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(ingressAnnotations)) {
		names = append(names, AnnotationIngress+name)
	}
	return names
}

// ParseIngressOptions reads the annotations of an Ingress. What is wrong has no effect, and
// is reported in order of names.
func ParseIngressOptions(annotations map[string]string) (IngressOptions, []AnnotationError) {
	o := IngressOptions{
		Timeout: DefaultIngressTimeout, ConnectTimeout: DefaultIngressConnectTimeout, Retries: DefaultIngressRetries,
		Redirect: true, Protocol: BackendHTTP,
	}
	var errs []AnnotationError
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		short, ours := strings.CutPrefix(name, AnnotationIngress)
		if !ours {
			continue
		}
		set, known := ingressAnnotations[short]
		if !known {
			errs = append(errs, AnnotationError{Name: name})
		} else if expected := set(&o, annotations[name]); expected != "" {
			errs = append(errs, AnnotationError{Name: name, Expected: expected, Found: annotations[name]})
		}
	}
	return o, errs
}

// IngressClassAnnotation named the class of an Ingress before spec.ingressClassName.
const IngressClassAnnotation = "kubernetes.io/ingress.class"

// ServesIngress reports whether Decree serves an Ingress. It does when the class that the
// Ingress names has Decree's controller; when it names none, and the default class is such a
// one; and when it names none and there are no classes at all. Of several default classes
// the newest counts, as in the Kubernetes admission.
func ServesIngress(ing *networkingv1.Ingress, classes []*networkingv1.IngressClass) bool {
	name := ing.Annotations[IngressClassAnnotation]
	if ing.Spec.IngressClassName != nil {
		name = *ing.Spec.IngressClassName
	}
	if name == "" {
		d := defaultIngressClass(classes)
		return len(classes) == 0 || d != nil && d.Spec.Controller == IngressController
	}
	i := slices.IndexFunc(classes, func(c *networkingv1.IngressClass) bool { return c.Name == name })
	return i >= 0 && classes[i].Spec.Controller == IngressController
}

// defaultIngressClass is the class of Ingresses that name none; nil: there is none.
func defaultIngressClass(classes []*networkingv1.IngressClass) (d *networkingv1.IngressClass) {
	for _, c := range classes {
		if c.Annotations[networkingv1.AnnotationIsDefaultIngressClass] != "true" {
			continue
		}
		if d == nil || cmp.Or(c.CreationTimestamp.Compare(d.CreationTimestamp.Time), cmp.Compare(d.Name, c.Name)) > 0 {
			d = c
		}
	}
	return d
}

var ingressColumns = []Column{
	text("Class", func(o *networkingv1.Ingress) string {
		if o.Spec.IngressClassName != nil {
			return *o.Spec.IngressClassName
		}
		return none(o.Annotations[IngressClassAnnotation])
	}),
	text("Hosts", ingressHosts),
	text("Address", func(o *networkingv1.Ingress) string {
		var list []string
		for _, in := range o.Status.LoadBalancer.Ingress {
			list = append(list, cmp.Or(in.IP, in.Hostname))
		}
		return strings.Join(list, ",")
	}),
	text("Ports", func(o *networkingv1.Ingress) string {
		if len(o.Spec.TLS) > 0 {
			return "80, 443"
		}
		return "80"
	}),
	ageColumn,
}

func ingressHosts(o *networkingv1.Ingress) string {
	var hosts []string
	for i := range o.Spec.Rules {
		if h := o.Spec.Rules[i].Host; h != "" && !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	switch {
	case len(hosts) == 0:
		return "*"
	case len(hosts) > 3:
		return fmt.Sprintf("%s + %d more...", strings.Join(hosts[:3], ","), len(hosts)-3)
	}
	return strings.Join(hosts, ",")
}

var ingressClassColumns = []Column{
	text("Controller", func(o *networkingv1.IngressClass) string { return o.Spec.Controller }),
	text("Parameters", func(*networkingv1.IngressClass) string { return none("") }),
	ageColumn,
}
