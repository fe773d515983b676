package apiserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestWithoutCertificate(t *testing.T) {
	f := newFixture(t)
	stranger := f.http(nil)
	for path, want := range map[string]int{"/livez": 200, "/readyz": 200, "/healthz": 200, "/version": 401, "/api/v1/pods": 401, "/api": 401, "/metrics": 401, "/": 401} {
		if code, body := f.raw(stranger, "GET", path, ""); code != want {
			t.Errorf("GET %s: %d, want %d: %s", path, code, want, body)
		}
	}
	otherCA, err := pki.Open(t.TempDir(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := otherCA.Issue(pki.Admin("admin"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Server: f.url, CA: f.ca.CertPEM(), Pair: pair, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, _, err := client.List[*corev1.Pod](timeout(t), c, client.ListOptions{}); err == nil {
		t.Error("a certificate of another CA was accepted")
	}
}

func TestRefusedTo(t *testing.T) {
	f := newFixture(t)
	f.create(newPod("a", "n1"), newSecret("s", "x"))
	node, user := f.as(pki.Node("n1")), f.as(pki.Request{Name: "ann"})
	for _, c := range []struct {
		c            *client.Client
		method, path string
	}{
		{user, "GET", "/api/v1/namespaces/default/pods"},
		{user, "GET", "/version"},
		{user, "GET", "/api"},
		{user, "DELETE", "/api/v1/namespaces/default/pods/a"},
		{node, "DELETE", "/api/v1/namespaces/default/pods/a"},
		{node, "GET", "/api/v1/namespaces/default/secrets/s"},
		{node, "GET", "/apis/apps/v1/deployments"},
		{node, "POST", "/apis/decree.dev/v1/nodes/n2/report"},
		{node, "POST", "/apis/decree.dev/v1/sources/shop/sync"},
		{node, "GET", "/api/v1/namespaces/default/pods/a/log"},
	} {
		_, err := c.c.Raw(timeout(t), c.method, c.path, nil, "", nil)
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s %s: %v, want forbidden", c.method, c.path, err)
		}
	}
	if _, ok := f.store.View().Get(api.Key{Resource: api.Pods, Namespace: "default", Name: "a"}); !ok {
		t.Error("the pod is gone")
	}
}

func TestBadRequests(t *testing.T) {
	f := newFixture(t, func(c *apiserver.Config) { c.Body = 1000 })
	c := f.admin()
	for path, want := range map[string]int32{
		"/api/v1/pods?fieldSelector=spec.color%3Dred":                    400,
		"/api/v1/pods?labelSelector=((":                                  400,
		"/api/v1/pods?limit=-1":                                          400,
		"/api/v1/pods?continue=xyz":                                      400,
		"/api/v1/pods?resourceVersion=new":                               400,
		"/api/v1/pods?resourceVersion=999999":                            504,
		"/api/v1/pods?resourceVersion=999999&resourceVersionMatch=Exact": 410,
		"/api/v1/pods?watch=true&timeoutSeconds=x":                       400,
		"/api/v1/pods/a":                                                 400,
		"/api/v1/namespaces/default/pods/a":                              404,
		"/api/v1/namespaces/default/pods/a/log":                          404,
		"/api/v1/namespaces/default/nodes":                               404,
		"/api/v1/endpoints":                                              404,
		"/apis/apps/v2/deployments":                                      404,
		"/apis/none/v1":                                                  404,
		"/somewhere":                                                     404,
	} {
		code, body := f.raw(f.http(&pki.Request{Name: "admin", Groups: []string{pki.GroupAdmins}}), "GET", path, "")
		var s metav1.Status
		if int32(code) != want || json.Unmarshal([]byte(body), &s) != nil || s.Kind != "Status" || s.Code != want || s.Message == "" {
			t.Errorf("GET %s: %d %s, want %d", path, code, body, want)
		}
	}
	_, err := c.Raw(timeout(t), "POST", "/apis/decree.dev/v1/nodes/n1/report", nil, "application/json", bytes.Repeat([]byte(" "), 2000))
	if !apierrors.IsRequestEntityTooLargeError(err) {
		t.Errorf("a body over the limit: %v", err)
	}
}

func TestTables(t *testing.T) {
	f := newFixture(t)
	now := metav1.NewTime(time.Now().Add(-5 * time.Minute))
	port := int32(80)
	svc := typed(&corev1.Service{}, "default", "web")
	svc.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.97.0.77", Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80, Protocol: "TCP"}, {Port: 443, NodePort: 30443, Protocol: "TCP"}}}
	slice := typed(&discoveryv1.EndpointSlice{}, "default", "web-1")
	slice.AddressType, slice.Ports = discoveryv1.AddressTypeIPv4, []discoveryv1.EndpointPort{{Port: &port}}
	for i := range 5 {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.98.0.%d", i+2)}})
	}
	dep := newDeployment("web")
	dep.Status = appsv1.DeploymentStatus{ReadyReplicas: 1, UpdatedReplicas: 2, AvailableReplicas: 1}
	src := typed(&api.Source{}, "", "shop")
	src.Spec.URL = "https://ann:secret@git.example/shop.git"
	src.Status = api.SourceStatus{Applied: commitHash, Fetched: commitHash, Objects: 12, Conditions: []metav1.Condition{{Type: "Ready", Status: metav1.ConditionFalse, Reason: "FetchError"}}}
	init := newPod("init", "n1")
	init.Spec.InitContainers = []corev1.Container{{Name: "a"}, {Name: "b"}}
	init.Status.InitContainerStatuses = []corev1.ContainerStatus{
		{Name: "a", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}},
		{Name: "b", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}
	crash := newPod("crash", "n1")
	crash.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "web", RestartCount: 4,
		State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}},
		LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: now}}}}
	node := newNode("n1")
	node.Spec.Unschedulable = true
	event := eventFor(f, "web-1")
	event.FirstTimestamp, event.LastTimestamp = now, now
	var out strings.Builder
	for _, objects := range [][]api.Object{
		{newPod("pending", ""), init, crash}, {node}, {svc}, {slice}, {dep}, {src},
		{newConfigMap("c", "1")}, {newSecret("s", "1")}, {event},
		{typed(&corev1.Namespace{Status: corev1.NamespaceStatus{Phase: "Active"}}, "", "shop")},
		{typed(&appsv1.ReplicaSet{Spec: appsv1.ReplicaSetSpec{Template: dep.Spec.Template, Selector: dep.Spec.Selector}}, "default", "web-5d")},
		{typed(&api.Revision{Spec: api.RevisionSpec{Source: "shop", Commit: commitHash, Result: "Applied", Subject: "first", Author: "Ann"}}, "", "shop-1")},
	} {
		k := api.KindOf(objects[0])
		fmt.Fprintf(&out, "%s\n", k.Resource)
		for _, c := range k.Columns {
			fmt.Fprintf(&out, "  %s (%s, wide %v):", c.Name, c.Type, c.Wide)
			for _, o := range objects {
				if at := o.GetCreationTimestamp(); at.IsZero() {
					o.SetCreationTimestamp(now)
				}
				fmt.Fprintf(&out, " [%v]", c.Value(o, now.Add(5*time.Minute+30*time.Second)))
			}
			out.WriteByte('\n')
		}
	}
	path := filepath.Join("testdata", "tables.golden")
	if *update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != out.String() {
		t.Errorf("tables differ from %s (go test -update):\n%s", path, out.String())
	}
	if strings.Contains(out.String(), "secret") && strings.Contains(out.String(), "ann:") {
		t.Error("a password is in the table")
	}
}

