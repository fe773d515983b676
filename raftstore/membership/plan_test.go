package membership

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestPlan(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	policy := Policy{Stable: time.Second, Lag: 100, Grace: time.Minute}
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	leader := Observation{ID: "a", Voter: true, WantsVote: true, Leader: true, Joined: ago(time.Hour), Contact: now, Healthy: ago(time.Hour)}
	voter := func(id string, contact time.Duration) Observation {
		return Observation{ID: id, Voter: true, WantsVote: true, Joined: ago(time.Hour), Contact: ago(contact), Healthy: ago(contact)}
	}
	learner := func(id string, healthy time.Duration, behind uint64) Observation {
		return Observation{ID: id, WantsVote: true, Joined: ago(time.Hour), Contact: now, Healthy: ago(healthy), Behind: behind}
	}
	follower := func(id string) Observation { o := voter(id, 0); o.WantsVote = false; return o }
	silent := func(id string) Observation { o := voter(id, 0); o.Healthy = time.Time{}; return o } // since the last look
	removed := func(id string) Observation { o := voter(id, 0); o.Removed = true; return o }
	for name, c := range map[string]struct {
		servers []Observation
		want    string
	}{
		"all are well":                         {[]Observation{leader, voter("b", 0), voter("c", 0)}, ""},
		"one is dead for long":                 {[]Observation{leader, voter("b", 0), voter("c", 2*time.Minute)}, "remove c"},
		"one is dead for a while":              {[]Observation{leader, voter("b", 0), voter("c", 30*time.Second)}, ""},
		"no majority is left to decide":        {[]Observation{leader, voter("b", 2*time.Minute), voter("c", 2*time.Minute)}, ""},
		"of two the other one is dead":         {[]Observation{leader, voter("b", 2*time.Minute)}, ""},
		"of five two are dead: one at a time":  {[]Observation{leader, voter("b", 0), voter("c", 0), voter("d", 2*time.Minute), voter("e", 2*time.Minute)}, "remove d"},
		"one has caught up":                    {[]Observation{leader, learner("b", 2*time.Second, 5)}, "promote b"},
		"one is behind":                        {[]Observation{leader, learner("b", 2*time.Second, 500)}, ""},
		"one has just come":                    {[]Observation{leader, learner("b", 100*time.Millisecond, 0)}, ""},
		"a dead learner":                       {[]Observation{leader, {ID: "b", WantsVote: true, Joined: ago(time.Hour), Contact: ago(2 * time.Minute)}}, "remove b"},
		"one that wants no vote":               {[]Observation{leader, {ID: "b", Contact: now, Healthy: ago(time.Hour), Joined: ago(time.Hour)}}, ""},
		"one that never answered and is young": {[]Observation{leader, {ID: "b", Voter: true, WantsVote: true, Joined: ago(time.Second)}, voter("c", 0)}, ""},
		"a voter that wants no vote":           {[]Observation{leader, voter("b", 0), follower("c")}, "demote c"},
		"of two one wants no vote":             {[]Observation{leader, follower("b")}, "demote b"},
		"another one does not answer":          {[]Observation{leader, silent("b"), follower("c")}, ""},
		"all want no vote":                     {[]Observation{{ID: "a", Voter: true, Leader: true, Contact: now}}, ""},
		"a removal was not completed":          {[]Observation{leader, voter("b", 0), removed("c")}, "remove c"},
		"it would leave no majority":           {[]Observation{leader, silent("b"), removed("c")}, ""},
		"the leader was removed":               {[]Observation{removed("a"), voter("b", 0), voter("c", 0)}, "remove a"},
	} {
		got := ""
		if a, ok := Plan(now, policy, c.servers); ok {
			got = string(a.Verb) + " " + a.ID
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	policy.Grace = 0
	if a, ok := Plan(now, policy, []Observation{leader, voter("b", 0), voter("c", 99*time.Hour)}); ok {
		t.Errorf("without a grace nobody is given up: %+v", a)
	}
}

// TestPlanKeepsTheMajority: whatever is observed, a step never leaves fewer servers
// that answer than a majority of those that remain.
func TestPlanKeepsTheMajority(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	rapid.Check(t, func(t *rapid.T) {
		servers := []Observation{{ID: "0", Voter: true, WantsVote: true, Leader: true, Contact: now}}
		for i := range rapid.IntRange(0, 6).Draw(t, "others") {
			servers = append(servers, Observation{
				ID: string(rune('1' + i)), Voter: rapid.Bool().Draw(t, "voter"), WantsVote: rapid.Bool().Draw(t, "wants"),
				Contact: now.Add(-time.Duration(rapid.IntRange(0, 300).Draw(t, "contact")) * time.Second),
				Healthy: now.Add(-time.Duration(rapid.IntRange(0, 300).Draw(t, "healthy")) * time.Second),
				Behind:  uint64(rapid.IntRange(0, 2000).Draw(t, "behind")),
				Removed: rapid.IntRange(0, 9).Draw(t, "removed") == 0,
			})
		}
		a, ok := Plan(now, Policy{Stable: time.Second, Lag: 1000, Grace: time.Minute}, servers)
		if !ok {
			return
		}
		voters, alive := 0, 0
		for _, o := range servers {
			votes := o.Voter
			if a.ID == o.ID && a.Verb != Remove {
				votes = a.Verb == Promote
			}
			if a.Verb == Remove && o.ID == a.ID {
				if !o.Removed && (o.Leader || now.Sub(o.Contact) < time.Minute) {
					t.Fatalf("a server that is not dead is removed: %+v", o)
				}
				continue
			}
			if votes {
				voters++
				if o.Leader || now.Sub(o.Contact) <= Alive {
					alive++
				}
			}
		}
		if alive <= voters/2 {
			t.Fatalf("%+v leaves %d of %d voters that answer", a, alive, voters)
		}
	})
}
