package apiserver

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// serveLog streams a container's log from its node.
func (s *Server) serveLog(w http.ResponseWriter, r *http.Request, t target) error {
	if r.Method != http.MethodGet {
		return apierrors.NewMethodNotSupported(groupResource(t.kind.Resource), r.Method)
	}
	pod, err := s.runningPod(t)
	if err != nil {
		return err
	}
	opts, err := parseLogOptions(r.URL.Query())
	if err != nil {
		return err
	}
	if opts.Container, err = pickContainer(pod, opts.Container); err != nil {
		return err
	}
	if !s.streams.enter() {
		return apierrors.NewTooManyRequests("too many logs, execs and scrapes of nodes are open", 10)
	}
	defer s.streams.leave()
	out := &flushingWriter{w: w, control: http.NewResponseController(w)}
	err = s.cfg.Nodes.Logs(r.Context(), pod.Spec.NodeName, pod, opts, out)
	switch {
	case err == nil:
		out.begin()
		return nil
	case !out.begun:
		return fmt.Errorf("logs of %s, container %s: %w", t.key(), opts.Container, err)
	case r.Context().Err() == nil:
		s.log.Warn("stream logs", "pod", t.key(), "container", opts.Container, "error", err)
		panic(http.ErrAbortHandler) // an orderly end would look like the end of the log
	}
	return nil
}

// runningPod returns a pod that has a node to ask.
func (s *Server) runningPod(t target) (*corev1.Pod, error) {
	o, ok := s.cfg.Store.View().Get(t.key())
	if !ok {
		return nil, apierrors.NewNotFound(groupResource(t.kind.Resource), t.name)
	}
	pod := o.(*corev1.Pod)
	switch {
	case pod.Spec.NodeName == "":
		return nil, apierrors.NewBadRequest(fmt.Sprintf("pod %s has no node yet: see why with `decree describe pod %s`", pod.Name, pod.Name))
	case s.cfg.Nodes == nil:
		return nil, apierrors.NewServiceUnavailable("this server reaches no nodes")
	}
	return pod, nil
}

func parseLogOptions(q url.Values) (*corev1.PodLogOptions, error) {
	o := &corev1.PodLogOptions{Container: q.Get("container")}
	for name, to := range map[string]*bool{"follow": &o.Follow, "previous": &o.Previous, "timestamps": &o.Timestamps} {
		if v := q.Get(name); v != "" {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return nil, apierrors.NewBadRequest(name + " must be true or false")
			}
			*to = b
		}
	}
	for name, to := range map[string]**int64{"tailLines": &o.TailLines, "sinceSeconds": &o.SinceSeconds, "limitBytes": &o.LimitBytes} {
		if v := q.Get(name); v != "" {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil || n < 0 {
				return nil, apierrors.NewBadRequest(name + " must be a number that is not negative")
			}
			*to = &n
		}
	}
	if v := q.Get("sinceTime"); v != "" {
		at, err := time.Parse(time.RFC3339, v)
		if err != nil {
			return nil, apierrors.NewBadRequest("sinceTime must be a time such as 2026-01-02T15:04:05Z")
		}
		o.SinceTime = &metav1.Time{Time: at}
	}
	if o.SinceTime != nil && o.SinceSeconds != nil {
		return nil, apierrors.NewBadRequest("at most one of sinceTime and sinceSeconds may be given")
	}
	return o, nil
}

// pickContainer returns the container that is meant, which may be left out of pods
// that have only one.
func pickContainer(p *corev1.Pod, name string) (string, error) {
	var names []string
	for _, list := range [][]corev1.Container{p.Spec.Containers, p.Spec.InitContainers} {
		for i := range list {
			names = append(names, list[i].Name)
		}
	}
	if name == "" {
		name = p.Annotations["kubectl.kubernetes.io/default-container"]
	}
	if name == "" && len(p.Spec.Containers) == 1 {
		return p.Spec.Containers[0].Name, nil
	}
	if name == "" {
		return "", apierrors.NewBadRequest(fmt.Sprintf("a container name must be specified for pod %s, choose one of: %v", p.Name, names))
	}
	for _, n := range names {
		if n == name {
			return name, nil
		}
	}
	return "", apierrors.NewBadRequest(fmt.Sprintf("container %s is not valid for pod %s, choose one of: %v", name, p.Name, names))
}

// flushingWriter sends every write at once, with a deadline of its own.
type flushingWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	begun   bool
}

func (f *flushingWriter) begin() {
	if !f.begun {
		f.begun = true
		f.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		f.w.WriteHeader(http.StatusOK)
	}
}

func (f *flushingWriter) Write(p []byte) (int, error) {
	defer deadline(f.control)()
	f.begin()
	n, err := f.w.Write(p)
	if err != nil {
		return n, fmt.Errorf("send log: %w", err)
	}
	if err := f.control.Flush(); err != nil {
		return n, fmt.Errorf("send log: %w", err)
	}
	return n, nil
}

// deadline bounds the writes until the returned function is called. Without that
// call HTTP/2 would reset an idle stream when the time is up, not only a write.
func deadline(c *http.ResponseController) (done func()) {
	_ = c.SetWriteDeadline(time.Now().Add(writeTimeout)) // not supported by test recorders
	return func() { _ = c.SetWriteDeadline(time.Time{}) }
}
