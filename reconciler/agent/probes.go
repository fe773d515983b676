package agent

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent/probe"
)

// probeKind tells the three probes of a container apart.
type probeKind string

const (
	liveness  probeKind = "liveness"
	readiness probeKind = "readiness"
	startup   probeKind = "startup"
)

// firstRetry is the wait after the first unsuccessful check of a container that is
// not ready (or not started) yet. It doubles up to the probe's period, so that a
// container that is up within the first seconds is found to be so at once. Checks
// made sooner than the period do not count towards the failure threshold.
const firstRetry = 100 * time.Millisecond

type probeKey struct {
	id   string // of the container
	kind probeKind
}

type runningProbe struct {
	spec   *corev1.Probe
	ip     string
	cancel context.CancelFunc
}

// keepProbes starts and stops probes as the containers need them, and settles what
// containers without a probe are.
func (w *worker) keepProbes(ctx context.Context) {
	want := map[probeKey]bool{}
	if w.sandbox != nil {
		for _, c := range w.sandbox.Containers {
			spec := containerSpec(w.in.pod, c.Name)
			if c.State != Running || spec == nil {
				continue
			}
			for kind, p := range w.probesOf(c, spec) {
				key := probeKey{c.ID, kind}
				want[key] = true
				w.keepProbe(ctx, key, c, spec, p)
			}
		}
	}
	for key, p := range w.probes {
		if !want[key] {
			p.cancel()
			delete(w.probes, key)
		}
	}
}

// probesOf decides which probes a running container needs now: the startup probe
// until it has succeeded, then the others. None while it is being stopped.
func (w *worker) probesOf(c Container, spec *corev1.Container) map[probeKind]*corev1.Probe {
	st := w.local.Probes[c.ID]
	hooked := spec.Lifecycle == nil || spec.Lifecycle.PostStart == nil || w.local.PostStarted[c.ID]
	if !hooked {
		return nil
	}
	probes := map[probeKind]*corev1.Probe{}
	_, stopping := w.local.Stops[c.ID]
	switch {
	case !st.Started && spec.StartupProbe != nil:
		if !stopping {
			probes[startup] = spec.StartupProbe
		}
		return probes
	case !st.Started:
		st.Started = true
	}
	if spec.ReadinessProbe == nil {
		st.Ready = true
	} else {
		probes[readiness] = spec.ReadinessProbe
	}
	if spec.LivenessProbe != nil && !stopping {
		probes[liveness] = spec.LivenessProbe
	}
	if w.local.Probes[c.ID] != st {
		w.local.Probes[c.ID] = st
		w.wake() // what waits for this container may go on
	}
	return probes
}

func (w *worker) keepProbe(ctx context.Context, key probeKey, c Container, spec *corev1.Container, p *corev1.Probe) {
	ip := ""
	if len(w.local.IPs) > 0 {
		ip = w.local.IPs[0].String()
	} else if ip = w.in.pod.Status.PodIP; ip == "" && (p.HTTPGet != nil || p.TCPSocket != nil || p.GRPC != nil) {
		return // adopted, and the address is not known yet
	}
	if run, ok := w.probes[key]; ok {
		if run.ip == ip && reflect.DeepEqual(run.spec, p) {
			return
		}
		run.cancel()
	}
	ctx, cancel := context.WithCancel(ctx)
	w.probes[key] = &runningProbe{p, ip, cancel}
	addr, _ := netip.ParseAddr(ip) // not valid when there is none
	target := w.agent.target(spec, []netip.Addr{addr}, c.ID)
	started := w.local.Probes[c.ID]
	loop := &probeLoop{kind: key.kind, spec: p, since: c.StartedAt, good: key.kind == readiness && started.Ready,
		check: func(ctx context.Context) probe.Result {
			r := probe.Check(ctx, p, target)
			w.agent.metrics.probes.WithLabelValues(string(key.kind), r.Outcome.String()).Inc()
			return r
		},
		tell: func(r verdict) { w.post(func() { w.probed(key, c, spec, p, r) }) },
	}
	w.group.Go(func() { loop.run(ctx) })
}

