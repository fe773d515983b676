package cli

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

// clusterStatus is what `decree status` shows.
type clusterStatus struct {
	Server   string         `json:"server"`
	Revision uint64         `json:"revision"`
	Nodes    []nodeStatus   `json:"nodes"` // empty: no agent has ever run
	Sources  []sourceStatus `json:"sources"`
	Pods     map[string]int `json:"pods"` // by phase
	Trouble  []string       `json:"trouble"`
}

type nodeStatus struct {
	Name  string    `json:"name"`
	Ready bool      `json:"ready"`
	Since time.Time `json:"since"`
	Why   string    `json:"why,omitempty"`
}

type sourceStatus struct {
	Name    string    `json:"name"`
	URL     string    `json:"url,omitempty"` // empty: built in
	Applied string    `json:"applied,omitempty"`
	Fetched string    `json:"fetched,omitempty"`
	Objects int64     `json:"objects"`
	Ready   bool      `json:"ready"`
	Reason  string    `json:"reason,omitempty"`
	Message string    `json:"message,omitempty"`
	Since   time.Time `json:"since"`
}

func statusCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "status",
		Short: "Show how the cluster does: nodes, sources, pods, and what is wrong since when and why",
		Example: `  decree status
  decree status -o json | jq .sources`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			s, err := readStatus(c.Context(), cl)
			if err != nil {
				return err
			}
			if output == "json" {
				return e.writeJSON(s)
			}
			return e.printStatus(s)
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "json for everything")
	return c
}

func readStatus(ctx context.Context, c *client.Client) (*clusterStatus, error) {
	s := &clusterStatus{Server: c.Server(), Nodes: []nodeStatus{}, Sources: []sourceStatus{}, Pods: map[string]int{}, Trouble: []string{}}
	nodes, _, err := client.List[*corev1.Node](ctx, c, client.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		st := nodeStatus{Name: n.Name}
		for _, cond := range n.Status.Conditions {
			if cond.Type == corev1.NodeReady {
				st.Ready, st.Since, st.Why = cond.Status == corev1.ConditionTrue, cond.LastTransitionTime.Time, oneLine(cond.Message)
			}
		}
		s.Nodes = append(s.Nodes, st)
	}
	sources, _, err := client.List[*api.Source](ctx, c, client.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, src := range sources {
		s.Sources = append(s.Sources, statusOf(src))
	}
	pods, revision, err := client.List[*corev1.Pod](ctx, c, client.ListOptions{})
	if err != nil {
		return nil, err
	}
	s.Revision = revision
	for _, p := range pods {
		s.Pods[string(phase(p))]++
		if why := podTrouble(p); why != "" {
			s.Trouble = append(s.Trouble, fmt.Sprintf("%s: %s", api.KeyOf(p), why))
		}
	}
	return s, nil
}

func statusOf(src *api.Source) sourceStatus {
	st := sourceStatus{
		Name: src.Name, URL: src.Spec.URL, Applied: src.Status.Applied, Fetched: src.Status.Fetched, Objects: src.Status.Objects, Ready: true,
	}
	if src.Status.AppliedAt != nil {
		st.Since = src.Status.AppliedAt.Time
	}
	if c := meta.FindStatusCondition(src.Status.Conditions, "Ready"); c != nil {
		st.Ready, st.Reason, st.Message, st.Since = c.Status == "True", c.Reason, c.Message, c.LastTransitionTime.Time
	}
	if s := src.Status.Suspended; s != nil {
		st.Ready, st.Reason, st.Since = false, "Suspended", s.At.Time
		st.Message = "by " + s.By
		if s.Reason != "" {
			st.Message += ": " + s.Reason
		}
	}
	return st
}

// phase is Pending until somebody has said anything about the pod.
func phase(p *corev1.Pod) corev1.PodPhase { return cmp.Or(p.Status.Phase, corev1.PodPending) }

// podTrouble says why a pod is not as it should be, "" if it is.
func podTrouble(p *corev1.Pod) string {
	if c := api.PodCondition(p, corev1.PodScheduled); c != nil && c.Status == corev1.ConditionFalse {
		return oneLine(c.Message)
	}
	for _, s := range p.Status.ContainerStatuses {
		if w := s.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return oneLine(s.Name + " is waiting: " + w.Reason + " " + w.Message)
		}
	}
	return ""
}

func (e *env) printStatus(s *clusterStatus) error {
	w := tabwriter.NewWriter(e.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "server\t%s, revision %d\n", s.Server, s.Revision)
	if len(s.Nodes) == 0 {
		fmt.Fprintf(w, "nodes\tnone: no pod can run\n")
	}
	for _, n := range s.Nodes {
		state := "ready"
		if !n.Ready {
			state = "NOT READY: " + n.Why
		}
		fmt.Fprintf(w, "node\t%s %s, for %s\n", n.Name, state, age(n.Since, now()))
	}
	for _, src := range s.Sources {
		fmt.Fprintf(w, "source\t%s %s\n", src.Name, src.text(now()))
	}
	var phases []string
	for _, phase := range sortedKeys(s.Pods) {
		phases = append(phases, fmt.Sprintf("%d %s", s.Pods[phase], phase))
	}
	if len(phases) == 0 {
		phases = []string{"none"}
	}
	fmt.Fprintf(w, "pods\t%s\n", strings.Join(phases, ", "))
	for _, t := range s.Trouble {
		fmt.Fprintf(w, "trouble\t%s\n", t)
	}
	return w.Flush()
}

// text is one line: the commit in force, and what is wrong since when.
func (s sourceStatus) text(now time.Time) string {
	text := "no commit yet"
	if s.Applied != "" {
		text = fmt.Sprintf("%.7s in force, %s", s.Applied, count(int(s.Objects), "object"))
	}
	if !s.Ready {
		text += fmt.Sprintf("; %s: %s", s.Reason, oneLine(s.Message))
	}
	if s.Since.IsZero() {
		return text
	}
	return text + ", for " + age(s.Since, now)
}