func TestTableAnswers(t *testing.T) {
	f := newFixture(t)
	rev := f.create(newPod("a", "n1"))
	c := f.admin()
	k, _ := api.KindFor(api.Pods)
	for include, want := range map[metav1.IncludeObjectPolicy]string{"": "PartialObjectMetadata", metav1.IncludeNone: "", metav1.IncludeObject: "Pod"} {
		table, err := c.Table(timeout(t), k, "", client.ListOptions{Namespace: "default"}, include)
		if err != nil {
			t.Fatal(err)
		}
		if len(table.Rows) != 1 || table.Rows[0].Cells[0] != "a" || table.ResourceVersion != fmt.Sprint(rev) || table.ColumnDefinitions[0].Format != "name" {
			t.Errorf("table %+v", table)
		}
		var object metav1.TypeMeta
		if raw := table.Rows[0].Object.Raw; want == "" && string(raw) != "null" && len(raw) > 0 || want != "" && (json.Unmarshal(raw, &object) != nil || object.Kind != want) {
			t.Errorf("include %q: row holds %s", include, table.Rows[0].Object.Raw)
		}
	}
}

func TestPagesShowOneRevision(t *testing.T) {
	f := newFixture(t)
	f.create(newConfigMap("a", "1"), newConfigMap("b", "1"), newConfigMap("c", "1"))
	admin := f.http(&pki.Request{Name: "admin", Groups: []string{pki.GroupAdmins}})
	page := func(query string) (names []string, next, rv string) {
		code, body := f.raw(admin, "GET", "/api/v1/configmaps?limit=1"+query, "")
		var list corev1.ConfigMapList
		if code != 200 || json.Unmarshal([]byte(body), &list) != nil {
			t.Fatalf("%d %s", code, body)
		}
		for _, i := range list.Items {
			names = append(names, i.Name)
		}
		return names, list.Continue, list.ResourceVersion
	}
	first, next, rv := page("")
	f.apply(api.Mutation{Verb: api.Delete, Key: api.KeyOf(newConfigMap("b", ""))})
	second, next, rv2 := page("&continue=" + next)
	third, last, _ := page("&continue=" + next)
	if got := fmt.Sprint(first, second, third); got != "[a] [b] [c]" || rv != rv2 || last != "" {
		t.Errorf("pages %s, revisions %s and %s, continue %q", got, rv, rv2, last)
	}
	if names, _, _ := page("&continue="); names[0] != "a" {
		t.Errorf("%v", names)
	}
}

