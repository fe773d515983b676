package raftsim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// verb is what a client does.
type verb string

const (
	get    verb = "get"
	list   verb = "list"
	create verb = "create"
	put    verb = "put"
	cas    verb = "compare-and-set"
	remove verb = "delete"
	both   verb = "both" // writes two objects at once
)

// outcome is what a client knows of an operation.
type outcome string

const (
	done     outcome = "done"
	rejected outcome = "rejected"
	unknown  outcome = "unknown"
)

// operation is one operation of a client, from its call to its return.
type operation struct {
	client    int
	verb      verb
	names     []string
	value     string // that a writer writes
	expect    uint64 // revision that a compare-and-set needs
	large     bool   // travels in parts
	call, end int64  // on the common order of all clients

	outcome  outcome
	code     command.Code     // why it was rejected
	revision uint64           // of the write, or of the state that was read
	seen     map[string]entry // what a reader saw, of names or of everything
}

func (o *operation) String() string {
	return fmt.Sprintf("client %d %s %v=%s if %d: %s (code %d) at %d, saw %v [%d,%d]", o.client, o.verb, o.names, o.value, o.expect, o.outcome, o.code, o.revision, o.seen, o.call, o.end)
}

// history is what the clients did.
type history struct {
	mu  sync.Mutex
	ops []*operation
}

func (h *history) add(o *operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, o)
}

func (h *history) count() (all, open int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, o := range h.ops {
		if o.outcome == unknown {
			open++
		}
	}
	return len(h.ops), open
}

// The objects: single ones, and pairs that are only ever written together.
const (
	singles = 4
	pairs   = 2
)

func single(i int) string         { return fmt.Sprint("k", i) }
func pair(i int) (string, string) { return fmt.Sprint("p", i, "a"), fmt.Sprint("p", i, "b") }

// brokenPair names a pair that is not of one transaction, "" if all are.
func brokenPair(objects map[string]entry) string {
	for i := range pairs {
		a, b := pair(i)
		if objects[a].value != objects[b].value {
			return fmt.Sprintf("%s is %v, %s is %v", a, objects[a], b, objects[b])
		}
	}
	return ""
}

// client is one client: one operation after another, on any server.
type client struct {
	cluster *cluster
	id      int
	rnd     *rand.Rand
	count   int
	known   map[string]uint64 // the revision last seen of each object
	home    *run              // the server that it likes
}

func newClient(c *cluster, id int) *client {
	return &client{cluster: c, id: id, rnd: stream(c.options.Seed, fmt.Sprint("client ", id)), known: map[string]uint64{}}
}

// work works until ctx ends.
func (c *client) work(ctx context.Context) {
	for ctx.Err() == nil {
		c.perform(ctx, c.draw())
		c.cluster.pause(ctx, between(c.rnd, 0, 50*time.Millisecond))
	}
}

// draw draws an operation.
func (c *client) draw() *operation {
	c.count++
	name := single(c.rnd.IntN(singles))
	o := &operation{client: c.id, names: []string{name}, value: fmt.Sprintf("c%d-%d", c.id, c.count)}
	switch n := c.rnd.IntN(100); {
	case n < 30:
		o.verb = get
	case n < 38:
		o.verb, o.names = list, nil
	case n < 55:
		o.verb = put
	case n < 73:
		o.verb, o.expect = cas, c.known[name]
		if o.expect == 0 {
			o.verb = get
		}
	case n < 81:
		o.verb = create
	case n < 86:
		o.verb = remove
	default:
		a, b := pair(c.rnd.IntN(pairs))
		o.verb, o.names, o.large = both, []string{a, b}, chance(c.rnd, 0.5)
	}
	if o.verb == get || o.verb == list || o.verb == remove {
		o.value = ""
	}
	return o
}

// perform does an operation, and takes down what came of it.
func (c *client) perform(ctx context.Context, o *operation) {
	o.call = c.cluster.tick.Add(1)
	if o.verb == get || o.verb == list {
		c.read(ctx, o)
	} else {
		c.write(ctx, o)
	}
	o.end = c.cluster.tick.Add(1)
	if o.outcome == unknown && (o.verb == get || o.verb == list) {
		return // it says nothing
	}
	c.cluster.history.add(o)
	c.cluster.trace.add("%v", o)
}

// server chooses a server: mostly the same.
func (c *client) server() *run {
	if c.home == nil || c.home.dead.Load() || chance(c.rnd, 0.2) {
		c.home = c.cluster.any(c.rnd)
	}
	return c.home
}

