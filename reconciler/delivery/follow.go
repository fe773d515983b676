package delivery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// Fetcher fetches external repositories: *gitsource.Mirror.
type Fetcher interface {
	Fetch(ctx context.Context, r gitsource.Remote) (*gitsource.Fetched, error)
}

// SystemNamespace is where the credentials of sources live.
const SystemNamespace = "decree-system"

// DefaultInterval is how often an external repository is polled.
const DefaultInterval = 30 * time.Second

// Follower polls external sources and delivers what is new. One goroutine follows
// one source; Run starts and stops them as sources come, change and go.
type Follower struct {
	Pipeline *Pipeline
	Fetcher  Fetcher
	Log      *slog.Logger

	mu    sync.Mutex
	nudge map[string]chan struct{} // by source, one signal each: poll now
}

// Run follows all external sources until ctx ends.
func (f *Follower) Run(ctx context.Context) error {
	f.mu.Lock()
	f.nudge = map[string]chan struct{}{}
	f.mu.Unlock()
	running := map[string]context.CancelFunc{}
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		view := f.Pipeline.Store.View()
		external := map[string]bool{}
		for src := range api.List[*api.Source](view, "") {
			if src.Spec.URL == "" {
				continue
			}
			external[src.Name] = true
			if running[src.Name] == nil {
				sub, cancel := context.WithCancel(ctx)
				running[src.Name] = cancel
				nudge := make(chan struct{}, 1)
				f.mu.Lock()
				f.nudge[src.Name] = nudge
				f.mu.Unlock()
				wg.Go(func() { f.follow(sub, src.Name, nudge) })
			}
		}
		for name, cancel := range running {
			if !external[name] {
				cancel()
				delete(running, name)
				f.mu.Lock()
				delete(f.nudge, name)
				f.mu.Unlock()
			}
		}
		if err := f.Pipeline.Store.Await(ctx, view.Revision()); err != nil {
			for _, cancel := range running {
				cancel()
			}
			return err
		}
	}
}

// Sync asks for a poll of a source now, ahead of its interval.
func (f *Follower) Sync(source string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	nudge, ok := f.nudge[source]
	if !ok {
		return fmt.Errorf("source %q: %w among the external ones: a built-in repository needs no sync", source, ErrNoSource)
	}
	select {
	case nudge <- struct{}{}:
	default:
	}
	return nil
}

// follow polls one source at its interval, when nudged, and when its spec changes.
func (f *Follower) follow(ctx context.Context, name string, nudge <-chan struct{}) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	respec := make(chan struct{}, 1)
	go f.watchSpec(ctx, name, respec)
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-nudge:
		case <-respec:
		}
		interval := DefaultInterval
		if src, ok := api.Get[*api.Source](f.Pipeline.Store.View(), "", name); ok {
			if src.Spec.Interval.Duration > 0 {
				interval = src.Spec.Interval.Duration
			}
			if err := f.poll(ctx, src); err != nil && ctx.Err() == nil {
				f.Log.Warn("source not followed", "source", name, "err", err)
			}
		}
		timer.Reset(jitter(interval))
	}
}

// jitter spreads polls over ±10 % of the interval.
func jitter(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)*0.2*float64(d))
}

// watchSpec signals when the spec or the suspension of a source changes.
func (f *Follower) watchSpec(ctx context.Context, name string, out chan<- struct{}) {
	fingerprint := func(v api.Reader) string {
		src, ok := api.Get[*api.Source](v, "", name)
		if !ok {
			return ""
		}
		return fmt.Sprint(src.Generation, src.Status.Suspended != nil)
	}
	view := f.Pipeline.Store.View()
	last := fingerprint(view)
	for f.Pipeline.Store.Await(ctx, view.Revision()) == nil {
		view = f.Pipeline.Store.View()
		if now := fingerprint(view); now != last {
			last = now
			select {
			case out <- struct{}{}:
			default:
			}
		}
	}
}

// fetchTimeout bounds one fetch of an external repository.
const fetchTimeout = 5 * time.Minute

