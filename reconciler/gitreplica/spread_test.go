package gitreplica_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/reconciler/gitreplica"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// answers are peers that answer as a test says.
type answers struct {
	servers []gitreplica.Peer
	no      string // ids of those that answer no
	silent  string // ids of those that do not answer
	asked   atomic.Int32
}

func (a *answers) Servers() []gitreplica.Peer     { return a.servers }
func (a *answers) Origin(string) gitsource.Origin { panic("not asked for") }
func (a *answers) Pull(ctx context.Context, p gitreplica.Peer, _, _ string) error {
	a.asked.Add(1)
	switch {
	case strings.Contains(a.no, p.ID):
		return errors.New("disk full")
	case strings.Contains(a.silent, p.ID):
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return nil
}

type noStore struct{}

func (noStore) View() api.Reader                                  { panic("not asked for") }
func (noStore) Await(context.Context, uint64, api.Resource) error { panic("not asked for") }

// cast makes servers of letters: capitals vote, the first one is this server.
func cast(letters string) []gitreplica.Peer {
	var list []gitreplica.Peer
	for i, r := range letters {
		list = append(list, gitreplica.Peer{ID: string(r), Self: i == 0, Voter: r < 'a'})
	}
	return list
}

func TestQuorumRules(t *testing.T) {
	tests := []struct {
		servers, no, silent string
		want                string // part of the error, "" for none
	}{
		{"A", "", "", ""},
		{"AB", "", "", ""},
		{"AB", "B", "", "stored on 1 of 2 servers, 2 are needed; nothing has changed: server B: disk full"},
		{"ABC", "C", "", ""},
		{"ABC", "", "C", ""},
		{"ABC", "BC", "", "stored on 1 of 3 servers, 2 are needed"},
		{"ABC", "B", "C", "server C: no answer within 50ms"},
		{"ABCD", "", "D", ""},
		{"ABCD", "CD", "", "stored on 2 of 4 servers, 3 are needed"},
		{"ABCDE", "DE", "", ""},
		{"ABCDE", "CDE", "", "stored on 2 of 5 servers, 3 are needed"},
		{"Ax", "x", "", ""},                                          // who does not vote is not waited for
		{"ABCx", "BC", "", "stored on 1 of 3 servers"},               // and does not count
		{"xABC", "", "C", ""},                                        // nor does this server, if it does not vote
		{"xABC", "BC", "", "stored on 1 of 3 servers, 2 are needed"}, //
		{"", "", "", "this server does not know the others yet"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			a := &answers{servers: cast(tt.servers), no: tt.no, silent: tt.silent}
			r, err := gitreplica.New(gitreplica.Config{Peers: a, Store: noStore{}, Quorum: 50 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			r.Attach(nil)
			err = r.Spread(t.Context(), "shop", strings.Repeat("1", 40))
			r.Close()
			if tt.want == "" && err != nil {
				t.Error(err)
			}
			if tt.want != "" && (!errors.Is(err, gitreplica.ErrNoQuorum) || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if got := int(a.asked.Load()); got != max(0, len(tt.servers)-1) {
				t.Errorf("asked %d servers", got)
			}
			if err := r.Spread(t.Context(), "shop", ""); err == nil {
				t.Error("a server that is stopping took a push")
			}
		})
	}
}

// TestRepositoriesBehindAreShown: a server that nobody helps says what it lacks.
func TestRepositoriesBehindAreShown(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := newCluster(t, 1)
	work := c.work("one")
	hash := c.commit(work, "web", "1")
	c.mustGit(work, "push", "-q", "a", "main")
	c.registry = reg
	b := c.start("b")
	c.servers = append(c.servers, b)
	b.onBody(func(_ string, body io.ReadCloser) io.ReadCloser { return cut{strings.NewReader("oops"), body} })
	b.run()
	await(t, "the trouble is known", func() bool {
		list := b.replica.Behind()
		return len(list) == 1 && list[0].Err != nil
	})
	late := b.replica.Behind()[0]
	if late.Repository != repo || late.Hash != hash || late.Since.IsZero() {
		t.Errorf("behind: %+v", late)
	}
	if got := values(t, reg); got["decree_git_repositories_behind"] != 1 || got["decree_git_repositories_failing"] != 1 || got["decree_git_pulls_total error"] < 1 {
		t.Errorf("metrics: %v", got)
	}
	b.onBody(nil)
	await(t, "it has caught up", func() bool { return len(b.replica.Behind()) == 0 && b.has(hash) })
	if got := values(t, reg); got["decree_git_repositories_behind"] != 0 || got["decree_git_repositories_failing"] != 0 || got["decree_git_pulls_total ok"] < 1 {
		t.Errorf("metrics: %v", got)
	}
}

// values reads gauges and counters by name and label.
func values(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			out[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return out
}