// watchEvents collects n events as "TYPE name".
func watchEvents(t *testing.T, c *client.Client, k *api.Kind, o client.WatchOptions, n int) ([]string, uint64, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(timeout(t))
	defer cancel()
	var got []string
	var revision uint64
	for e, err := range c.WatchObjects(ctx, k, o) {
		if err != nil {
			return got, revision, err
		}
		revision = e.Revision
		got = append(got, strings.TrimSpace(string(e.Type)+" "+e.Object.GetName()))
		if len(got) == n {
			break
		}
	}
	return got, revision, nil
}

func TestWatch(t *testing.T) {
	f := newFixture(t)
	c := f.admin()
	k, _ := api.KindFor(api.ConfigMaps)
	f.create(newConfigMap("a", "1"))
	got, rev, err := watchEvents(t, c, k, client.WatchOptions{}, 2)
	if err != nil || fmt.Sprint(got) != "[ADDED a BOOKMARK]" {
		t.Fatalf("%v %v", got, err)
	}
	// What happens while nobody watches is not lost.
	f.create(newConfigMap("b", "1"), newPod("p", ""))
	f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(newConfigMap("a", "")), Object: newConfigMap("a", "2")})
	f.apply(api.Mutation{Verb: api.Delete, Key: api.KeyOf(newConfigMap("b", ""))})
	got, rev2, err := watchEvents(t, c, k, client.WatchOptions{After: rev}, 3)
	if err != nil || fmt.Sprint(got) != "[ADDED b MODIFIED a DELETED b]" {
		t.Fatalf("%v %v", got, err)
	}
	if rev2 != f.store.View().Revision() {
		t.Errorf("DELETED has revision %d, want %d", rev2, f.store.View().Revision())
	}
	if _, _, err := watchEvents(t, c, k, client.WatchOptions{After: rev2 + 1000}, 1); !errors.Is(err, client.ErrExpired) {
		t.Errorf("a revision of the future: %v", err)
	}
	// With a selector, objects enter and leave.
	labelled := newConfigMap("a", "3")
	labelled.Labels = map[string]string{"x": "y"}
	f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(labelled), Object: labelled})
	f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(labelled), Object: newConfigMap("a", "4")})
	o := client.WatchOptions{After: rev2, ListOptions: client.ListOptions{LabelSelector: "x=y"}}
	if got, _, err := watchEvents(t, c, k, o, 2); err != nil || fmt.Sprint(got) != "[ADDED a DELETED a]" {
		t.Errorf("%v %v", got, err)
	}
	// The server ends it when it was told to, with no error.
	o.Timeout = time.Second
	o.After = f.store.View().Revision()
	if got, _, err := watchEvents(t, c, k, o, 99); err != nil || len(got) != 0 {
		t.Errorf("%v %v", got, err)
	}
}

