package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/schemas/api"
)

// Agent runs the pods of one node. Its methods are safe for concurrent use.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	obs     *observer
	report  *reporter
	events  *eventLog
	pulls   chan struct{} // semaphores
	starts  chan struct{}
	poke    chan struct{} // the set of pods may have changed

	mu       sync.Mutex
	running  bool
	draining bool
	workers  map[types.UID]*worker
	retired  map[types.UID]uint64 // by ended worker: older lists still show its sandbox
	group    sync.WaitGroup
	swept    bool // what earlier lives left over was removed
}

// New returns an agent that does nothing before [Agent.Run].
func New(cfg Config) (*Agent, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("agent: register metrics: %w", err)
	}
	a := &Agent{
		cfg: cfg, log: cfg.Logger.With("component", "agent"), metrics: m,
		pulls: make(chan struct{}, cfg.Pulls), starts: make(chan struct{}, cfg.Starts),
		poke: make(chan struct{}, 1), workers: map[types.UID]*worker{}, retired: map[types.UID]uint64{},
	}
	a.obs = newObserver(cfg.Runtime, a.observed)
	a.report = newReporter(cfg.ControlPlane, a.log)
	a.events = newEventLog(cfg.Node, a.report)
	return a, nil
}

// Run takes care of the node's pods until ctx ends, and returns the cause. It
// leaves containers as they are: a later Run adopts them.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.begin(); err != nil {
		return err
	}
	defer a.end()
	inner, cancel := context.WithCancel(ctx)
	var loops sync.WaitGroup
	loops.Go(func() { a.obs.run(inner) })
	loops.Go(func() { a.report.run(inner) })
	loops.Go(func() { a.runNode(inner) })
	err := a.assign(ctx)
	cancel()
	a.group.Wait()
	loops.Wait()
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer stop()
	a.report.drain(last)
	return err
}

func (a *Agent) begin() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running {
		return errors.New("agent: runs already")
	}
	a.running = true
	return nil
}

func (a *Agent) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.running = false
	clear(a.workers)
}

// assign keeps one worker per pod.
func (a *Agent) assign(ctx context.Context) error {
	synced := a.cfg.ControlPlane.Synced()
	for {
		a.assignOnce(ctx)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-a.cfg.ControlPlane.Changed():
		case <-synced:
			synced = nil
		case <-a.poke:
		}
	}
}

// assignOnce hands the pods of the view to workers. Before the runtime has listed
// what it holds nothing is started, and before the view has been loaded nothing is
// taken for removed.
func (a *Agent) assignOnce(ctx context.Context) {
	sandboxes, list := a.obs.all()
	if list == 0 {
		return
	}
	view := a.cfg.ControlPlane.View()
	wanted := map[types.UID]*corev1.Pod{}
	if view != nil {
		for pod := range api.List[*corev1.Pod](view, "") {
			if pod.Spec.NodeName == a.cfg.Node {
				wanted[pod.UID] = pod
			}
		}
	}
	prune := a.isSynced() && view != nil
	a.mu.Lock()
	defer a.mu.Unlock()
	for uid, pod := range wanted {
		a.workerFor(ctx, uid, pod).update(pod, view, false, a.draining)
	}
	for uid, w := range a.workers {
		if wanted[uid] == nil {
			w.update(nil, view, prune, a.draining)
		}
	}
	for uid, n := range a.retired {
		if list >= n {
			delete(a.retired, uid)
		} else {
			delete(sandboxes, uid)
		}
	}
	if prune || a.draining {
		for uid, s := range sandboxes {
			if wanted[uid] == nil && a.workers[uid] == nil {
				a.workerFor(ctx, uid, a.remembered(s)).update(nil, view, prune, a.draining)
			}
		}
	}
	a.metrics.pods.Set(float64(len(a.workers)))
	if prune && !a.swept && !a.draining {
		a.swept = true
		a.group.Go(func() { a.sweep(ctx, wanted, sandboxes) })
	}
}

func (a *Agent) isSynced() bool {
	select {
	case <-a.cfg.ControlPlane.Synced():
		return true
	default:
		return false
	}
}