// probed takes over a verdict of a probe.
func (w *worker) probed(key probeKey, c Container, spec *corev1.Container, p *corev1.Probe, v verdict) {
	if w.probes[key] == nil || w.probes[key].spec != p {
		return // of an earlier probe
	}
	st := w.local.Probes[c.ID]
	if v.outcome == probe.Failure && v.counted {
		name := map[probeKind]string{liveness: "Liveness", readiness: "Readiness", startup: "Startup"}[key.kind]
		w.event(Step{Container: c.Name, Init: c.Init}, true, "Unhealthy", "%s probe failed: %s", name, oneLine(v.message))
	}
	if !v.crossed {
		return
	}
	good := v.outcome == probe.Success
	switch {
	case key.kind == startup && good:
		st.Started = true
	case key.kind == readiness:
		st.Ready = good
	case !good:
		if _, stopping := w.local.Stops[c.ID]; !stopping {
			grace := p.TerminationGracePeriodSeconds
			w.local.Unhealthy[c.ID] = Verdict{Grace: grace,
				Reason: fmt.Sprintf("it failed its %s probe %d times: %s", key.kind, max(p.FailureThreshold, 1), oneLine(v.message))}
		}
	}
	w.local.Probes[c.ID] = st
}

// target is what probes and hooks of a container talk to.
func (a *Agent) target(c *corev1.Container, ips []netip.Addr, id string) probe.Target {
	t := probe.Target{Container: c, Dial: a.cfg.Dial, Exec: func(ctx context.Context, command []string, out io.Writer) (int, error) {
		return a.cfg.Runtime.Exec(ctx, id, ExecConfig{Command: command, Stdout: out, Stderr: out, Timeout: timeLeft(ctx)})
	}}
	if len(ips) > 0 && ips[0].IsValid() {
		t.IP = ips[0].String()
	}
	return t
}

// verdict is one check in the context of those before.
type verdict struct {
	outcome probe.Outcome
	message string
	counted bool // towards the threshold
	crossed bool // the threshold was reached just now
}

// probeLoop checks a container over and over and tells what changes.
type probeLoop struct {
	kind  probeKind
	spec  *corev1.Probe
	since time.Time // the container's start
	good  bool      // what was last told
	check func(context.Context) probe.Result
	tell  func(verdict)
}

func (l *probeLoop) run(ctx context.Context) {
	period := time.Duration(max(l.spec.PeriodSeconds, 0)) * time.Second
	if period == 0 {
		period = 10 * time.Second
	}
	wait := time.Until(l.since.Add(time.Duration(l.spec.InitialDelaySeconds) * time.Second))
	if l.kind == liveness || l.good { // nobody waits for these: spread them
		wait = max(wait, 0) + rand.N(period)
	}
	tally := tally{spec: l.spec, period: period, good: l.good || l.kind == liveness, known: l.good || l.kind == liveness,
		counted: time.Now().Add(max(wait, 0))}
	retry := firstRetry
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		r := l.check(ctx)
		if ctx.Err() != nil {
			return
		}
		v := tally.add(time.Now(), r)
		if v.crossed || v.counted {
			l.tell(v)
		}
		next := period
		if !tally.good && l.kind != liveness && retry < period {
			next = retry
			retry *= 2
		}
		timer.Reset(next)
	}
}

// tally counts checks in a row against the thresholds.
type tally struct {
	spec    *corev1.Probe
	period  time.Duration
	good    bool // the present judgement
	known   bool // it was told
	run     int32
	last    probe.Outcome
	counted time.Time // when a failure last counted
}

// add takes one result. Unknown results change nothing.
func (t *tally) add(now time.Time, r probe.Result) verdict {
	v := verdict{outcome: r.Outcome, message: r.Message}
	if r.Outcome == probe.Unknown {
		return v
	}
	if r.Outcome == probe.Failure && !t.good && now.Sub(t.counted) < t.period*9/10 {
		t.last, t.run = probe.Failure, max(t.run, 0)*boolInt(t.last == probe.Failure)
		return v
	}
	if r.Outcome != t.last {
		t.run = 0
	}
	t.last = r.Outcome
	t.run++
	if r.Outcome == probe.Failure {
		v.counted, t.counted = true, now
	}
	threshold := max(t.spec.SuccessThreshold, 1)
	if r.Outcome == probe.Failure {
		if threshold = t.spec.FailureThreshold; threshold <= 0 {
			threshold = 3
		}
	}
	good := r.Outcome == probe.Success
	if t.run >= threshold && (good != t.good || !t.known) {
		t.good, t.known, v.crossed = good, true, true
	}
	return v
}

func boolInt(b bool) int32 {
	if b {
		return 1
	}
	return 0
}
