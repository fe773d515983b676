package apiserver

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// Report is what a node sends to nodes/NAME/report: mutations that stand for
// themselves. An empty one says that the node lives.
type Report struct {
	Items []ReportItem `json:"items"`
}

// ReportItem is an api.Mutation as JSON.
type ReportItem struct {
	Verb     api.Verb        `json:"verb"`
	Key      api.Key         `json:"key"`
	Object   json.RawMessage `json:"object,omitempty"`
	Revision uint64          `json:"revision,omitempty"`
	UID      types.UID       `json:"uid,omitempty"`
	Grace    *int64          `json:"grace,omitempty"`
}

// ReportResult has one entry per item of the Report, in order: nil for applied.
type ReportResult struct {
	Errors []*metav1.Status `json:"errors"`
}

// MaxReport is the most items of one Report.
const MaxReport = 1000

// NewReport encodes mutations for the wire.
func NewReport(ms []api.Mutation) (*Report, error) {
	r := &Report{Items: make([]ReportItem, len(ms))}
	for i, m := range ms {
		r.Items[i] = ReportItem{Verb: m.Verb, Key: m.Key, Revision: m.Revision, UID: m.UID, Grace: m.Grace}
		if m.Object == nil {
			continue
		}
		data, err := json.Marshal(m.Object)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", m.Key, err)
		}
		r.Items[i].Object = data
	}
	return r, nil
}

// serveReport applies what a node says about itself.
func (s *Server) serveReport(w http.ResponseWriter, r *http.Request) {
	node := r.PathValue("node")
	who, _ := IdentityFrom(r.Context())
	if !Authorize(who, VerbReport, api.Nodes, "", node, s.cfg.Store.View()) {
		s.fail(w, r, statusError(http.StatusForbidden, metav1.StatusReasonForbidden, fmt.Sprintf("user %s may not report for node %q", who.Name, node)))
		return
	}
	if err := s.report(w, r, node); err != nil {
		s.fail(w, r, err)
	}
}

func (s *Server) report(w http.ResponseWriter, r *http.Request, node string) error {
	var report Report
	if err := json.NewDecoder(r.Body).Decode(&report); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return err
		}
		return apierrors.NewBadRequest("report: " + err.Error())
	}
	if len(report.Items) > MaxReport {
		return apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("a report has at most %d items", MaxReport))
	}
	if s.cfg.Heard != nil {
		s.cfg.Heard(node, time.Now())
	}
	results := make([]error, len(report.Items))
	view := s.cfg.Store.View()
	var batch []indexed
	for i := range report.Items {
		m, err := reported(view, node, &report.Items[i])
		if err != nil {
			results[i] = err
			continue
		}
		batch = append(batch, indexed{i, m})
	}
	if err := s.applyReport(r.Context(), node, batch, results); err != nil {
		return err
	}
	answer := ReportResult{Errors: make([]*metav1.Status, len(results))}
	for i, err := range results {
		if err != nil {
			answer.Errors[i] = statusOf(err)
		}
	}
	return writeObject(w, http.StatusOK, format{}, answer)
}

type indexed struct {
	index    int
	mutation api.Mutation
}

// applyReport proposes runs of mutations with different keys together, because that
// is one transaction instead of many; if such a run is rejected, its mutations are
// proposed one by one, so that each has its own result.
func (s *Server) applyReport(ctx context.Context, node string, batch []indexed, results []error) error {
	for len(batch) > 0 {
		n, seen := 0, map[api.Key]bool{}
		for n < len(batch) && !seen[batch[n].mutation.Key] {
			seen[batch[n].mutation.Key] = true
			n++
		}
		run := batch[:n]
		batch = batch[n:]
		err := s.proposeReport(ctx, node, run)
		var rejected *command.Rejection
		switch {
		case err == nil:
			continue
		case !errors.As(err, &rejected):
			return err
		case len(run) == 1:
			results[run[0].index] = err
			continue
		}
		for i := range run {
			err := s.proposeReport(ctx, node, run[i:i+1])
			if err != nil && !errors.As(err, &rejected) {
				return err
			}
			results[run[i].index] = err
		}
	}
	return nil
}

func (s *Server) proposeReport(ctx context.Context, node string, run []indexed) error {
	txn := command.Txn{Key: rand.Text(), Time: time.Now().UnixMilli(), Actor: "node/" + node, Reason: "report"}
	for _, x := range run {
		txn.Mutations = append(txn.Mutations, x.mutation)
	}
	return propose(ctx, s.cfg.Store, txn)
}