// workerFor returns the worker of a pod, started if need be. The caller holds mu.
func (a *Agent) workerFor(ctx context.Context, uid types.UID, pod *corev1.Pod) *worker {
	w, ok := a.workers[uid]
	if !ok {
		w = newWorker(a, pod)
		w.minList = a.retired[uid]
		a.workers[uid] = w
		a.group.Go(func() {
			w.run(ctx)
			a.mu.Lock()
			if a.workers[uid] == w {
				delete(a.workers, uid)
				a.retired[uid] = w.minList
			}
			a.mu.Unlock()
			a.wake() // a sandbox may have been found meanwhile
		})
	}
	return w
}

// observed wakes the workers whose sandbox has changed.
func (a *Agent) observed(uids []types.UID) {
	a.mu.Lock()
	unknown := len(uids) == 0
	for _, uid := range uids {
		if w, ok := a.workers[uid]; ok {
			w.wake()
		} else {
			unknown = true
		}
	}
	a.mu.Unlock()
	if unknown {
		a.wake()
	}
}

func (a *Agent) wake() {
	select {
	case a.poke <- struct{}{}:
	default:
	}
}

// remembered is the pod of a sandbox that the view does not have: as written down
// when the sandbox was made, or the little that the runtime knows.
func (a *Agent) remembered(s *Sandbox) *corev1.Pod {
	if pod, err := readPod(a.podDir(s.UID)); err == nil && pod.UID == s.UID {
		return pod
	}
	pod := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{UID: s.UID, Namespace: s.Namespace, Name: s.Name},
		Spec:       corev1.PodSpec{NodeName: a.cfg.Node, HostNetwork: s.NetNS == ""},
	}
	for _, c := range s.Containers {
		if containerSpec(pod, c.Name) == nil {
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: c.Name, Image: c.Image})
		}
	}
	return pod
}

func (a *Agent) podDir(uid types.UID) string { return filepath.Join(a.cfg.Dir, "pods", string(uid)) }

// sweep gives back what belongs to no pod and no sandbox: network resources and
// folders. It runs once, after the first full view.
func (a *Agent) sweep(ctx context.Context, wanted map[types.UID]*corev1.Pod, sandboxes map[types.UID]*Sandbox) {
	ours := func(uid types.UID) bool { return wanted[uid] != nil || sandboxes[uid] != nil }
	attached, err := a.cfg.Network.Attached(ctx)
	if err != nil && ctx.Err() == nil {
		a.log.Warn("list network attachments", "err", err)
	}
	for _, uid := range attached {
		if ours(uid) {
			continue
		}
		if err := a.cfg.Network.Detach(ctx, uid, ""); err != nil && ctx.Err() == nil {
			a.log.Warn("detach a pod that is no more", "pod", uid, "err", err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(a.cfg.Dir, "pods"))
	if err != nil {
		a.log.Warn("list pod folders", "err", err)
	}
	for _, e := range entries {
		uid := types.UID(e.Name())
		if ours(uid) || a.hasWorker(uid) || ctx.Err() != nil {
			continue
		}
		if err := removeDir(a.cfg.Mounter, a.podDir(uid)); err != nil {
			a.log.Warn("remove the folder of a pod that is no more", "pod", uid, "err", err)
		}
	}
}

func (a *Agent) hasWorker(uid types.UID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.workers[uid] != nil
}

// StopAll stops all pods of this node gracefully, each within its grace, and
// removes their sandboxes, networks and folders. The objects stay in the control
// plane. It works during Run, whose pods then stay down, and without it. It returns
// when nothing is left, or with the cause when ctx ends.
func (a *Agent) StopAll(ctx context.Context) error {
	a.mu.Lock()
	a.draining = true
	alone := !a.running
	a.mu.Unlock()
	if alone {
		a.report.log = slog.New(slog.DiscardHandler) // the control plane has ended, as a rule
		inner, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			// The cause of the end is ours.
			_ = a.Run(inner)
		}()
		defer func() {
			cancel()
			<-done
		}()
	}
	a.wake()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if a.empty() {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stop all pods: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// empty reports that the runtime holds nothing of ours any more.
func (a *Agent) empty() bool {
	sandboxes, list := a.obs.all()
	if list == 0 || len(sandboxes) > 0 {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range a.workers {
		if !w.gone.Load() {
			return false
		}
	}
	return true
}