func TestWatchProgressAndLimit(t *testing.T) {
	f := newFixture(t, func(c *apiserver.Config) {
		c.Bookmark = 20 * time.Millisecond
		c.Watches = 1
	})
	f.create(newConfigMap("a", "1"))
	c := f.admin()
	k, _ := api.KindFor(api.ConfigMaps)
	code, body := f.raw(f.http(&pki.Request{Name: "admin", Groups: []string{pki.GroupAdmins}}), "GET", "/api/v1/configmaps?watch=true&resourceVersion=99999", "")
	if code != 200 || !strings.HasPrefix(body, `{"type":"ERROR","object":{`) || !strings.Contains(body, `"code":410`) || !strings.Contains(body, `"reason":"Expired"`) {
		t.Errorf("%d %s", code, body)
	}
	created := false
	// Progress is told although nothing of the kind happens.
	rev := f.store.View().Revision()
	ctx, cancel := context.WithCancel(timeout(t))
	defer cancel()
	for e, err := range c.WatchObjects(ctx, k, client.WatchOptions{After: rev}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Type != "BOOKMARK" {
			t.Fatalf("event %s", e.Type)
		}
		if e.Revision == rev && !created {
			created = true
			if _, err := f.admin().Raw(ctx, "GET", "/api/v1/configmaps?watch=true", nil, "", nil); err == nil {
				t.Error("more watches than allowed")
			}
			f.create(newPod("other", ""))
		}
		if e.Revision > rev {
			break
		}
	}
}

