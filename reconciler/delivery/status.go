package delivery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler"
	"decree.dev/decree/schemas/api"
)

const (
	conditionReady = "Ready"
	// retell is the least time before a condition is written anew only because its
	// text has changed: the text of an error may be another one at every poll.
	retell = 10 * time.Minute
	// maxMessage is how many bytes of an error a condition keeps.
	maxMessage = 4096
)

// retry is the wait after failures of the cluster itself.
var retry = reconciler.Backoff{Min: 500 * time.Millisecond, Max: 30 * time.Second}

// rethink is the wait before a refused commit is planned again: another source may
// have made room for it. Until then the same answer costs nothing.
var rethink = reconciler.Backoff{Min: time.Minute, Max: 30 * time.Minute}

// refused remembers a commit that was refused. It is not in the state: a new leader
// tries once.
type refused struct {
	hash       string
	generation int64
	times      int
	until      time.Time
	condition  metav1.Condition
}

// still says whether the commit would be refused again for all that is known.
func (r *refused) still(src *api.Source, hash string, now time.Time) bool {
	return r.hash == hash && r.generation == src.Generation && now.Before(r.until)
}

// again notes a refusal.
func (r *refused) again(out *Outcome, hash string, c metav1.Condition, now time.Time) {
	if r.hash != hash || r.generation != out.Generation {
		*r = refused{hash: hash, generation: out.Generation}
	}
	r.times++
	r.until, r.condition = now.Add(rethink.Wait(r.times)), c
}

// inForce says that the commit is in force as the source's present spec asks for,
// and that the status says so. A new path, for example, asks for another delivery
// of the same commit.
func inForce(src *api.Source, hash string) bool {
	c := meta.FindStatusCondition(src.Status.Conditions, conditionReady)
	return src.Status.Applied == hash && c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == src.Generation
}

func ready(message string) metav1.Condition {
	return metav1.Condition{Type: conditionReady, Status: metav1.ConditionTrue, Reason: ReasonApplied, Message: message}
}

func notReady(reason, message string) metav1.Condition {
	return metav1.Condition{Type: conditionReady, Status: metav1.ConditionFalse, Reason: reason, Message: bounded(message, maxMessage)}
}

// report writes what a poll found into the source's status, if it says something
// new: an unchanged answer costs no log entry. generation is that of the spec which
// the answer is about; fetched is the commit that was seen, "" for none.
func (fl *following) report(ctx context.Context, generation int64, fetched string, c metav1.Condition) error {
	c.ObservedGeneration = generation
	for range maxSteps {
		src, ok := api.Get[*api.Source](fl.Pipeline.Store.View(), "", fl.name)
		if !ok || src.UID != fl.uid {
			return nil
		}
		now := time.Now()
		next := fl.status(src, fetched, c, now)
		if next == nil {
			return nil
		}
		// The status is also written by operators: it must be the one that was read.
		res, err := fl.Pipeline.Store.Propose(ctx, command.Txn{
			Time: now.UnixMilli(), Actor: "git/" + fl.name, Reason: c.Reason,
			Mutations: []api.Mutation{api.Guarded(api.UpdateStatus, next)},
		})
		switch {
		case err != nil:
			return fmt.Errorf("source %q: write its status: %w", fl.name, err)
		case res.Rejected == nil:
			fl.told = now
			fl.Log.Info("source", "source", fl.name, "ready", c.Status, "reason", c.Reason, "message", c.Message)
			return nil
		case res.Rejected.Code != command.Conflict:
			return fmt.Errorf("source %q: write its status: %w", fl.name, res.Rejected)
		}
	}
	return fmt.Errorf("source %q: write its status: %w", fl.name, errors.New("it kept changing"))
}

// status returns src with the condition, nil if that says nothing new. Its
// lastTransitionTime is since when the reason holds.
func (fl *following) status(src *api.Source, fetched string, c metav1.Condition, now time.Time) *api.Source {
	at := metav1.NewTime(now.UTC().Truncate(time.Second))
	old := meta.FindStatusCondition(src.Status.Conditions, conditionReady)
	same := old != nil && old.Status == c.Status && old.Reason == c.Reason
	news := !same || old.ObservedGeneration != c.ObservedGeneration ||
		(old.Message != c.Message && (c.Status == metav1.ConditionTrue || now.Sub(fl.told) >= retell))
	seen := fetched != "" && fetched != src.Status.Fetched
	if !news && !seen {
		return nil
	}
	next := api.Clone(src)
	if seen {
		next.Status.Fetched = fetched
	}
	if fetched != "" {
		next.Status.FetchedAt = &at
	}
	c.LastTransitionTime = at
	if same {
		c.LastTransitionTime = old.LastTransitionTime
	}
	if at := meta.FindStatusCondition(next.Status.Conditions, conditionReady); at != nil {
		*at = c
	} else {
		next.Status.Conditions = append(next.Status.Conditions, c)
	}
	return next
}
