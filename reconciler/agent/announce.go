package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

func (w *worker) event(s Step, warning bool, reason, format string, args ...any) {
	w.agent.events.pod(w.in.pod, s.Container, s.Init, warning, reason, fmt.Sprintf(format, args...))
}

// announce says what is about to be done.
func (w *worker) announce(s Step) {
	switch s.Action {
	case Terminate, PreStop, Kill:
		stop := w.local.Stops[s.ID]
		first := s.Action == PreStop || (s.Action == Terminate && !stop.PreStopped) || (s.Action == Kill && stop.TermAt.IsZero())
		switch {
		case first:
			w.event(s, false, "Killing", "Stopping container %s: %s", s.Container, s.Reason)
		case s.Action == Kill:
			w.event(s, true, "Killing", "Container %s did not end within its grace, sending SIGKILL", s.Container)
		}
	}
}

// applaud says what was done.
func (w *worker) applaud(r stepResult) {
	s := r.step
	switch s.Action {
	case PullImage:
		if r.took > pullingAfter {
			w.event(s, false, "Pulled", "Successfully pulled image %q in %s", r.image, r.took.Round(time.Millisecond))
		} else {
			w.event(s, false, "Pulled", "Image %q is present", r.image)
		}
	case CreateContainer:
		w.event(s, false, "Created", "Created container %s", s.Container)
	case StartContainer:
		w.event(s, false, "Started", "Started container %s", s.Container)
	}
}

// complain says what went wrong, and that it will be tried again.
func (w *worker) complain(r stepResult) {
	s, text := r.step, oneLine(r.err.Error())
	w.log.Warn("step", "step", s.String(), "err", r.err)
	switch s.Action {
	case PullImage:
		w.event(s, true, "Failed", "Failed to pull image %q: %s", r.image, text)
		if n := w.local.Retry[RetryKey{s.Lane(), s.Action}].Failures; n > 1 {
			w.event(s, false, "BackOff", "Back-off pulling image %q", r.image)
		}
	case CreateSandbox:
		w.event(s, true, "FailedCreatePodSandBox", "Failed to create pod sandbox: %s", text)
	case AttachNetwork, DetachNetwork:
		w.event(s, true, "NetworkNotReady", "Network of the pod, %s: %s", s.Action, text)
	case SyncVolumes:
		w.event(s, true, "FailedMount", "Failed to prepare volumes: %s", text)
	case CreateContainer, StartContainer:
		w.event(s, true, "Failed", "Failed to %s %s: %s", s.Action, s.Container, text)
	case PostStart:
		w.event(s, true, "FailedPostStartHook", "Post-start hook of container %s: %s", s.Container, text)
	case PreStop:
		w.event(s, true, "FailedPreStopHook", "Pre-stop hook of container %s: %s", s.Container, text)
	case Terminate, Kill, RemoveContainer, RemoveSandbox, Cleanup:
		w.event(s, true, "FailedKillPod", "Failed to %s: %s", s, text)
	}
}

// noteExits says how containers ended that were seen running, or that the reported
// status has as running.
func (w *worker) noteExits(old, now *Sandbox) {
	if now == nil {
		return
	}
	before := map[string]ContainerState{}
	if old != nil {
		for _, c := range old.Containers {
			before[c.ID] = c.State
		}
	}
	byName := attemptsByName(w.in.pod, now)
	for _, c := range now.Containers {
		if c.State != Exited {
			continue
		}
		was, seen := before[c.ID]
		if seen && was == Exited {
			continue
		}
		w.readMessage(c)
		st := statusOf(w.in.pod, c.Name)
		ran := st != nil && st.State.Running != nil && st.ContainerID == idPrefix+c.ID
		if (!seen && !ran && w.reported == nil) || w.local.Terminating(w.in.pod) {
			continue
		}
		a := byName[c.Name]
		step := Step{Container: c.Name, Init: c.Init}
		w.event(step, c.ExitCode != 0, "Exited", "%s", exitText(time.Now(), w.in.pod, c, a, w.local))
		if spec := containerSpec(w.in.pod, c.Name); spec != nil && a.current != nil && a.current.ID == c.ID {
			if r := restartOf(time.Now(), w.in.pod, spec, c.Init, a, w.local); r.again && r.delay > 0 {
				w.event(step, true, "BackOff", "Back-off restarting failed container %s", c.Name)
			}
		}
	}
}

// readMessage keeps what a container left as its last words.
func (w *worker) readMessage(c Container) {
	f, err := os.Open(messageFileOf(w.agent.podDir(w.uid), c.Name, c.Attempt))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			w.log.Warn("read termination message", "container", c.Name, "err", err)
		}
		return
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, messageLimit))
	if err != nil {
		return
	}
	if len(data) > 0 {
		w.local.Messages[c.ID] = strings.ToValidUTF8(string(data), "?")
		return
	}
	spec := containerSpec(w.in.pod, c.Name)
	if spec != nil && spec.TerminationMessagePolicy == corev1.TerminationMessageFallbackToLogsOnError && c.ExitCode != 0 {
		w.lastLines(c)
	}
}

// lastLines takes the end of the log for a termination message.
func (w *worker) lastLines(c Container) {
	w.group.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		var buf bytes.Buffer
		err := w.agent.cfg.Runtime.Logs(ctx, w.uid, c.Name, LogOptions{TailLines: 80, LimitBytes: 2048}, &buf)
		if err == nil && buf.Len() > 0 {
			w.post(func() { w.local.Messages[c.ID] = strings.ToValidUTF8(buf.String(), "?") })
		}
	})
}
