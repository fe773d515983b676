package raftsim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/schemas/api"
)

// autopilot checks what leaders make of the configuration, when they write it to their
// disks, by what the network has carried to them:
//   - who has answered within the grace is not removed, unless an operator did it or its
//     disk is gone,
//   - with a new configuration, most of those who vote in it have answered lately,
//   - who was removed is never added again.
type autopilot struct {
	cluster *cluster

	mu      sync.Mutex
	known   map[logPlace]bool    // configurations
	answers map[asked]time.Time  // when a member last answered a server that asked how it is
	tenures map[string]time.Time // since when a server leads
	joined  map[string]time.Time // when members joined
	removed map[string]time.Time // when it was decided that members are removed, at the latest
	excused map[string]bool      // members that may be removed at any time
	disks   map[string]bool      // members whose disks are gone
	halves  map[string]func()    // what happens when members are half removed
}

// logPlace names an entry of the log.
type logPlace struct{ index, term uint64 }

// asked is a server that asks, and a member that answers.
type asked struct{ server, member string }

func newAutopilot(c *cluster) *autopilot {
	return &autopilot{
		cluster: c, known: map[logPlace]bool{}, answers: map[asked]time.Time{}, tenures: map[string]time.Time{}, joined: map[string]time.Time{},
		removed: map[string]time.Time{}, excused: map[string]bool{}, disks: map[string]bool{}, halves: map[string]func(){},
	}
}

// answered notes that a member has told a server how it is.
func (a *autopilot) answered(r *run, member string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answers[asked{r.server.id, member}] = time.Now()
}

// answeredWithin reports whether a member has told a leader how it is within a while.
func (a *autopilot) answeredWithin(lead *run, member string, d time.Duration) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Since(a.answers[asked{lead.server.id, member}]) <= d
}

// calm forgets what was still to happen.
func (a *autopilot) calm() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.halves)
}

// began notes that a server has begun to look after the others.
func (a *autopilot) began(r *run) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tenures[r.server.id] = time.Now()
}

// lost notes that a member is gone with its disk.
func (a *autopilot) lost(member string) {
	a.excuse(member)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.disks[member] = true
}

// excuse lets a member be removed without a reason that is known here.
func (a *autopilot) excuse(member string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.excused[member] = true
}

// told is told what the history says of a member.
func (a *autopilot) told(o *api.Server) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, known := a.removed[o.Name]; known || o.Status.Removed == nil {
		return
	}
	// By a leader whose entry may be seen when the next one leads; in whole seconds.
	decided := o.Status.Removed.Add(time.Second)
	if now := time.Now(); now.Before(decided) {
		decided = now
	}
	a.removed[o.Name] = decided
	if f := a.halves[o.Name]; f != nil {
		a.cluster.work.Go(f)
	}
}

// halfway has something happen when it is written that a member is removed, which is before
// it is.
func (a *autopilot) halfway(member string, f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.halves[member] = f
}

// configure is told that a server writes a configuration to its disk. The first one to
// write it is the leader that has made it.
func (a *autopilot) configure(server string, at logPlace, before, after raft.Configuration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.known[at] {
		return
	}
	a.known[at] = true
	had, has := map[raft.ServerID]raft.Server{}, map[raft.ServerID]raft.Server{}
	for _, s := range before.Servers {
		had[s.ID] = s
	}
	for _, s := range after.Servers {
		has[s.ID] = s
	}
	a.cluster.trace.add("%s makes a configuration of %v", server, after.Servers)
	gone := false // a disk, and nothing can be done about that
	for id := range had {
		if _, stays := has[id]; !stays {
			gone = gone || a.disks[string(id)]
			a.checkRemoval(server, string(id))
		}
	}
	for id := range has {
		if _, was := had[id]; was {
			continue
		}
		a.joined[string(id)] = time.Now()
		if _, removed := a.removed[string(id)]; removed {
			a.cluster.fail("%s adds %s, which was removed", server, id)
		}
	}
	if !gone && !maps.Equal(votersOf(before), votersOf(after)) {
		a.checkQuorum(server, votersOf(after))
	}
}

