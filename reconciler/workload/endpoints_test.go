package workload_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

func webService() *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}}
	svc.Spec.Selector = map[string]string{"app": "web"}
	svc.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("web")}, {Name: "admin", Port: 81}}
	svc.Spec.ClusterIP = "10.97.0.5"
	api.Default(svc)
	return svc
}

func backend(name, ip string, ready bool, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{"app": "web"}}}
	p.Spec.NodeName, p.Status.PodIP, p.Status.Phase = "n1", ip, corev1.PodRunning
	p.Spec.Containers = []corev1.Container{{Name: "c", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}}}}
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: status}}
	for _, f := range change {
		f(p)
	}
	return p
}

func terminating(w *world) func(*corev1.Pod) {
	return func(p *corev1.Pod) { at := metav1.NewTime(w.now); p.DeletionTimestamp = &at }
}

func (w *world) service() *corev1.Service {
	svc, _ := api.Get[*corev1.Service](w.reader(), "default", "web")
	return svc
}

func (w *world) stepEndpoints() []api.Mutation {
	w.t.Helper()
	ms := workload.Endpoints(w.now, w.reader(), w.service())
	w.apply(ms)
	return ms
}

// slicesText is one line per slice: ports, then the endpoints with r, s and t for
// ready, serving and terminating.
func (w *world) slicesText() []string {
	var out []string
	for s := range api.List[*discoveryv1.EndpointSlice](w.reader(), "") {
		var parts []string
		for _, p := range s.Ports {
			parts = append(parts, fmt.Sprintf("%s=%d", *p.Name, *p.Port))
		}
		for _, e := range s.Endpoints {
			flags := ""
			for flag, on := range map[string]*bool{"r": e.Conditions.Ready, "s": e.Conditions.Serving, "t": e.Conditions.Terminating} {
				if *on {
					flags += flag
				}
			}
			b := []byte(flags)
			slices.Sort(b)
			parts = append(parts, e.Addresses[0]+"/"+string(b))
		}
		out = append(out, strings.Join(parts, " "))
	}
	slices.Sort(out)
	return out
}

func (w *world) expect(t *testing.T, want ...string) {
	t.Helper()
	if got := w.slicesText(); !slices.Equal(got, want) {
		t.Errorf("slices %q, want %q", got, want)
	}
	if ms := workload.Endpoints(w.now, w.reader(), w.service()); len(ms) != 0 {
		t.Errorf("a second pass does %v", ms)
	}
}

func TestEndpoints(t *testing.T) {
	w := newWorld(t)
	w.put(webService())
	w.stepEndpoints()
	w.expect(t)
	zone := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "east"}}}
	w.put(zone)
	w.put(backend("a", "10.98.0.1", true))
	w.put(backend("b", "10.98.0.2", false))
	w.put(backend("c", "10.98.0.3", true, terminating(w)))
	w.put(backend("no-ip", "", true))
	w.put(backend("done", "10.98.0.4", true, func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }))
	w.put(backend("other", "10.98.0.5", true, func(p *corev1.Pod) { p.Labels = nil }))
	w.put(backend("far", "10.98.0.6", true, func(p *corev1.Pod) { p.Namespace = "shop" }))
	w.stepEndpoints()
	w.expect(t, "http=8080 admin=81 10.98.0.1/rs 10.98.0.2/ 10.98.0.3/st")
	for s := range api.List[*discoveryv1.EndpointSlice](w.reader(), "") {
		e := s.Endpoints[0]
		if s.Labels["kubernetes.io/service-name"] != "web" || s.OwnerReferences[0].UID != w.service().UID || *e.NodeName != "n1" ||
			*e.Zone != "east" || e.TargetRef.Name != "a" || e.TargetRef.UID == "" || s.AddressType != "IPv4" {
			t.Errorf("slice %+v", s)
		}
	}
	// Another number for the named port is another slice; a pod without it has one port.
	w.put(backend("d", "10.98.0.7", true, func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].ContainerPort = 9090 }))
	w.put(backend("e", "10.98.0.8", true, func(p *corev1.Pod) { p.Spec.Containers[0].Ports = nil }))
	w.stepEndpoints()
	w.expect(t, "admin=81 10.98.0.8/rs", "http=8080 admin=81 10.98.0.1/rs 10.98.0.2/ 10.98.0.3/st", "http=9090 admin=81 10.98.0.7/rs")
	svc := webService()
	svc.UID, svc.Spec.PublishNotReadyAddresses, svc.Spec.ClusterIP = w.service().UID, true, corev1.ClusterIPNone
	w.put(svc)
	w.stepEndpoints()
	w.expect(t, "admin=81 10.98.0.8/rs", "http=8080 admin=81 10.98.0.1/rs 10.98.0.2/r 10.98.0.3/rst", "http=9090 admin=81 10.98.0.7/rs")
	for s := range api.List[*discoveryv1.EndpointSlice](w.reader(), "") {
		if _, headless := s.Labels["service.kubernetes.io/headless"]; !headless {
			t.Error("the slice of a headless service is not labelled")
		}
	}
	for _, p := range w.pods() {
		delete(w.objects, api.KeyOf(p))
	}
	w.stepEndpoints()
	if got := w.slicesText(); len(got) != 1 || strings.Contains(got[0], "10.98") {
		t.Errorf("without pods: %q, want one empty slice", got)
	}
	svc.Spec.Type = corev1.ServiceTypeExternalName
	w.put(svc)
	w.stepEndpoints()
	w.expect(t)
}

