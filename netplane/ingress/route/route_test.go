package route_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/ingress/route"
)

// led is the service that a request is led to.
func led(tb *route.Table, host, path string) string {
	switch r := tb.Match(host, path); {
	case r == nil:
		return "nobody"
	case r.Backend < 0:
		return "nothing"
	default:
		return tb.Backends[r.Backend].Service
	}
}

// TestPaths has the examples of the documentation of Ingress, and some more
// (kubernetes.io/docs/concepts/services-networking/ingress, Examples).
func TestPaths(t *testing.T) {
	for _, tt := range []struct {
		paths, path, want string // a path is its own service
	}{
		{"/", "/any/path", "/"},
		{"=/foo", "/foo", "=/foo"}, {"=/foo", "/bar", ""}, {"=/foo", "/foo/", ""}, {"=/foo/", "/foo", ""},
		{"/foo", "/foo", "/foo"}, {"/foo", "/foo/", "/foo"}, {"/foo/", "/foo", "/foo/"}, {"/foo/", "/foo/", "/foo/"},
		{"/aaa/bb", "/aaa/bbb", ""}, {"/aaa/bbb", "/aaa/bbb", "/aaa/bbb"}, {"/aaa/bbb/", "/aaa/bbb", "/aaa/bbb/"}, {"/aaa/bbb", "/aaa/bbb/", "/aaa/bbb"},
		{"/aaa/bbb", "/aaa/bbb/ccc", "/aaa/bbb"}, {"/aaa/bbb", "/aaa/bbbxyz", ""},
		{"/ /aaa", "/aaa/ccc", "/aaa"}, {"/ /aaa", "/ccc", "/"}, {"/aaa", "/ccc", ""},
		{"/foo =/foo", "/foo", "=/foo"}, {"/foo =/foo", "/foo/", "/foo"},
		{"~/foo", "/foo/bar", "~/foo"}, {"~/foo", "/foobar", ""},
		{"/a/b/c /a", "/a/b/cc", "/a"}, {"/a/b", "/a//b", ""}, {"/a", "/a//b", "/a"}, {"/a", "a", ""}, {"/", "", ""}, {"/", "*", ""},
		{"/a", "/" + strings.Repeat("/", 1000), ""}, {"/", strings.Repeat("/", 1000), "/"}, {"/a", "/a" + strings.Repeat("/", 1000), "/a"},
	} {
		var o route.Objects
		var paths []networkingv1.HTTPIngressPath
		for _, p := range strings.Fields(tt.paths) {
			service(&o, p, "10.98.0.1")
			paths = append(paths, path(p, p))
		}
		ingress(&o, "a", 1, rule("", paths...))
		want := tt.want
		if want == "" {
			want = "nobody"
		}
		if got := led(route.Build(o, nil), "x.example", tt.path); got != want {
			t.Errorf("%s: %.20q is led to %s, want %s", tt.paths, tt.path, got, want)
		}
	}
}

func TestHosts(t *testing.T) {
	var o route.Objects
	for _, s := range []string{"exact", "wild", "none", "default"} {
		service(&o, s, "10.98.0.1")
	}
	d := backend("default")
	ingress(&o, "a", 3, rule("a.example.com", path("/a", "exact")), rule("*.example.com", path("/", "wild")))
	ingress(&o, "b", 2, rule("", path("/n", "none")))
	ingress(&o, "c", 1).Spec.DefaultBackend = &d
	tb := route.Build(o, nil)
	for _, tt := range []struct{ host, path, want string }{
		{"a.example.com", "/a", "exact"}, {"a.example.com", "/n", "default"}, // a host's rules are its own
		{"b.example.com", "/a", "wild"}, {"b.c.example.com", "/n", "none"}, {"example.com", "/n", "none"}, {"", "/n", "none"}, {"other", "/", "default"},
	} {
		if got := led(tb, tt.host, tt.path); got != tt.want {
			t.Errorf("%s%s is led to %s, want %s", tt.host, tt.path, got, tt.want)
		}
	}
	if len(tb.Warnings) != 0 {
		t.Errorf("warnings: %v", tb.Warnings)
	}
}

// TestConflicts: the older ingress has what two want.
func TestConflicts(t *testing.T) {
	var o route.Objects
	service(&o, "old", "10.98.0.1")
	service(&o, "new", "10.98.0.2")
	ofOld, ofNew := backend("old"), backend("new")
	ingress(&o, "young", 1, rule("a.example", path("/", "new"), path("=/x", "new")))
	ingress(&o, "aged", 2, rule("A.example", path("~/", "old")))
	ingress(&o, "fallback-young", 1).Spec.DefaultBackend = &ofNew
	ingress(&o, "fallback-aged", 2).Spec.DefaultBackend = &ofOld
	secret(t, &o, "old", "a.example")
	secret(t, &o, "new", "a.example")
	o.Ingresses[0].Spec.TLS = []networkingv1.IngressTLS{{Hosts: []string{"a.example"}, SecretName: "new"}}
	o.Ingresses[1].Spec.TLS = []networkingv1.IngressTLS{{Hosts: []string{"a.example"}, SecretName: "old"}}
	tb := route.Build(o, nil)
	if got := led(tb, "a.example", "/y") + led(tb, "a.example", "/x") + led(tb, "b.example", "/"); got != "oldnewold" {
		t.Errorf("led to %s", got)
	}
	if c, _ := tb.Certificate("a.example"); c == nil || c.Secret != "old" {
		t.Errorf("the certificate is %+v", c)
	}
	want(t, tb,
		`fallback-young: the default backend is that of an older ingress`,
		`young: host "a.example" already has the certificate of secret shop/old`,
		`young: path "/" of host "a.example" is already that of ingress shop/aged`)
}