func TestReport(t *testing.T) {
	f := newFixture(t)
	n1 := f.as(pki.Node("n1"))
	if !f.LastContact("n1").IsZero() {
		t.Error("contact before any report")
	}
	f.create(newPod("mine", "n1"), newPod("other", "n2"), newPod("ending", "n1"), newNode("n2"))
	f.running("ending")
	f.apply(api.Mutation{Verb: api.Delete, Key: api.KeyOf(newPod("ending", ""))})
	status := func(name string) api.Mutation {
		p := newPod(name, "n1")
		p.Status.Phase = corev1.PodRunning
		return api.Mutation{Verb: api.UpdateStatus, Key: api.KeyOf(p), Object: p}
	}
	zero := int64(0)
	evil := newPod("mine", "n1")
	evil.Spec.Containers[0].Image = "evil"
	foreign := eventFor(f, "mine")
	foreign.Name, foreign.Source.Host = "foreign", "n2"
	wrongUID := status("mine")
	wrongUID.UID = "11111111-1111-1111-1111-111111111111"
	errs, err := n1.Report(timeout(t), "n1", []api.Mutation{
		{Verb: api.Create, Key: api.KeyOf(newNode("n1")), Object: newNode("n1")},
		status("mine"),
		status("other"),
		{Verb: api.Delete, Key: api.KeyOf(newPod("ending", "")), Grace: &zero},
		{Verb: api.Delete, Key: api.KeyOf(newPod("mine", "")), Grace: &zero},
		{Verb: api.Update, Key: api.KeyOf(evil), Object: evil},
		{Verb: api.UpdateStatus, Key: api.KeyOf(newNode("n2")), Object: newNode("n2")},
		{Verb: api.Create, Key: api.KeyOf(eventFor(f, "mine")), Object: eventFor(f, "mine")},
		{Verb: api.Create, Key: api.KeyOf(foreign), Object: foreign},
		{Verb: api.Create, Key: api.KeyOf(newConfigMap("x", "")), Object: newConfigMap("x", "")},
		status("gone"),
		wrongUID,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "ok ok Forbidden ok Forbidden Forbidden Forbidden ok Forbidden Forbidden NotFound Conflict"
	var got []string
	for _, err := range errs {
		if err == nil {
			got = append(got, "ok")
			continue
		}
		got = append(got, string(apierrors.ReasonForError(err)))
	}
	if strings.Join(got, " ") != want {
		t.Errorf("results %v, want %s\n%v", got, want, errs)
	}
	if p, _ := api.Get[*corev1.Pod](f.store.View(), "default", "mine"); p.Status.Phase != corev1.PodRunning || p.Spec.Containers[0].Image == "evil" {
		t.Errorf("pod %+v", p)
	}
	if _, ok := f.store.View().Get(api.KeyOf(newPod("ending", ""))); ok {
		t.Error("the ended pod is still there")
	}
	if f.LastContact("n1").IsZero() {
		t.Error("the report does not count as contact")
	}
	// One rejection does not take the others with it.
	errs, err = n1.Report(timeout(t), "n1", []api.Mutation{
		{Verb: api.Create, Key: api.KeyOf(newNode("n1")), Object: newNode("n1")}, status("mine"),
	})
	if err != nil || !apierrors.IsAlreadyExists(errs[0]) || errs[1] != nil {
		t.Errorf("%v %v", errs, err)
	}
	testSaysOfItself(t, f, n1)
	before := f.LastContact("n1")
	if errs, err := n1.Report(timeout(t), "n1", nil); err != nil || len(errs) != 0 || !f.LastContact("n1").After(before) {
		t.Errorf("empty report: %v %v", errs, err)
	}
}

func TestNodeSeesWhatItsPodsReferTo(t *testing.T) {
	f := newFixture(t)
	f.create(newSecret("first", "1"), newSecret("second", "2"), newSecret("alien", "3"))
	withSecret := func(pod, node, secret string) *corev1.Pod {
		p := newPod(pod, node)
		p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: secret}}
		return p
	}
	f.create(withSecret("a", "n1", "first"), withSecret("b", "n2", "alien"))
	n1 := f.as(pki.Node("n1"))
	secrets, _, err := client.List[*corev1.Secret](timeout(t), n1, client.ListOptions{})
	if err != nil || len(secrets) != 1 || secrets[0].Name != "first" {
		t.Fatalf("list: %v %v", secrets, err)
	}
	pods, _, err := client.List[*corev1.Pod](timeout(t), n1, client.ListOptions{})
	if err != nil || len(pods) != 1 || pods[0].Name != "a" {
		t.Fatalf("list: %v %v", pods, err)
	}
	k, _ := api.KindFor(api.Secrets)
	ctx, cancel := context.WithCancel(timeout(t))
	defer cancel()
	steps := []struct {
		want string
		then func()
	}{
		{"ADDED first", nil},
		{"BOOKMARK", func() {
			f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(newSecret("alien", "")), Object: newSecret("alien", "4")})
			f.create(withSecret("c", "n1", "second"))
		}},
		{"ADDED second", func() {
			f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(newSecret("second", "")), Object: newSecret("second", "5")})
		}},
		{"MODIFIED second", func() {
			zero := int64(0)
			f.apply(api.Mutation{Verb: api.Delete, Key: api.KeyOf(newPod("c", "")), Grace: &zero})
		}},
		{"DELETED second", nil},
	}
	for e, err := range n1.WatchObjects(ctx, k, client.WatchOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		got := strings.TrimSpace(string(e.Type) + " " + e.Object.GetName())
		if got != steps[0].want {
			t.Fatalf("event %q, want %q", got, steps[0].want)
		}
		if steps[0].then != nil {
			steps[0].then()
		}
		if steps = steps[1:]; len(steps) == 0 {
			break
		}
	}
	if _, _, err := watchEvents(t, n1, k, client.WatchOptions{After: f.store.View().Revision()}, 1); !errors.Is(err, client.ErrExpired) {
		t.Errorf("resuming a filtered watch: %v", err)
	}
}

func newIngress(name string, secrets ...string) *networkingv1.Ingress {
	ing := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	for _, s := range secrets {
		ing.Spec.TLS = append(ing.Spec.TLS, networkingv1.IngressTLS{SecretName: s})
	}
	return ing
}

