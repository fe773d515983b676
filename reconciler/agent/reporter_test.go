package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// recorder is a ControlPlane that writes down what it is told.
type recorder struct {
	ControlPlane
	err    error
	refuse func(api.Mutation) error
	got    []string
}

func (r *recorder) Report(_ context.Context, ms []api.Mutation) ([]error, error) {
	if r.err != nil {
		return nil, r.err
	}
	errs := make([]error, len(ms))
	for i, m := range ms {
		if r.refuse != nil {
			errs[i] = r.refuse(m)
		}
		text := ""
		if p, ok := m.Object.(*corev1.Pod); ok {
			text = " " + p.Status.Message
		}
		r.got = append(r.got, fmt.Sprintf("%s %s%s", m.Verb, m.Key.Name, text))
	}
	return errs, nil
}

func podReport(name, message string) api.Mutation {
	p := &corev1.Pod{}
	p.Name, p.Status.Message = name, message
	return api.Mutation{Verb: api.UpdateStatus, Key: api.KeyOf(p), Object: p}
}

func TestReporterCoalescesAndKeepsOrder(t *testing.T) {
	plane := &recorder{err: errors.New("down")}
	r := newReporter(plane, slog.New(slog.DiscardHandler))
	r.put(podReport("a", "1"), nil)
	r.put(podReport("b", "1"), nil)
	if _, err := r.flush(t.Context()); err == nil {
		t.Fatal("no error while the control plane is down")
	}
	r.put(podReport("c", "1"), nil)
	r.put(podReport("a", "2"), nil)
	plane.err = nil
	if n, err := r.flush(t.Context()); n != 3 || err != nil {
		t.Errorf("sent %d, %v", n, err)
	}
	if want := []string{"update status a 2", "update status b 1", "update status c 1"}; !slices.Equal(plane.got, want) {
		t.Errorf("got %q, want %q", plane.got, want)
	}
}

func TestReporterRefusals(t *testing.T) {
	exists := map[string]bool{"e": true}
	plane := &recorder{refuse: func(m api.Mutation) error {
		switch {
		case m.Key.Resource == api.Pods:
			return errors.New("no such pod")
		case m.Verb == api.Create && exists[m.Key.Name]:
			return errors.New("exists")
		}
		return nil
	}}
	r := newReporter(plane, slog.New(slog.DiscardHandler))
	e := &corev1.Event{}
	e.Name = "e"
	refused := 0
	r.put(api.Mutation{Verb: api.Create, Key: api.KeyOf(e), Object: e}, nil)
	r.put(podReport("a", "1"), func(error) { refused++ })
	for range 3 {
		if _, err := r.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(plane.got, ", "); got != "create e, update status a 1, update e" || refused != 1 {
		t.Errorf("got %s; refused %d times", got, refused)
	}
}