// checkRemoval must be called with mu held.
func (a *autopilot) checkRemoval(server, member string) {
	if decided, ok := a.removed[member]; a.excused[member] || ok && decided.Before(a.tenures[server]) {
		return // another leader began to
	}
	a.cluster.nemesis.count("removed by the autopilot")
	grace := a.cluster.policy.Grace
	for what, t := range map[string]time.Time{
		"it has answered":      a.answers[asked{server, member}],
		"that leader has led":  a.tenures[server],
		"it has been a member": a.joined[member],
	} {
		if since := time.Since(t); since < grace {
			a.cluster.fail("%s removes %s, and the grace is %v: %s for %v", server, member, grace, what, since)
		}
	}
}

// lately is how long ago the leader has heard of who is alive, at most: it may learn of an
// answer when the last one of the same time has not come, and what it decides may wait for
// its log.
const lately = membership.Alive + 2*breakAfter

// checkQuorum must be called with mu held.
func (a *autopilot) checkQuorum(server string, voters map[string]string) {
	alive := 0
	for id, machine := range voters {
		if machine == server || time.Since(a.answers[asked{server, id}]) <= lately {
			alive++
		}
	}
	if alive <= len(voters)/2 {
		a.cluster.fail("%s makes a configuration with voters of whom %d have answered lately: %v", server, alive, voters)
	}
}

// votersOf returns the members of a configuration that vote, and their machines.
func votersOf(c raft.Configuration) map[string]string {
	voters := map[string]string{}
	for _, s := range c.Servers {
		if s.Suffrage == raft.Voter {
			voters[string(s.ID)] = string(s.Address)
		}
	}
	return voters
}

// buryTime is how long it may take until a dead server is removed, beside the grace.
const buryTime = 15 * time.Second

// bury has a member die for good, when all are well: the others must remove it, and need
// it no more.
func (c *cluster) bury(ctx context.Context) bool {
	var dead *server
	_, members := c.members()
	voters, _ := c.voters()
	for _, i := range c.rnd.Perm(len(c.servers)) {
		if m, ok := members[c.servers[i].member()]; ok && (voters > 2 || !m.Voter) {
			dead = c.servers[i]
			break
		}
	}
	if dead == nil {
		return true
	}
	dead.crash()
	c.trace.add("%s dies for good", dead.id)
	begun := time.Now()
	for c.isMember(ctx, dead) {
		if time.Since(begun) > c.policy.Grace+buryTime {
			c.fail("%s has been dead for %v and is a member still", dead.id, time.Since(begun))
			return false
		}
		c.pause(ctx, 100*time.Millisecond)
	}
	return true
}

// checkMembers waits until the members are those that the state knows, and are there, and
// none of them was removed.
func (c *cluster) checkMembers(ctx context.Context) bool {
	for {
		wrong := "nobody leads"
		if lead, members := c.members(); lead != nil {
			wrong = c.membersWrong(lead, members)
		}
		if wrong == "" {
			return true
		}
		if ctx.Err() != nil {
			c.fail("the members are wrong: %s", wrong)
			return false
		}
		c.pause(ctx, 100*time.Millisecond)
	}
}

func (c *cluster) membersWrong(lead *run, members map[string]raftstore.Member) string {
	view := lead.store.View()
	for id, m := range members {
		there := slices.ContainsFunc(c.servers, func(s *server) bool { return s.member() == id && s.current() != nil })
		switch o, ok := api.Get[*api.Server](view, "", id); {
		case !ok:
			return fmt.Sprintf("%s is a member, and the state does not know it", id)
		case o.Status.Removed != nil:
			return fmt.Sprintf("%s was removed, and is a member", id)
		case !there:
			return fmt.Sprintf("%s is gone, and a member", id)
		case !m.Voter && !o.Spec.NonVoter:
			return fmt.Sprintf("%s wants a vote, and has none", id)
		}
	}
	return ""
}