func newCertificate(name string) *corev1.Secret {
	s := newSecret(name, "")
	s.Type = corev1.SecretTypeTLS
	return s
}

// TestNodeSeesCertificatesOfIngresses: those that Ingresses name, of the right type only,
// and for as long as they do.
func TestNodeSeesCertificatesOfIngresses(t *testing.T) {
	f := newFixture(t)
	both := newPod("both", "n1")
	both.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "both"}}
	f.create(newCertificate("cert"), newCertificate("stray"), newSecret("opaque", "1"), newCertificate("both"), both, newIngress("web", "cert", "opaque"))
	n1 := f.as(pki.Node("n1"))
	set := func(ing *networkingv1.Ingress) {
		f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(ing), Object: ing})
	}
	k, _ := api.KindFor(api.Secrets)
	steps := []struct {
		want string
		then func()
	}{
		{"ADDED both", nil},
		{"ADDED cert", nil},
		{"BOOKMARK", func() { set(newIngress("web", "cert", "opaque", "stray", "both")) }},
		{"ADDED both", nil}, // in any order with the next one
		{"ADDED stray", func() { set(newIngress("web", "opaque", "stray")) }},
		{"DELETED cert", func() {
			o := newCertificate("opaque")
			f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(o), Object: o})
		}},
		{"ADDED opaque", func() { f.apply(api.Mutation{Verb: api.Delete, Key: api.KeyOf(newIngress("web"))}) }},
		{"DELETED opaque", nil}, // in any order
		{"DELETED stray", nil},
	}
	for e, err := range n1.WatchObjects(timeout(t), k, client.WatchOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		got := strings.TrimSpace(string(e.Type) + " " + e.Object.GetName())
		if len(steps) > 1 && got == steps[1].want { // what one change shows has no order
			steps[0].want, steps[1].want = steps[1].want, steps[0].want
		}
		if got != steps[0].want {
			t.Fatalf("event %q, want %q", got, steps[0].want)
		}
		if steps[0].then != nil {
			steps[0].then()
		}
		if steps = steps[1:]; len(steps) == 0 {
			break
		}
	}
	secrets, _, err := client.List[*corev1.Secret](timeout(t), n1, client.ListOptions{})
	if err != nil || len(secrets) != 1 || secrets[0].Name != "both" {
		t.Errorf("list: %v %v", secrets, err)
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	f := newFixture(t)
	f.create(newPod("a", "n1"))
	before := f.store.View().Revision()
	admin := f.http(&pki.Request{Name: "admin", Groups: []string{pki.GroupAdmins}})
	if code, body := f.raw(admin, "DELETE", "/api/v1/namespaces/default/pods/a?dryRun=All", ""); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	if code, body := f.raw(admin, "PATCH", "/api/v1/namespaces/default/pods/a?dryRun=All", ""); code != 403 {
		t.Errorf("%d %s", code, body)
	}
	if now := f.store.View().Revision(); now != before {
		t.Errorf("revision %d became %d", before, now)
	}
}

func TestSources(t *testing.T) {
	f := newFixture(t)
	f.create(typed(&api.Source{}, "", "shop"))
	c := f.admin()
	ctx := timeout(t)
	if err := errors.Join(c.SyncSource(ctx, "shop"), c.SuspendSource(ctx, "shop", "incident 7"), c.ResumeSource(ctx, "shop")); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(f.sources.asked, "; "); got != "sync shop by admin; suspend shop by admin: incident 7; resume shop by admin" {
		t.Error(got)
	}
	if err := c.SyncSource(ctx, "none"); !apierrors.IsNotFound(err) {
		t.Errorf("sync of an unknown source: %v", err)
	}
	p, err := c.PlanSource(ctx, "shop", fstest.MapFS{"apps/web.cue": {Data: []byte("a: 1\n")}, "cue.mod/module.cue": {Data: []byte("x")}, ".git/config": {Data: []byte("no")}})
	if err != nil || len(p.Changes) != 2 || p.Changes[0].File != "apps/web.cue" {
		t.Errorf("plan %+v, %v", p, err)
	}
}

