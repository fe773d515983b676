// Package workload holds the controllers: pure functions that look at one object
// and what belongs to it and return the next mutations as data. It knows
// Deployments, ReplicaSets, the EndpointSlices of Services, the addresses of load
// balancers, the health of Nodes, and what is garbage.
//
// Every function takes the time as an argument, reads one consistent view, and
// returns nothing when there is nothing to do, so that it may be called as often as
// one likes. Mutations carry the revision of what they were computed from: a plan
// made from an outdated view is rejected as a whole and made again. Names of new
// objects follow from the view for the same reason.
//
// Objects that come from Git get status updates only.
package workload

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"decree.dev/decree/schemas/api"
)

// alphabet has no vowels and no characters that are easily confused, so that a
// suffix spells nothing.
const alphabet = "bcdfghjklmnpqrstvwxz2456789"

// suffix hashes parts into n characters that are valid in any name.
func suffix(n int, parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write([]byte(p))
		h.Write([]byte{0})
	}
	x := binary.BigEndian.Uint64(h.Sum(nil))
	b := make([]byte, n)
	for i := range b {
		b[i] = alphabet[x%uint64(len(alphabet))]
		x /= uint64(len(alphabet))
	}
	return string(b)
}

// named appends a suffix to base, cutting base so that the name stays a DNS label.
func named(base, suffix string) string {
	if limit := 63 - 1 - len(suffix); len(base) > limit {
		base = strings.TrimRight(base[:limit], "-.")
	}
	return base + "-" + suffix
}

// controllerRef is the owner reference of what o controls.
func controllerRef(o api.Object) metav1.OwnerReference {
	return *metav1.NewControllerRef(o, api.KindOf(o).GroupVersionKind)
}

// selectorOf returns nothing-matching for a selector that is absent, empty or
// invalid: the plan refuses those, and a controller must not act on them.
func selectorOf(s *metav1.LabelSelector) labels.Selector {
	if s == nil || len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
		return labels.Nothing()
	}
	sel, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing()
	}
	return sel
}

// create returns the mutation that adds o.
func create(o api.Object) api.Mutation {
	o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
	return api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o}
}

// remove returns the mutation that deletes exactly o.
func remove(o api.Object) api.Mutation {
	return api.Mutation{Verb: api.Delete, Key: api.KeyOf(o), UID: o.GetUID()}
}

// note appends the event of n to ms.
func note(ms []api.Mutation, now time.Time, r api.Reader, n api.Note) []api.Mutation {
	m, ok := n.Event(now, r)
	if !ok {
		return ms
	}
	for _, other := range ms {
		if other.Key == m.Key {
			return ms
		}
	}
	return append(ms, m)
}

// earliest keeps the shorter of two waits; zero means none.
func earliest(a, b time.Duration) time.Duration {
	switch {
	case b <= 0:
		return a
	case a <= 0:
		return b
	}
	return min(a, b)
}

// tally counts the pods of one ReplicaSet.
type tally struct {
	active, ready, available int32
	present                  int32         // including those on their way out
	wait                     time.Duration // until the next ready pod becomes available; zero: none waits
}

func count(pods []*corev1.Pod, minReady time.Duration, now time.Time) tally {
	var t tally
	for _, p := range pods {
		if !api.PodFinished(p) {
			t.present++
		}
		if !api.PodActive(p) {
			continue
		}
		t.active++
		at, ready := api.PodAvailableAt(p, minReady)
		if !ready {
			continue
		}
		t.ready++
		if api.PodAvailable(p, minReady, now) {
			t.available++
		} else {
			t.wait = earliest(t.wait, at.Sub(now))
		}
	}
	return t
}

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
