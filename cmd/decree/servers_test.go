package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwatch "k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/schemas/api"
)

func value(name string) *corev1.ConfigMap {
	o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Data: map[string]string{"v": name}}
	o.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMap"))
	return o
}

// create writes an object until a server acknowledges it. The key makes sure that it
// happens once however often it is tried; a second time it would be refused.
func create(ctx context.Context, peers *peer.Client, addresses []string, name string) error {
	for i := 0; ctx.Err() == nil; i++ {
		err := tryOnce(ctx, peers, addresses[i%len(addresses)], name)
		var rejected *command.Rejection
		if err == nil || errors.As(err, &rejected) {
			return err
		}
		if i%len(addresses) == 0 {
			time.Sleep(5 * time.Millisecond) // nobody leads: asking faster helps nobody
		}
	}
	return context.Cause(ctx)
}

// tryOnce asks one server to write an object.
func tryOnce(ctx context.Context, peers *peer.Client, address, name string) error {
	o := value(name)
	data, err := command.EncodeTxn(&command.Txn{
		Key: name, Time: time.Now().UnixMilli(), Actor: "test", Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(o), Object: o}},
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	r, err := peers.Propose(ctx, address, data)
	return errors.Join(err, r.Err())
}

// follower checks what one watcher sees: every object once, in order, whatever server
// it is connected to.
type follower struct {
	seen     map[string]bool
	revision uint64
	watches  atomic.Int32 // that were begun
}

// follow lists and watches, changing servers after every error, until ctx ends.
func (f *follower) follow(ctx context.Context, p *controlPlane, at int) error {
	k, _ := api.KindFor(api.ConfigMaps)
	f.seen = map[string]bool{}
	for ctx.Err() == nil {
		s := p.servers[at%len(p.servers)]
		at++
		c, err := p.client(s)
		if err != nil {
			return err
		}
		if err := f.once(ctx, c, k); err != nil {
			c.Close()
			return fmt.Errorf("watching at %s: %w", s.name, err)
		}
		c.Close()
		time.Sleep(20 * time.Millisecond) // who reconnects in a loop helps nobody
	}
	return nil
}

func (f *follower) once(ctx context.Context, c *client.Client, k *api.Kind) error {
	if f.revision == 0 {
		one, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		list, revision, err := client.List[*corev1.ConfigMap](one, c, client.ListOptions{Namespace: "default"})
		if err != nil {
			return nil // another server
		}
		now := map[string]bool{}
		for _, o := range list {
			now[o.Name] = true
		}
		for name := range f.seen {
			if !now[name] {
				return fmt.Errorf("%s was seen, and a list at %d lacks it", name, revision)
			}
		}
		f.seen, f.revision = now, revision
	}
	f.watches.Add(1)
	for e, err := range c.WatchObjects(ctx, k, client.WatchOptions{After: f.revision, ListOptions: client.ListOptions{Namespace: "default"}}) {
		switch {
		case err != nil && strings.Contains(err.Error(), "too old"), err != nil && strings.Contains(err.Error(), "not kept"):
			f.revision = 0
			return nil
		case err != nil:
			return nil // another server
		case e.Revision <= f.revision && e.Type != apiwatch.Bookmark:
			return fmt.Errorf("revision %d after %d", e.Revision, f.revision)
		case e.Type == apiwatch.Added:
			if name := e.Object.GetName(); f.seen[name] {
				return fmt.Errorf("%s came twice, now at %d", name, e.Revision)
			}
			f.seen[e.Object.GetName()] = true
		case e.Type == apiwatch.Deleted, e.Type == apiwatch.Modified:
			return fmt.Errorf("%s %s: nobody did that", e.Type, e.Object.GetName())
		}
		f.revision = max(f.revision, e.Revision)
	}
	return nil
}

// rounds is how many faults TestServersFaults makes.
const rounds = 100

// TestServersFaults makes one fault after the other while clients write and watch:
// kill -9, SIGSTOP, cut links, and the lead that moves. Nothing that was acknowledged
// may be lost, nothing may happen twice, every watcher sees everything once, and what
// clients saw of a few objects is what one copy of them could have shown.
func TestServersFaults(t *testing.T) {
	p := newControlPlane(t, 3)
	peers := p.peers()
	addresses := []string{p.servers[0].address, p.servers[1].address, p.servers[2].address}
	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var acknowledged sync.Map
	var count atomic.Int64
	for w := range 4 {
		clients.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("w%d-%d", w, n)
				err := create(t.Context(), peers, addresses, name)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				acknowledged.Store(name, true)
				count.Add(1)
				time.Sleep(2 * time.Millisecond) // enough writes for a history, few enough to list it
			}
		})
	}
	past := newHistory(t)
	for i := range 5 {
		h := &historian{id: i, plane: p, history: past, peers: peers, home: i}
		if i == 0 {
			if err := h.prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		clients.Go(func() { h.work(ctx) })
	}
	watching, unwatch := context.WithCancel(t.Context())
	followers := make([]*follower, 3)
	var watchers sync.WaitGroup
	for i := range followers {
		followers[i] = &follower{}
		watchers.Go(func() {
			if err := followers[i].follow(watching, p, i); err != nil {
				t.Error(err)
			}
		})
	}
	faults := map[string]int{}
	for round := 0; round < rounds && !t.Failed(); round++ {
		past.epoch.Store(int64(round / 10))
		before := count.Load()
		begun := time.Now()
		kind := p.fault()
		faults[kind]++
		for end := time.Now().Add(30 * time.Second); count.Load() < before+5; time.Sleep(5 * time.Millisecond) { // the writers go on
			if time.Now().After(end) {
				t.Fatalf("round %d: no write is acknowledged any more", round)
			}
		}
		t.Logf("round %d: %s, %s", round, kind, time.Since(begun))
	}
	stop()
	clients.Wait()
	past.check()
	p.settled(3)
	p.compare(&acknowledged)
	time.Sleep(2 * time.Second) // a watcher that is between two servers gets there
	unwatch()
	watchers.Wait()
	for i, f := range followers {
		acknowledged.Range(func(name, _ any) bool {
			if !f.seen[name.(string)] {
				t.Errorf("watcher %d never saw %s", i, name)
			}
			return true
		})
	}
	t.Logf("%d writes acknowledged during %v", count.Load(), faults)
}

// fault makes one, waits a moment, and mends it.
func (p *controlPlane) fault() string {
	s := p.servers[rand.IntN(len(p.servers))]
	moment := time.Duration(50+rand.IntN(700)) * time.Millisecond // the random moment is the test
	switch kind := rand.IntN(4); kind {
	case 0:
		p.kill(s)
		time.Sleep(moment / 4)
		p.start(s)
		p.settled(len(p.servers))
		return "kill"
	case 1:
		_ = s.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(moment)
		_ = s.cmd.Process.Signal(syscall.SIGCONT)
		return "stop"
	case 2:
		p.ip("link", "set", s.link, "down")
		time.Sleep(moment)
		p.ip("link", "set", s.link, "up")
		return "cut"
	default:
		if c, err := p.client(s); err == nil {
			// It may lead already, or be behind: then nothing happens.
			_, _ = c.Raw(context.Background(), http.MethodPost, "/decree/v1/lead", url.Values{"to": {s.name}}, "", nil)
			c.Close()
		}
		return "lead"
	}
}