func TestMountMetricsPanic(t *testing.T) {
	reg := prometheus.NewRegistry()
	f := newFixture(t, func(c *apiserver.Config) {
		c.Registerer, c.Metrics = reg, promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
		c.Mount = map[string]http.Handler{
			"/git/": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				who, ok := apiserver.IdentityFrom(r.Context())
				fmt.Fprintf(w, "%s %v %s", who.Name, ok, r.URL.Path)
			}),
			"/panic/": http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("a bug") }),
		}
	})
	c := f.admin()
	if body, err := c.Raw(timeout(t), "GET", "/git/shop.git/info/refs", nil, "", nil); err != nil || string(body) != "admin true /git/shop.git/info/refs" {
		t.Errorf("%s %v", body, err)
	}
	if code, _ := f.raw(f.http(nil), "GET", "/git/shop.git/info/refs", ""); code != 401 {
		t.Errorf("mounted handler without a certificate: %d", code)
	}
	if _, err := c.Raw(timeout(t), "GET", "/panic/", nil, "", nil); !apierrors.IsInternalError(err) || !strings.Contains(f.logs.String(), "a bug") {
		t.Errorf("panic: %v", err)
	}
	if body, err := c.Raw(timeout(t), "GET", "/metrics", nil, "", nil); err != nil || !strings.Contains(string(body), `decree_api_requests_total{code="500",method="GET"} 1`) {
		t.Errorf("%s %v", body, err)
	}
	if _, err := f.as(pki.Node("n1")).Raw(timeout(t), "GET", "/metrics", nil, "", nil); !apierrors.IsForbidden(err) {
		t.Errorf("metrics for a node: %v", err)
	}
}

func TestImpersonationIsRefused(t *testing.T) {
	f := newFixture(t)
	req, err := http.NewRequestWithContext(timeout(t), "GET", f.url+"/api/v1/pods", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Impersonate-User", "ann")
	resp, err := f.http(&pki.Request{Name: "admin", Groups: []string{pki.GroupAdmins}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("%s", resp.Status)
	}
}

// testSaysOfItself: a node adds to the labels and annotations of its own Node, and changes
// nothing else by that.
func testSaysOfItself(t *testing.T, f *fixture, n1 *client.Client) {
	t.Helper()
	stored, _ := api.Get[*corev1.Node](f.store.View(), "", "n1")
	stored = api.Clone(stored)
	stored.Labels, stored.Spec.Unschedulable = map[string]string{"by": "others"}, true
	stored.Annotations = map[string]string{"by": "others", api.AnnotationWireGuard: "of before"}
	f.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(stored), Object: stored})
	said := newNode("n1") // as it was before
	said.Labels = map[string]string{"topology.kubernetes.io/zone": "east", "node-restriction.kubernetes.io/trusted": "yes"}
	said.Annotations = map[string]string{api.AnnotationNetworks: "192.0.2.0/24", api.AnnotationSource: "shop"}
	other := newNode("n2")
	other.Labels = said.Labels
	errs, err := n1.Report(timeout(t), "n1", []api.Mutation{
		{Verb: api.Update, Key: api.KeyOf(said), Object: said}, {Verb: api.Update, Key: api.KeyOf(other), Object: other}, {Verb: api.Delete, Key: api.KeyOf(said)},
	})
	if err != nil || errs[0] != nil || !apierrors.IsForbidden(errs[1]) || !apierrors.IsForbidden(errs[2]) {
		t.Fatalf("%v %v", errs, err)
	}
	now, _ := api.Get[*corev1.Node](f.store.View(), "", "n1")
	if want := map[string]string{"by": "others", "topology.kubernetes.io/zone": "east"}; !maps.Equal(now.Labels, want) || !now.Spec.Unschedulable {
		t.Errorf("labels %v, want %v; unschedulable %v", now.Labels, want, now.Spec.Unschedulable)
	}
	if want := map[string]string{"by": "others", api.AnnotationNetworks: "192.0.2.0/24"}; !maps.Equal(now.Annotations, want) {
		t.Errorf("annotations %v, want %v", now.Annotations, want)
	}
}