func (c *client) read(ctx context.Context, o *operation) {
	o.outcome = unknown
	r := c.server()
	if r == nil {
		return
	}
	view, ok := c.cluster.read(ctx, r, between(c.rnd, 100*time.Millisecond, 2*time.Second))
	if !ok {
		c.home = nil
		return
	}
	o.outcome, o.revision, o.seen = done, view.Revision(), contents(view)
	if broken := brokenPair(o.seen); broken != "" {
		c.cluster.fail("client %d: %s shows half a transaction: %s", c.id, r.server.id, broken)
	}
	for name, e := range o.seen {
		c.known[name] = e.revision
	}
}

// write tries until the outcome is known, or it has tried often enough.
func (c *client) write(ctx context.Context, o *operation) {
	txn := command.Txn{Actor: "user/sim", Mutations: o.mutations()}
	if o.large {
		c.cluster.nemesis.count("large transaction")
	}
	keyed := chance(c.rnd, 0.9)
	if keyed {
		txn.Key = "key-" + o.value + "-" + fmt.Sprint(o.call)
	}
	o.outcome = rejected // as long as nothing was proposed
	for range 1 + c.rnd.IntN(5) {
		r := c.server()
		if r == nil {
			c.cluster.pause(ctx, 50*time.Millisecond)
			continue
		}
		switch c.try(ctx, r, o, txn) {
		case done, rejected:
			return
		}
		if o.outcome == unknown && !keyed {
			return // a retry might do it twice
		}
		c.home = nil
	}
}

// try makes one attempt. It returns what the attempt came to; o has what is known of all.
func (c *client) try(ctx context.Context, r *run, o *operation, txn command.Txn) outcome {
	ctx, cancel := c.cluster.within(ctx, r, between(c.rnd, 50*time.Millisecond, 2*time.Second))
	defer cancel()
	txn.Time = r.server.now().UnixMilli()
	result, err := r.store.Propose(ctx, txn)
	c.cluster.trace.add("client %d on %s: %v %v", c.id, r.server.id, result.Revision, err)
	switch {
	case r.dead.Load():
		o.outcome = unknown
		return unknown
	case errors.Is(err, command.ErrFormat), result.Rejected != nil && result.Rejected.Code == command.Busy:
		return unknown // a part was refused, so the whole cannot have happened
	case err != nil && errors.Is(err, raftstore.ErrNotLeader) && !errors.Is(err, raftstore.ErrLeadershipLost):
		return unknown // nothing happened this time
	case err != nil:
		o.outcome = unknown
		return unknown
	case result.Rejected != nil && o.outcome == unknown:
		return rejected // now; but the attempt before may still come
	case result.Rejected != nil:
		o.outcome, o.code = rejected, result.Rejected.Code
		return rejected
	}
	if o.large {
		c.cluster.nemesis.count("large transaction done")
	}
	o.outcome, o.revision = done, result.Revision
	for _, name := range o.names {
		c.known[name] = result.Revision // with both, of the last one only
	}
	return done
}

// mutations are what a writer wants.
func (o *operation) mutations() []api.Mutation {
	var ms []api.Mutation
	for _, name := range o.names {
		content := object(name, o.value)
		if o.large {
			content.Data["more"] = strings.Repeat(o.value+" ", 3*wholeBytes/len(o.value))
		}
		m := api.Mutation{Verb: api.Update, Object: content, Revision: o.expect}
		m.Key = api.KeyOf(m.Object)
		switch o.verb {
		case create:
			m.Verb = api.Create
		case remove:
			m.Verb, m.Object = api.Delete, nil
		}
		ms = append(ms, m)
	}
	return ms
}

func object(name, value string) *corev1.ConfigMap {
	o := &corev1.ConfigMap{}
	o.Kind, o.APIVersion = "ConfigMap", "v1"
	o.Namespace, o.Name = "default", name
	o.Data = map[string]string{"value": value}
	return o
}

// prepare waits for the cluster and makes the objects.
func (c *cluster) prepare() bool {
	if err := c.servers[0].start(); err != nil {
		c.fail("%v", err)
		return false
	}
	r := c.servers[0].current()
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	if err := r.store.WaitReady(ctx); err != nil {
		c.fail("a new cluster: %v", err)
		return false
	}
	if err := c.grow(ctx); err != nil {
		c.fail("a cluster that grows: %v", err)
		return false
	}
	txn := command.Txn{Key: "prepare", Actor: "user/sim"}
	for i := range pairs {
		a, b := pair(i)
		for _, name := range []string{a, b} {
			o := object(name, "first")
			txn.Mutations = append(txn.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
		}
	}
	result, err := r.store.Propose(ctx, txn)
	if err == nil {
		err = result.Err()
	}
	if err != nil {
		c.fail("make the first objects: %v", err)
	}
	return err == nil
}

// about reports whether an operation writes or reads an object by name.
func (o *operation) about(name string) bool { return slices.Contains(o.names, name) }
