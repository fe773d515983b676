package agent

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Logs copies the log of a pod's container to w. container may be "" when the pod
// has one only. It returns an error matching ErrNotFound for a pod or container
// that this node does not have.
func (a *Agent) Logs(ctx context.Context, namespace, pod, container string, opts LogOptions, w io.Writer) error {
	p, _, err := a.find(namespace, pod)
	if err != nil {
		return err
	}
	if container, err = chooseContainer(p, container); err != nil {
		return err
	}
	if err := a.cfg.Runtime.Logs(ctx, p.UID, container, opts, w); err != nil {
		return fmt.Errorf("logs of container %s in pod %s/%s: %w", container, namespace, pod, err)
	}
	return nil
}

// Exec runs a command in a running container of a pod and returns its exit code.
func (a *Agent) Exec(ctx context.Context, namespace, pod, container string, cfg ExecConfig) (int, error) {
	p, s, err := a.find(namespace, pod)
	if err != nil {
		return 0, err
	}
	if container, err = chooseContainer(p, container); err != nil {
		return 0, err
	}
	id, ok := runningContainer(s, container)
	if !ok {
		// The newest list may be older than the start that the client has seen reported.
		if id, ok, err = a.lookAgain(ctx, p.UID, container); err != nil {
			return 0, fmt.Errorf("exec in container %s of pod %s/%s: %w", container, namespace, pod, err)
		}
	}
	if !ok {
		return 0, fmt.Errorf("exec in container %s of pod %s/%s: the container does not run: %w", container, namespace, pod, ErrNotFound)
	}
	code, err := a.cfg.Runtime.Exec(ctx, id, cfg)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s of pod %s/%s: %w", container, namespace, pod, err)
	}
	return code, nil
}

// runningContainer finds the running attempt of a container in a sandbox, which may
// be nil.
func runningContainer(s *Sandbox, name string) (id string, ok bool) {
	if s == nil {
		return "", false
	}
	for _, c := range s.Containers {
		if c.Name == name && c.State == Running {
			return c.ID, true
		}
	}
	return "", false
}

// lookAgain asks the runtime itself for a running container.
func (a *Agent) lookAgain(ctx context.Context, pod types.UID, container string) (id string, ok bool, err error) {
	list, err := a.cfg.Runtime.List(ctx)
	if err != nil {
		return "", false, err
	}
	for i := range list {
		if list[i].UID == pod {
			id, ok = runningContainer(&list[i], container)
		}
	}
	return id, ok, nil
}

// find returns a pod of this node and its sandbox, which may be nil. Of two pods
// with the same name the one that is not being removed counts.
func (a *Agent) find(namespace, name string) (*corev1.Pod, *Sandbox, error) {
	a.mu.Lock()
	var found *worker
	for _, w := range a.workers {
		pod := w.podNow()
		if pod.Namespace != namespace || pod.Name != name {
			continue
		}
		if found == nil || w.podNow().CreationTimestamp.After(found.podNow().CreationTimestamp.Time) {
			found = w
		}
	}
	a.mu.Unlock()
	if found == nil {
		return nil, nil, fmt.Errorf("pod %s/%s on node %s: %w", namespace, name, a.cfg.Node, ErrNotFound)
	}
	s, _ := a.obs.get(types.UID(found.uid))
	return found.podNow(), s, nil
}

func (w *worker) podNow() *corev1.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next.pod
}

const annotationDefaultContainer = "kubectl.kubernetes.io/default-container"

// chooseContainer checks a container's name, or picks the only or default one.
func chooseContainer(pod *corev1.Pod, name string) (string, error) {
	var names []string
	for _, c := range allContainers(pod) {
		names = append(names, c.Name)
	}
	if name == "" {
		if d := pod.Annotations[annotationDefaultContainer]; d != "" {
			name = d
		} else if len(pod.Spec.Containers) > 0 {
			name = pod.Spec.Containers[0].Name
		}
	}
	if !slices.Contains(names, name) {
		return "", fmt.Errorf("pod %s/%s has no container %q, it has %s: %w", pod.Namespace, pod.Name, name, strings.Join(names, ", "), ErrNotFound)
	}
	return name, nil
}
