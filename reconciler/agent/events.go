package agent

import (
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

const (
	eventBurst  = 30               // per pod
	eventRefill = 10 * time.Second // one more event
	eventsKept  = 2048             // series remembered
)

// eventLog turns occurrences into Event objects: one per pod, reason and message,
// whose count and lastTimestamp grow. Each pod has a budget, so that a pod in
// trouble cannot flood the control plane.
type eventLog struct {
	node   string
	report *reporter

	mu     sync.Mutex
	series map[eventKey]*corev1.Event
	order  []eventKey // by first occurrence, to forget the oldest
	budget map[string]bucket
	serial int64
}

type eventKey struct{ uid, reason, field, message string }

type bucket struct {
	tokens int
	at     time.Time
}

func newEventLog(node string, r *reporter) *eventLog {
	return &eventLog{node: node, report: r, series: map[eventKey]*corev1.Event{}, budget: map[string]bucket{}}
}

// pod records an event about a pod or, with a container's name, about a container.
func (e *eventLog) pod(pod *corev1.Pod, container string, init bool, warning bool, reason, message string) {
	ref := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID,
		ResourceVersion: pod.ResourceVersion}
	if container != "" {
		list := "containers"
		if init {
			list = "initContainers"
		}
		ref.FieldPath = fmt.Sprintf("spec.%s{%s}", list, container)
	}
	e.record(ref, warning, reason, message)
}

// aboutNode records an event about this node, in the namespace "default".
func (e *eventLog) aboutNode(warning bool, reason, message string) {
	e.record(corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: e.node}, warning, reason, message)
}

func (e *eventLog) record(ref corev1.ObjectReference, warning bool, reason, message string) {
	now := time.Now()
	key := eventKey{string(ref.UID) + ref.Name, reason, ref.FieldPath, message}
	e.mu.Lock()
	if !e.allow(key.uid, now) {
		e.mu.Unlock()
		return
	}
	verb := api.Update
	ev, known := e.series[key]
	if known {
		ev = api.Clone(ev)
		ev.Count++
		ev.LastTimestamp = *seconds(now)
	} else {
		verb = api.Create
		ev = e.first(ref, warning, reason, message, now)
		e.remember(key)
	}
	e.series[key] = ev
	e.mu.Unlock()
	e.report.put(api.Mutation{Verb: verb, Key: api.KeyOf(ev), Object: ev}, nil)
}

func (e *eventLog) first(ref corev1.ObjectReference, warning bool, reason, message string, now time.Time) *corev1.Event {
	kind := corev1.EventTypeNormal
	if warning {
		kind = corev1.EventTypeWarning
	}
	e.serial++
	ns := ref.Namespace
	if ns == "" {
		ns = metav1.NamespaceDefault
	}
	return &corev1.Event{
		TypeMeta:       metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta:     metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("%s.%x", ref.Name, now.UnixNano()+e.serial)},
		InvolvedObject: ref, Reason: reason, Message: message, Type: kind,
		Source:         corev1.EventSource{Component: "decree-agent", Host: e.node},
		FirstTimestamp: *seconds(now), LastTimestamp: *seconds(now), Count: 1,
		ReportingController: "decree.dev/agent", ReportingInstance: e.node,
	}
}

func (e *eventLog) remember(key eventKey) {
	e.order = append(e.order, key)
	if len(e.order) > eventsKept {
		delete(e.series, e.order[0])
		e.order = e.order[1:]
	}
}

// allow takes one event from the budget of an object.
func (e *eventLog) allow(id string, now time.Time) bool {
	b, ok := e.budget[id]
	if !ok {
		if len(e.budget) > eventsKept {
			clear(e.budget)
		}
		b = bucket{eventBurst, now}
	}
	if gained := int(now.Sub(b.at) / eventRefill); gained > 0 {
		b.tokens = min(b.tokens+gained, eventBurst)
		b.at = b.at.Add(time.Duration(gained) * eventRefill)
	}
	if b.tokens == 0 {
		return false
	}
	b.tokens--
	e.budget[id] = b
	return true
}
