package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/schemas/api"
)

// registers is the namespace of the objects whose history is taken down.
const registers = "registers"

// sameTime is how many objects clients use at a time. They move on to others together
// with the faults, so that no history becomes too long to be judged.
const sameTime = 4

// deed is what a client did, as one register sees it.
type deed struct {
	verb    string // get, create, put, cas
	value   string // that was written, or seen; "" is no object
	expect  string // the value that a cas needs
	unknown bool   // whether it happened, nobody learnt
	code    command.Code
}

// next returns the value after a step, and whether the step can have happened.
func (s deed) next(now string) (bool, string) {
	holds := map[string]bool{"get": now == s.value, "create": now == "", "put": now != "", "cas": now == s.expect}[s.verb]
	switch {
	case s.verb == "get":
		return holds, now
	case s.unknown && !holds:
		return true, now
	case s.code == 0:
		return holds, s.value
	case s.code == command.Exists:
		return s.verb == "create" && !holds, now
	case s.code == command.NotFound:
		return s.verb == "put" && !holds, now
	case s.code == command.Conflict:
		return s.verb == "cas" && !holds, now
	}
	return false, now
}

var registerModel = porcupine.Model{
	Init: func() any { return "" },
	Step: func(now, in, _ any) (bool, any) {
		ok, after := in.(deed).next(now.(string))
		return ok, after
	},
}

// history is what clients did, by register.
type history struct {
	t     *testing.T
	begun time.Time
	epoch atomic.Int64

	mu        sync.Mutex
	ops       map[string][]porcupine.Operation
	revisions map[string]uint64 // of name=value
	done      int
	unknown   int
}

func newHistory(t *testing.T) *history {
	return &history{t: t, begun: time.Now(), ops: map[string][]porcupine.Operation{}, revisions: map[string]uint64{}}
}

func (h *history) now() int64 { return time.Since(h.begun).Nanoseconds() }

func (h *history) add(id int, name string, call int64, s deed, revision uint64) {
	end := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.unknown {
		h.unknown++
		end = math.MaxInt64 // it may still happen
	}
	h.done++
	h.ops[name] = append(h.ops[name], porcupine.Operation{ClientId: id, Input: s, Call: call, Return: end})
	if s.unknown || s.code != 0 || s.value == "" {
		return
	}
	what := name + "=" + s.value
	if old := h.revisions[what]; old != 0 && old != revision {
		h.t.Errorf("%s has revision %d, and had %d before", what, revision, old)
	}
	h.revisions[what] = revision
}

// check asks porcupine whether each register behaved as one.
func (h *history) check() {
	h.t.Helper()
	begun := time.Now()
	for name, ops := range h.ops {
		switch porcupine.CheckOperationsTimeout(registerModel, ops, 20*time.Second) {
		case porcupine.Illegal:
			h.t.Errorf("the history of %s is not linearizable:", name)
			for _, o := range ops {
				h.t.Logf("  client %d [%d,%d] %+v", o.ClientId, o.Call, o.Return, o.Input)
			}
		case porcupine.Unknown:
			h.t.Errorf("the history of %s, of %d operations, could not be judged in time", name, len(ops))
		}
	}
	h.t.Logf("%d operations on %d registers, %d with an unknown outcome; judged in %s", h.done, len(h.ops), h.unknown, time.Since(begun))
}

// historian is one client, which does one thing after another: it reads by HTTP and
// writes as a server does, for operators write by Git only.
type historian struct {
	id      int
	plane   *controlPlane
	history *history
	peers   *peer.Client
	home    int
	count   int
	known   map[string]version
}

// version is what a client saw last of a register.
type version struct {
	value    string
	revision uint64
}

// work goes on until ctx ends.
func (c *historian) work(ctx context.Context) {
	c.known = map[string]version{}
	for ctx.Err() == nil {
		c.count++
		name := fmt.Sprintf("e%d-%d", c.history.epoch.Load(), rand.IntN(sameTime))
		known := c.known[name]
		value := fmt.Sprintf("c%d-%d", c.id, c.count)
		switch n := rand.IntN(10); {
		case n < 3:
			c.get(ctx, name)
		case n == 3:
			c.list(ctx)
		case known.value == "" && n < 8:
			c.write(ctx, name, deed{verb: "create", value: value}, 0)
		case n < 7 || known.value == "":
			c.write(ctx, name, deed{verb: "put", value: value}, 0)
		default:
			c.write(ctx, name, deed{verb: "cas", value: value, expect: known.value}, known.revision)
		}
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond) // a history of all moments, not a load
	}
}