// reported decodes one item and checks that a node may report it: the status of its
// pods and the removal of those that are terminating, its own Node, and events.
func reported(view api.Reader, node string, item *ReportItem) (api.Mutation, error) {
	m := api.Mutation{Verb: item.Verb, Key: item.Key, Revision: item.Revision, UID: item.UID, Grace: item.Grace}
	kind, ok := api.KindFor(item.Key.Resource)
	if !ok {
		return m, apierrors.NewBadRequest(fmt.Sprintf("resource %q is not served", clip(string(item.Key.Resource), 64)))
	}
	if len(item.Object) > 0 {
		o, err := kind.DecodeJSON(item.Object)
		if err != nil {
			return m, apierrors.NewBadRequest(err.Error())
		}
		if api.KeyOf(o) != m.Key {
			return m, apierrors.NewBadRequest(fmt.Sprintf("the object is %s, its key %s", api.KeyOf(o), m.Key))
		}
		m.Object = o
	}
	if m.Object == nil && m.Verb != api.Delete {
		return m, apierrors.NewBadRequest(fmt.Sprintf("%s %s needs an object", m.Verb, m.Key))
	}
	switch m.Key.Resource {
	case api.Pods:
		return m, reportedPod(view, node, &m)
	case api.Nodes:
		return m, reportedNode(view, node, &m)
	case api.Events:
		return m, reportedEvent(view, node, &m)
	}
	return m, notReportable(node, &m)
}

func notReportable(node string, m *api.Mutation) error {
	return statusError(http.StatusForbidden, metav1.StatusReasonForbidden, fmt.Sprintf("node %q may not %s %s", node, m.Verb, m.Key))
}

func reportedPod(view api.Reader, node string, m *api.Mutation) error {
	pod, ok := api.Get[*corev1.Pod](view, m.Key.Namespace, m.Key.Name)
	if !ok {
		return apierrors.NewNotFound(groupResource(api.Pods), m.Key.Name)
	}
	if pod.Spec.NodeName != node {
		return notReportable(node, m)
	}
	// A report is about the pod that the node runs, never about one that has taken
	// its name since.
	uid := m.UID
	if uid == "" && m.Object != nil {
		uid = m.Object.GetUID()
	}
	if uid != "" && uid != pod.UID {
		return apierrors.NewConflict(groupResource(api.Pods), m.Key.Name, fmt.Errorf("its uid is %s, not %s", pod.UID, uid))
	}
	m.UID = pod.UID
	switch {
	case m.Verb == api.UpdateStatus:
		return nil
	case m.Verb == api.Delete && pod.DeletionTimestamp != nil && m.Grace != nil && *m.Grace == 0:
		return nil
	}
	return notReportable(node, m)
}

// Prefixes of what nodes do not say of themselves: labels that are there to tell nodes apart
// whatever they say (KEP-279), and annotations but those of their agents' own.
const (
	restrictedLabels = "node-restriction.kubernetes.io/"
	agentAnnotations = "net.decree.dev/"
)

// reportedNode lets a node make its own Node and report its status, and say more of itself in
// labels and its agent's annotations. The rest of the object, and what others set in it, stays.
func reportedNode(view api.Reader, node string, m *api.Mutation) error {
	if m.Key.Name != node {
		return notReportable(node, m)
	}
	switch m.Verb {
	case api.Create, api.UpdateStatus:
		return nil
	case api.Update:
	default:
		return notReportable(node, m)
	}
	have, ok := api.Get[*corev1.Node](view, "", node)
	if !ok {
		return apierrors.NewNotFound(groupResource(api.Nodes), node)
	}
	said, now := m.Object.(*corev1.Node), api.Clone(have)
	for k, v := range said.Labels {
		if !strings.HasPrefix(k, restrictedLabels) {
			metav1.SetMetaDataLabel(&now.ObjectMeta, k, v)
		}
	}
	agents := func(k, _ string) bool { return strings.HasPrefix(k, agentAnnotations) }
	maps.DeleteFunc(now.Annotations, agents) // what it does not say any more
	for k, v := range said.Annotations {
		if agents(k, v) {
			metav1.SetMetaDataAnnotation(&now.ObjectMeta, k, v)
		}
	}
	m.Object, m.Revision = now, api.RevisionOf(have)
	return nil
}

// reportedEvent makes sure that an event says which node it is from, and that a
// node changes no event of others.
func reportedEvent(view api.Reader, node string, m *api.Mutation) error {
	if m.Verb != api.Create && m.Verb != api.Update {
		return notReportable(node, m)
	}
	e := m.Object.(*corev1.Event)
	if e.Source.Host != "" && e.Source.Host != node {
		return notReportable(node, m)
	}
	e.Source.Host = node
	if old, ok := api.Get[*corev1.Event](view, m.Key.Namespace, m.Key.Name); ok && old.Source.Host != node {
		return notReportable(node, m)
	}
	return nil
}
