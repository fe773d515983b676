package delivery

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// refuse records that the commit was refused, once for the same reasons: who asks
// again and again does not fill the log. The record is kept short; the whole list of
// errors is in the outcome.
func (d *delivery) refuse(ctx context.Context, view api.Reader, src *api.Source, reason string, diags []api.Diagnostic) (*Outcome, error) {
	out := &Outcome{Generation: src.Generation, Diagnostics: diags, Reason: reason}
	rev := d.revision(src.Status.Applied, api.RevisionRefused)
	rev.Spec.Message = summary(diags)
	if recorded(view, rev.Spec) {
		return out, nil
	}
	d.Log.Info("commit refused", "source", d.Source, "commit", d.Commit.Hash, "reason", reason, "errors", len(diags))
	res, err := d.Store.Propose(ctx, command.Txn{
		Time: time.Now().UnixMilli(), Actor: d.actor(), Reason: reason,
		Commit: &command.Commit{Source: d.Source, Parent: src.Status.Applied, Revision: rev},
	})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		return out, fmt.Errorf("source %q: record that commit %.7s was refused: %w", d.Source, d.Commit.Hash, err)
	}
	return out, nil
}

// recorded says whether the newest Revision of the source says the same.
func recorded(view api.Reader, spec api.RevisionSpec) bool {
	var newest *api.Revision
	for r := range api.List[*api.Revision](view, "") {
		if r.Spec.Source == spec.Source && (newest == nil || api.RevisionOf(r) > api.RevisionOf(newest)) {
			newest = r
		}
	}
	if newest == nil {
		return false
	}
	last := newest.Spec
	return last.Result == spec.Result && last.Commit == spec.Commit && last.Parent == spec.Parent &&
		last.Pusher == spec.Pusher && last.Message == spec.Message
}

// revision is the record of the commit. What an author wrote is cut to a length
// that every replica can keep.
func (d *delivery) revision(parent, result string) *api.Revision {
	c := d.Commit
	return &api.Revision{Spec: api.RevisionSpec{
		Source: d.Source, Commit: c.Hash, Parent: parent, Author: bounded(c.Author, maxText),
		Time: metav1.NewTime(c.Time.UTC().Truncate(time.Second)), Subject: bounded(c.Subject, maxText),
		Pusher: d.Pusher, Signer: c.Signer, Result: result,
	}}
}

const (
	maxText    = 512  // bytes of an author or a subject in a record
	maxLines   = 20   // diagnostics in a record
	maxSummary = 8192 // bytes of them
)

func summary(ds []api.Diagnostic) string {
	var s strings.Builder
	for i, d := range ds {
		if i == maxLines || s.Len() > maxSummary/2 {
			fmt.Fprintf(&s, "… and %d more\n", len(ds)-i)
			break
		}
		s.WriteString(bounded(d.Error(), maxSummary/4) + "\n")
	}
	return s.String()
}

// bounded cuts s to at most n bytes of valid UTF-8.
func bounded(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	cut := n - len("…")
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}