func (c *historian) saw(call int64, name string, o *corev1.ConfigMap) {
	s := deed{verb: "get"}
	revision := uint64(0)
	if o != nil {
		s.value = o.Data["v"]
		revision, _ = strconv.ParseUint(o.ResourceVersion, 10, 64) // zero is never right
	}
	c.note(call, name, s, revision)
}

func (c *historian) note(call int64, name string, s deed, revision uint64) {
	c.history.add(c.id, name, call, s, revision)
	if !s.unknown && s.code == 0 {
		c.known[name] = version{s.value, revision}
	}
}

// at returns a client of the server that this one likes, until that fails it.
func (c *historian) at() (*client.Client, error) {
	c.home %= len(c.plane.servers)
	return c.plane.client(c.plane.servers[c.home])
}

func (c *historian) get(ctx context.Context, name string) {
	api, err := c.at()
	if err != nil {
		return
	}
	defer api.Close()
	call := c.history.now()
	o, err := client.Get[*corev1.ConfigMap](ctx, api, registers, name)
	switch {
	case err == nil:
		c.saw(call, name, o)
	case apierrors.IsNotFound(err):
		c.saw(call, name, nil)
	default:
		c.home++ // it says nothing
	}
}

// list sees all registers at one moment.
func (c *historian) list(ctx context.Context) {
	api, err := c.at()
	if err != nil {
		return
	}
	defer api.Close()
	epoch, call := c.history.epoch.Load(), c.history.now()
	list, _, err := client.List[*corev1.ConfigMap](ctx, api, client.ListOptions{Namespace: registers})
	if err != nil {
		c.home++
		return
	}
	found := map[string]*corev1.ConfigMap{}
	for _, o := range list {
		found[o.Name] = o
	}
	for i := range sameTime {
		name := fmt.Sprintf("e%d-%d", epoch, i)
		c.saw(call, name, found[name])
	}
}

// write tries a few times to have something written, once.
func (c *historian) write(ctx context.Context, name string, s deed, revision uint64) {
	o := value(name)
	o.Namespace, o.Data = registers, map[string]string{"v": s.value}
	m := api.Mutation{Verb: api.Update, Key: api.KeyOf(o), Object: o, Revision: revision}
	if s.verb == "create" {
		m.Verb = api.Create
	}
	data, err := command.EncodeTxn(&command.Txn{Key: s.value, Time: time.Now().UnixMilli(), Actor: "test", Mutations: []api.Mutation{m}})
	if err != nil {
		c.history.t.Error(err)
		return
	}
	call := c.history.now()
	for range 6 {
		one, cancel := context.WithTimeout(ctx, time.Second)
		r, err := c.peers.Propose(one, c.plane.servers[c.home%len(c.plane.servers)].address, data)
		cancel()
		switch {
		case err == nil && r.Rejected == nil:
			s.unknown = false
			c.note(call, name, s, r.Revision)
			return
		case err == nil && !s.unknown: // else the attempt before may have been another's view of it
			s.code = r.Rejected.Code
			c.note(call, name, s, 0)
			return
		case err == nil:
			c.note(call, name, s, 0)
			return
		case !errors.Is(err, raftstore.ErrNotLeader) || errors.Is(err, raftstore.ErrLeadershipLost):
			s.unknown = true
		}
		c.home++
	}
	if s.unknown { // else nothing was asked of anybody
		c.note(call, name, s, 0)
	}
}

// prepare makes the registers' namespace.
func (c *historian) prepare(ctx context.Context) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: registers}}
	ns.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	data, err := command.EncodeTxn(&command.Txn{Key: registers, Time: time.Now().UnixMilli(), Actor: "test", Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(ns), Object: ns}}})
	if err != nil {
		return err
	}
	for {
		for _, s := range c.plane.servers {
			if r, err := c.peers.Propose(ctx, s.address, data); err == nil {
				return r.Err()
			} else if ctx.Err() != nil {
				return err
			}
		}
	}
}