func want(t *testing.T, tb *route.Table, want ...string) {
	t.Helper()
	var got []string
	for _, w := range tb.Warnings {
		got = append(got, w.Name+": "+w.Message)
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("warnings:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestBackends(t *testing.T) {
	var o route.Objects
	svc := service(&o, "a", "10.98.0.2", "10.98.0.1")
	svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP})
	service(&o, "idle")
	alias := service(&o, "alias")
	alias.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "api.example.org"}
	byName := path("/name", "a")
	byName.Backend.Service.Port = networkingv1.ServiceBackendPort{Name: "http"}
	udp := path("/udp", "a")
	udp.Backend.Service.Port = networkingv1.ServiceBackendPort{Name: "dns"}
	none := path("/none", "a")
	none.Backend.Service = nil
	ing := ingress(&o, "i", 1, rule("", path("/number", "a"), byName, udp, path("/absent", "absent"), path("/idle", "idle"), path("/alias", "alias"), none))
	ing.Annotations = map[string]string{"ingress.decree.dev/timeout": "3s", "ingress.decree.dev/retries": "many", "ingress.decree.dev/x": "y", "other": "z"}
	tb := route.Build(o, nil)
	for path, want := range map[string]string{
		"/number": "[10.98.0.1:8080 10.98.0.2:8080]", "/name": "[10.98.0.1:8080 10.98.0.2:8080]", "/idle": "[]", "/alias": "[api.example.org:80]", "/udp": "none", "/absent": "none", "/none": "none",
	} {
		got := "none"
		if r := tb.Match("", path); r.Backend >= 0 {
			got = fmt.Sprint(tb.Backends[r.Backend].Endpoints)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	if tb.Ingresses[0].Timeout.Seconds() != 3 || tb.Ingresses[0].Retries != 2 {
		t.Errorf("options: %+v", tb.Ingresses[0].IngressOptions)
	}
	want(t, tb,
		`i: a backend has to be a service`,
		`i: ingress.decree.dev/retries: expected a number, 0 to 10; found "many"`,
		`i: service "a" has no TCP port dns`,
		`i: there is no annotation ingress.decree.dev/x; expected one of ingress.decree.dev/acme, ingress.decree.dev/backend-protocol, ingress.decree.dev/connect-timeout, ingress.decree.dev/limit-connections, ingress.decree.dev/limit-rps, ingress.decree.dev/max-body-size, ingress.decree.dev/retries, ingress.decree.dev/rewrite-prefix, ingress.decree.dev/ssl-redirect, ingress.decree.dev/timeout`,
		`i: there is no service "absent"`)
}

// TestClasses: whose ingresses are served.
func TestClasses(t *testing.T) {
	class := func(name, controller string, isDefault bool, age int) *networkingv1.IngressClass {
		c := &networkingv1.IngressClass{ObjectMeta: about(name, -age), Spec: networkingv1.IngressClassSpec{Controller: controller}}
		c.Namespace = ""
		if isDefault {
			c.Annotations = map[string]string{"ingressclass.kubernetes.io/is-default-class": "true"}
		}
		return c
	}
	const ours, others = "decree.dev/ingress", "k8s.io/ingress-nginx"
	for name, tt := range map[string]struct {
		classes []*networkingv1.IngressClass
		named   string // with a leading @: by annotation
		want    bool
	}{
		"no classes":              {nil, "", true},
		"no such class":           {nil, "decree", false},
		"ours":                    {[]*networkingv1.IngressClass{class("decree", ours, false, 1)}, "decree", true},
		"ours by annotation":      {[]*networkingv1.IngressClass{class("decree", ours, false, 1)}, "@decree", true},
		"another's":               {[]*networkingv1.IngressClass{class("nginx", others, false, 1)}, "nginx", false},
		"no default":              {[]*networkingv1.IngressClass{class("decree", ours, false, 1)}, "", false},
		"default":                 {[]*networkingv1.IngressClass{class("decree", ours, true, 1), class("nginx", others, false, 1)}, "", true},
		"another's default":       {[]*networkingv1.IngressClass{class("decree", ours, false, 1), class("nginx", others, true, 1)}, "", false},
		"the newer default is us": {[]*networkingv1.IngressClass{class("nginx", others, true, 2), class("decree", ours, true, 1)}, "", true},
		"the newer default isn't": {[]*networkingv1.IngressClass{class("nginx", others, true, 1), class("decree", ours, true, 2)}, "", false},
	} {
		o := route.Objects{Classes: tt.classes}
		service(&o, "a", "10.98.0.1")
		ing := ingress(&o, "i", 1, rule("", path("/", "a")))
		if by, ok := strings.CutPrefix(tt.named, "@"); ok {
			ing.Annotations = map[string]string{"kubernetes.io/ingress.class": by}
		} else if tt.named != "" {
			ing.Spec.IngressClassName = &tt.named
		}
		if got := !route.Build(o, nil).Empty(); got != tt.want {
			t.Errorf("%s: served %v, want %v", name, got, tt.want)
		}
		ing.DeletionTimestamp = &metav1.Time{Time: epoch}
		if !route.Build(o, nil).Empty() {
			t.Errorf("%s: served while it is being deleted", name)
		}
	}
}

func TestCertificates(t *testing.T) {
	var o route.Objects
	service(&o, "a", "10.98.0.1")
	secret(t, &o, "one", "a.example")
	secret(t, &o, "wild", "*.example")
	secret(t, &o, "any", "any.example")
	secret(t, &o, "opaque", "o.example").Type = corev1.SecretTypeOpaque
	secret(t, &o, "broken", "b.example").Data[corev1.TLSPrivateKeyKey] = []byte("hunter2")
	ing := ingress(&o, "i", 2, rule("a.example", path("/", "a")), rule("b.example", path("/", "a")), rule("*.example", path("/", "a")), rule("plain.test", path("/", "a")))
	ing.Annotations = map[string]string{"ingress.decree.dev/acme": "true"}
	ing.Spec.TLS = []networkingv1.IngressTLS{
		{Hosts: []string{"A.example"}, SecretName: "one"}, {Hosts: []string{"*.example", "b.c.example"}, SecretName: "wild"},
		{Hosts: []string{"o.test"}, SecretName: "opaque"}, {Hosts: []string{"b.test"}, SecretName: "broken"}, {Hosts: []string{"n.test"}, SecretName: "absent"},
		{Hosts: []string{"managed.test", "*.managed.test"}},
	}
	d := backend("a")
	all := ingress(&o, "all", 1)
	all.Spec.DefaultBackend, all.Spec.TLS = &d, []networkingv1.IngressTLS{{SecretName: "any"}, {Hosts: []string{"managed.test"}, SecretName: "one"}}
	tb := route.Build(o, nil)
	for host, want := range map[string]string{"a.example": "one", "x.example": "wild", "b.example": "wild", "example": "any", "": "any", "b.test": "any", "managed.test": "managed", "b.c.example": "wild"} {
		c, managed := tb.Certificate(host)
		got := ""
		if c != nil {
			got = c.Secret
		}
		if managed {
			got += "managed"
		}
		if got != want {
			t.Errorf("%q has the certificate %q, want %q", host, got, want)
		}
	}
	for host, want := range map[string]bool{"a.example": true, "x.example": true, "plain.test": false, "elsewhere.test": true} {
		if got := tb.Match(host, "/").Redirect; got != want {
			t.Errorf("%s is redirected: %v, want %v", host, got, want)
		}
	}
	if !slices.Equal(tb.Managed, []string{"managed.test"}) {
		t.Errorf("managed: %v", tb.Managed)
	}
	for _, w := range tb.Warnings {
		if strings.Contains(w.Message, "hunter2") {
			t.Errorf("%v quotes a key", w)
		}
	}
	want(t, tb,
		`all: host "managed.test" has a certificate that is obtained for an older ingress`,
		`i: a certificate for "*.managed.test" cannot be obtained over HTTP`,
		`i: secret "absent": there is no secret`,
		`i: secret "broken": tls: failed to find any PEM data in key input`,
		`i: secret "opaque": it has to be of type kubernetes.io/tls`,
		`i: secret "wild": the certificate is not for host "b.c.example"`)
	next := route.Build(o, tb)
	before, _ := tb.Certificate("a.example")
	after, _ := next.Certificate("a.example")
	if before != after {
		t.Error("a certificate that has not changed is parsed again")
	}
	*o.Secrets[0] = *secret(t, &route.Objects{}, "one", "a.example")
	if changed, _ := route.Build(o, next).Certificate("a.example"); changed == after || changed == nil {
		t.Error("a certificate that has changed is not read")
	}
}

func TestRewritten(t *testing.T) {
	for _, tt := range []struct {
		of    route.Route
		to    string
		path  string
		wants string
	}{
		{route.Route{Path: "/a"}, "", "/a/b", "/a/b"}, {route.Route{Path: "/a"}, "/", "/a/b", "/b"}, {route.Route{Path: "/a"}, "/", "/a", "/"}, {route.Route{Path: "/a"}, "/", "/a/", "/"},
		{route.Route{Path: "/a"}, "/x/", "/a/b", "/x/b"}, {route.Route{Path: "/a"}, "/x", "/a", "/x"}, {route.Route{}, "/x", "/b", "/x/b"}, {route.Route{Path: "/a", Exact: true}, "/x", "/a", "/a"},
	} {
		if got := tt.of.Rewritten(tt.path, tt.to); got != tt.wants {
			t.Errorf("%+v with %q: %s becomes %s, want %s", tt.of, tt.to, tt.path, got, tt.wants)
		}
	}
}