func TestEndpointsDualStack(t *testing.T) {
	w := newWorld(t)
	svc := webService()
	svc.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	w.put(svc)
	w.put(backend("a", "10.98.0.1", true, func(p *corev1.Pod) { p.Status.PodIPs = []corev1.PodIP{{IP: "10.98.0.1"}, {IP: "fd00::1"}} }))
	w.stepEndpoints()
	w.expect(t, "http=8080 admin=81 10.98.0.1/rs", "http=8080 admin=81 fd00::1/rs")
}

// TestEndpointsStayWhereTheyAre: whatever happens to pods, slices hold at most 100
// endpoints, each pod once, and one changed pod is one changed slice.
func TestEndpointsStayWhereTheyAre(t *testing.T) {
	w := newWorld(t)
	w.put(webService())
	for i := range 250 {
		w.put(backend(fmt.Sprintf("p%03d", i), fmt.Sprintf("10.98.%d.%d", i/200, i%200+1), true))
	}
	if ms := w.stepEndpoints(); len(ms) != 3 {
		t.Fatalf("250 pods make %d slices, want 3", len(ms))
	}
	w.put(api.Clone(backend("p120", "10.98.0.121", false)))
	if ms := w.stepEndpoints(); len(ms) != 1 || ms[0].Verb != api.Update {
		t.Errorf("one pod's change: %d mutations", len(ms))
	}
	w.put(backend("new", "10.98.9.9", true))
	if ms := w.stepEndpoints(); len(ms) != 1 {
		t.Errorf("a new pod: %d mutations", len(ms))
	}
	rapid.Check(t, func(t *rapid.T) {
		v := &world{t: t, now: w.now, revision: w.revision, objects: map[api.Key]api.Object{}}
		for k, o := range w.objects {
			v.objects[k] = o
		}
		for range 2 {
			for range rapid.IntRange(1, 150).Draw(t, "changes") {
				i := rapid.IntRange(0, 399).Draw(t, "pod")
				key := api.Key{Resource: api.Pods, Namespace: "default", Name: fmt.Sprintf("p%03d", i)}
				if rapid.Bool().Draw(t, "gone") {
					delete(v.objects, key)
				} else {
					v.put(backend(key.Name, fmt.Sprintf("10.98.%d.%d", i/200, i%200+1), rapid.Bool().Draw(t, "ready")))
				}
			}
			v.stepEndpoints()
			seen, pods := map[string]bool{}, v.pods()
			for s := range api.List[*discoveryv1.EndpointSlice](v.reader(), "") {
				if len(s.Endpoints) > 100 {
					t.Fatalf("%d endpoints in one slice", len(s.Endpoints))
				}
				for _, e := range s.Endpoints {
					if seen[e.Addresses[0]] {
						t.Fatalf("%s is in two slices", e.Addresses[0])
					}
					seen[e.Addresses[0]] = true
				}
			}
			if len(seen) != len(pods) {
				t.Fatalf("%d endpoints for %d pods", len(seen), len(pods))
			}
			if ms := workload.Endpoints(v.now, v.reader(), v.service()); len(ms) != 0 {
				t.Fatalf("a second pass does %d things", len(ms))
			}
		}
	})
}
