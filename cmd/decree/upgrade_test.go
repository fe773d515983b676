package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/schemas/api"
)

// TestServersUpgrade replaces the binary of one server after the other while clients
// write, by one that stands in for the next version: it has a log format of its own for
// large transactions. None is written until the last server reads it; after that, the
// version before says why it cannot go on.
func TestServersUpgrade(t *testing.T) {
	next := filepath.Join(t.TempDir(), "decree-next")
	if out, err := exec.Command("go", "build", "-tags", "decree_next_format", "-o", next, ".").CombinedOutput(); err != nil {
		t.Fatalf("build the next version: %v\n%s", err, out)
	}
	p := newControlPlane(t, 3)
	peers := p.peers()
	addresses := []string{p.servers[0].address, p.servers[1].address, p.servers[2].address}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	var acknowledged sync.Map
	for w := range 3 {
		clients.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("w%d-%d", w, n)
				if err := create(t.Context(), peers, addresses, name); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				acknowledged.Store(name, true)
				time.Sleep(2 * time.Millisecond) // enough writes for a history, few enough to list it
			}
		})
	}
	for i, s := range p.servers {
		s.binary = next
		p.kill(s)
		p.start(s)
		p.settled(3)
		if i == len(p.servers)-1 {
			break
		}
		p.lead(p.servers[0])
		err := large(t.Context(), peers, p.servers[0].address, fmt.Sprint("early-", i))
		if err == nil || !strings.Contains(err.Error(), "log format 4") || !strings.Contains(err.Error(), "upgrade all servers first") {
			t.Errorf("%d of 3 servers are upgraded, a large transaction: %v", i+1, err)
		}
	}
	p.lead(p.servers[0])
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) { // see ask
		if err = large(t.Context(), peers, p.servers[0].address, "late"); err == nil {
			break
		}
	}
	if err != nil {
		t.Errorf("all servers are upgraded, a large transaction: %v", err)
	}
	acknowledged.Store("late-0", true)
	p.misnote(peers, p.servers[2])

	s := p.servers[2]
	s.binary = ""
	p.kill(s)
	p.start(s)
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		t.Error("a server that was downgraded goes on with a log that it cannot read")
	}
	log, err := os.ReadFile(s.data + ".log")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"log format 4 is not known", "upgrade this server to the version that wrote it", "a downgrade cannot undo"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("a server that was downgraded does not say %q", want)
		}
	}
	s.binary = next
	p.start(s)
	stop()
	clients.Wait()
	p.settled(3)
	p.compare(&acknowledged)
	p.absent("early-")
}

// lead has a server lead.
func (p *controlPlane) lead(s *serverProcess) {
	p.t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) { // see ask
		for _, r := range p.members() {
			if r.Role == "leader" && r.Node == s.name {
				return
			}
		}
		if c, err := p.client(s); err == nil {
			// It may be behind: then it is asked again.
			_, _ = c.Raw(p.t.Context(), http.MethodPost, "/decree/v1/lead", url.Values{"to": {s.name}}, "", nil)
			c.Close()
		}
	}
	p.t.Fatalf("%s does not lead", s.name)
}

// misnote has the cluster note of a server what it may have said before it was upgraded, and
// sees that the server mends that.
func (p *controlPlane) misnote(peers *peer.Client, s *serverProcess) {
	p.t.Helper()
	find := func() membership.Server {
		for _, r := range p.members() {
			if r.Node == s.name {
				return r
			}
		}
		p.t.Fatalf("%s is no member", s.name)
		return membership.Server{}
	}
	ctx, cancel := context.WithTimeout(p.t.Context(), 10*time.Second)
	defer cancel()
	before := find()
	o := &api.Server{Status: api.ServerStatus{Version: "v0.0.1", Format: command.Newest}}
	o.Name = before.ID
	o.GetObjectKind().SetGroupVersionKind(api.GroupVersion.WithKind("Server"))
	data, err := command.EncodeTxn(&command.Txn{
		Key: "misnote", Time: time.Now().UnixMilli(), Actor: "server/" + s.name, Mutations: []api.Mutation{{Verb: api.UpdateStatus, Key: api.KeyOf(o), Object: o}},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	r, err := peers.Propose(ctx, p.servers[0].address, data)
	if err := errors.Join(err, r.Err()); err != nil {
		p.t.Fatal(err)
	}
	now := find()
	for end := time.Now().Add(30 * time.Second); now.Version != before.Version && time.Now().Before(end); time.Sleep(20 * time.Millisecond) { // see ask
		now = find()
	}
	if now.Version != before.Version {
		p.t.Errorf("%s is noted as %+v, and leaves it at that; before: %+v", s.name, now, before)
	}
}

// large writes three objects in one transaction that takes several log entries.
func large(ctx context.Context, peers *peer.Client, address, name string) error {
	t := &command.Txn{Key: name, Time: time.Now().UnixMilli(), Actor: "test"}
	for i := range 3 {
		o := value(fmt.Sprint(name, "-", i))
		o.Data["large"] = strings.Repeat(name, 900_000/len(name))
		t.Mutations = append(t.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	data, err := command.EncodeTxn(t)
	if err != nil {
		return err
	}
	parts, err := command.Split(data, 1<<20)
	if err != nil {
		return err
	}
	for i := range parts {
		parts[i].Time, parts[i].Actor = t.Time, t.Actor
		piece, err := command.EncodeTxn(&parts[i])
		if err != nil {
			return err
		}
		one, cancel := context.WithTimeout(ctx, 10*time.Second)
		r, err := peers.Propose(one, address, piece)
		cancel()
		if err := errors.Join(err, r.Err()); err != nil {
			return err
		}
		if i == len(parts)-1 && r.Missing > 0 {
			return raftstore.ErrLeadershipLost
		}
	}
	return nil
}

// absent makes sure that no server has an object whose name begins like that.
func (p *controlPlane) absent(prefix string) {
	p.t.Helper()
	for _, s := range p.servers {
		for _, o := range p.values(s) {
			if strings.HasPrefix(o.Name, prefix) {
				p.t.Errorf("%s has %s, which was refused", s.name, o.Name)
			}
		}
	}
}