// poll fetches once and delivers the commit if it is not in force. Whatever goes
// wrong is written into the source's Ready condition; nothing else changes.
func (f *Follower) poll(ctx context.Context, src *api.Source) error {
	if src.Spec.Suspend || src.Status.Suspended != nil {
		return f.report(ctx, src.Name, "", condition(false, ReasonSuspended, "not followed while suspended"))
	}
	remote, err := f.remote(src)
	if err != nil {
		return errors.Join(err, f.report(ctx, src.Name, "", condition(false, ReasonFetchError, err.Error())))
	}
	fetchCtx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	fetched, err := f.Fetcher.Fetch(fetchCtx, remote)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return errors.Join(err, f.report(ctx, src.Name, "", condition(false, ReasonFetchError, err.Error())))
	}
	commit := fetched.Commit
	ready := meta.FindStatusCondition(src.Status.Conditions, "Ready")
	switch {
	case commit.Hash == src.Status.Applied:
		return f.report(ctx, src.Name, commit.Hash, condition(true, ReasonApplied, "at "+commit.Hash))
	case fetched.Rewound && src.Spec.Commit == "":
		msg := fmt.Sprintf("%s no longer contains the commit in force: %.7s is not a descendant of %.7s; if the rewrite is meant, pin it with spec.commit", src.Spec.URL, commit.Hash, src.Status.Applied)
		return f.report(ctx, src.Name, commit.Hash, condition(false, ReasonRewound, msg))
	case commit.Hash == src.Status.Fetched && ready != nil && (ready.Reason == ReasonCompileError || ready.Reason == ReasonPlanRefused) && ready.ObservedGeneration == src.Generation:
		return nil // refused already; the same commit will not do better
	}
	out, err := f.Pipeline.Deliver(ctx, Request{Source: src.Name, Commit: commit})
	if err != nil {
		return err
	}
	if !out.Applied {
		c := condition(false, out.Reason, summary(out.Diagnostics))
		return f.report(ctx, src.Name, commit.Hash, c)
	}
	return f.report(ctx, src.Name, commit.Hash, condition(true, ReasonApplied, "at "+commit.Hash))
}

// remote assembles what a fetch needs, credentials included.
func (f *Follower) remote(src *api.Source) (gitsource.Remote, error) {
	r := gitsource.Remote{URL: src.Spec.URL, Branch: src.Spec.Branch, Tag: src.Spec.Tag, Commit: src.Spec.Commit, Last: src.Status.Applied}
	if src.Spec.SecretRef == nil {
		return r, nil
	}
	name := src.Spec.SecretRef.Name
	secret, ok := api.Get[*corev1.Secret](f.Pipeline.Store.View(), SystemNamespace, name)
	if !ok {
		return r, fmt.Errorf("secret %q is not in namespace %q: spec.secretRef of source %q names it", name, SystemNamespace, src.Name)
	}
	r.Auth = gitsource.Auth{
		Username: string(secret.Data["username"]), Password: string(secret.Data["password"]),
		Token: string(secret.Data["token"]), CA: secret.Data["ca.crt"],
		SSHKey: secret.Data["identity"], KnownHosts: secret.Data["known_hosts"],
	}
	return r, nil
}

func condition(ready bool, reason, message string) metav1.Condition {
	status := metav1.ConditionFalse
	if ready {
		status = metav1.ConditionTrue
	}
	return metav1.Condition{Type: "Ready", Status: status, Reason: reason, Message: message}
}

// report writes what a poll found into the source's status, if it says something
// new: an unchanged answer costs no log entry. since-when is the condition's
// lastTransitionTime.
func (f *Follower) report(ctx context.Context, name, fetched string, c metav1.Condition) error {
	src, ok := api.Get[*api.Source](f.Pipeline.Store.View(), "", name)
	if !ok {
		return nil
	}
	next := api.Clone(src)
	c.ObservedGeneration = src.Generation
	now := metav1.NewTime(time.Now().UTC().Truncate(time.Second))
	c.LastTransitionTime = now
	changed := meta.SetStatusCondition(&next.Status.Conditions, c)
	if fetched != "" && fetched != src.Status.Fetched {
		next.Status.Fetched, changed = fetched, true
	}
	if !changed {
		return nil
	}
	if fetched != "" {
		next.Status.FetchedAt = &now
	}
	res, err := f.Pipeline.Store.Propose(ctx, command.Txn{
		Time: time.Now().UnixMilli(), Actor: "git/" + name, Reason: c.Reason,
		Mutations: []api.Mutation{{Verb: api.UpdateStatus, Key: api.KeyOf(next), Object: next}},
	})
	if err != nil {
		return err
	}
	if res.Rejected != nil {
		return res.Rejected
	}
	return nil
}
