package api

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Note is something worth telling about an object: the content of an Event.
type Note struct {
	About     Object
	Type      string // corev1.EventTypeNormal (when empty) or corev1.EventTypeWarning
	Reason    string // UpperCamelCase, for machines: "ScalingReplicaSet"
	Message   string // one line, for people
	Component string // who says it: "deployment-controller", "scheduler"
	Host      string // the node, if one says it
	// Every is the shortest time between two writes of the same note: with it, a
	// loop that finds the same trouble in every pass does not write in every pass.
	// Zero counts every occurrence.
	Every time.Duration
}

// Event returns the mutation that records n at time now, or ok false when the
// same note was recorded less than Every ago. The name of the Event follows from
// the note's content, so that repetitions raise a count instead of adding objects.
func (n Note) Event(now time.Time, r Reader) (m Mutation, ok bool) {
	key := Key{Resource: Events, Namespace: n.About.GetNamespace(), Name: n.name()}
	if key.Namespace == "" {
		key.Namespace = metav1.NamespaceDefault
	}
	at := metav1.NewTime(now)
	if o, exists := r.Get(key); exists {
		old := o.(*corev1.Event)
		if n.Every > 0 && now.Sub(old.LastTimestamp.Time) < n.Every {
			return Mutation{}, false
		}
		e := Clone(old)
		e.Count, e.LastTimestamp = old.Count+1, at
		return Mutation{Verb: Update, Key: key, Object: e}, true
	}
	kind := KindOf(n.About)
	e := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: kind.GroupVersion().String(), Kind: kind.Kind,
			Namespace: n.About.GetNamespace(), Name: n.About.GetName(),
			UID: n.About.GetUID(), ResourceVersion: n.About.GetResourceVersion(),
		},
		Type: n.Type, Reason: n.Reason, Message: n.Message,
		Source:              corev1.EventSource{Component: n.Component, Host: n.Host},
		ReportingController: n.Component, ReportingInstance: n.Host,
		FirstTimestamp: at, LastTimestamp: at, Count: 1,
	}
	orElse(&e.Type, corev1.EventTypeNormal)
	e.SetGroupVersionKind(KindOf(e).GroupVersionKind)
	return Mutation{Verb: Create, Key: key, Object: e}, true
}

// name is the involved object's name and a hash of what makes two notes the same.
func (n Note) name() string {
	h := sha256.New()
	for _, part := range []string{string(KindOf(n.About).Resource), string(n.About.GetUID()), n.Type, n.Reason, n.Message, n.Component, n.Host} {
		h.Write([]byte(part))
		h.Write([]byte{0})
	}
	name := n.About.GetName()
	return strings.TrimRight(name[:min(len(name), 230)], ".-") + "." + hex.EncodeToString(h.Sum(nil)[:8])
}
