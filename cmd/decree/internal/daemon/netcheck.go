package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/tunnel"
	"decree.dev/decree/schemas/api"
)

// netcheckStream is the name of the conversation in the tunnels to agents.
const netcheckStream = "netcheck"

const (
	// checkPatience is how long nodes have to say that they take part, and checkTime what a
	// check may take in all: less than clients wait.
	checkPatience = 8 * time.Second
	checkTime     = 27 * time.Second
	// checkWidth is how many nodes take part in a check at a time; the others wait.
	checkWidth = 200
)

// netcheck has all nodes check the network, and reports what came of it. It is for
// administrators; one runs at a time on each server.
func (s *server) netcheck(r *http.Request, who apiserver.Identity) (any, error) {
	select {
	case s.checking <- struct{}{}:
		defer func() { <-s.checking }()
	default:
		return nil, apierrors.NewTooManyRequests("another check of the network runs on this server", 10)
	}
	view := s.store.View()
	settings, err := s.settings()
	if err != nil {
		return nil, err
	}
	plan := netcheck.New(netcheck.Cluster{
		Nodes: slices.Collect(api.List[*corev1.Node](view, "")), Pods: slices.Collect(api.List[*corev1.Pod](view, "")),
		Services: slices.Collect(api.List[*corev1.Service](view, "")), Slices: slices.Collect(api.List[*discoveryv1.EndpointSlice](view, "")),
		Policies: slices.Collect(api.List[*networkingv1.NetworkPolicy](view, "")), Namespaces: slices.Collect(api.List[*corev1.Namespace](view, "")),
		DNS: settings.DNS, Domain: settings.Domain,
	})
	begun := time.Now()
	ctx, cancel := context.WithTimeout(r.Context(), checkTime)
	defer cancel()
	report := runNetcheck(ctx, plan, s.nodes.converse)
	s.cfg.Log.Info("the network was checked", "user", who.Name, "nodes", len(plan.Nodes), "checks", len(report.Checks), "ok", report.OK, "took", time.Since(begun).Round(time.Millisecond))
	return report, nil
}

// runNetcheck carries a plan out: all nodes say where their ends are, then all probe, and only
// then they take away what they made.
func runNetcheck(ctx context.Context, plan *netcheck.Plan, converse converser) *netcheck.Report {
	sessions := make([]checkSession, len(plan.Nodes))
	each := func(f func(s *checkSession)) {
		var g errgroup.Group
		g.SetLimit(checkWidth)
		for i := range sessions {
			g.Go(func() error { f(&sessions[i]); return nil })
		}
		_ = g.Wait() // sessions tell
	}
	for i, name := range plan.Nodes {
		sessions[i].node = name
	}
	each(func(s *checkSession) { s.open(ctx, converse, plan.Begin(s.node)) })
	ends := map[string]netcheck.End{}
	for i := range sessions {
		if s := &sessions[i]; s.with != nil {
			ends[s.node] = s.part.End
		}
	}
	each(func(s *checkSession) { s.probe(plan.Probes(s.node, ends)) })
	each((*checkSession).close)
	parts := map[string]netcheck.Part{}
	for _, s := range sessions {
		parts[s.node] = s.part
	}
	return plan.Report(parts)
}

// converser begins a conversation of a check with a node; it ends with ctx at the latest.
type converser func(ctx context.Context, node string) (io.ReadWriteCloser, error)

// checkSession is the conversation with one node.
type checkSession struct {
	node string
	with io.ReadWriteCloser // nil: the node takes no part
	in   *json.Decoder
	part netcheck.Part
}

// open asks a node to take part, and waits for its end.
func (s *checkSession) open(ctx context.Context, converse converser, begin netcheck.Begin) {
	ctx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(checkPatience, func() { cancel(fmt.Errorf("it did not answer within %s", checkPatience)) })
	with, err := converse(ctx, s.node)
	if err == nil {
		s.in = json.NewDecoder(with)
		if err = json.NewEncoder(with).Encode(begin); err == nil {
			err = s.in.Decode(&s.part.End)
		}
	}
	late.Stop()
	switch {
	case err == nil:
		s.with = &untilClosed{with, cancel}
	case ctx.Err() != nil:
		err = context.Cause(ctx)
		fallthrough
	default:
		cancel(nil)
		s.part.Trouble = checkTrouble(err)
	}
}

// untilClosed gives its context free when it is closed.
type untilClosed struct {
	io.ReadWriteCloser
	cancel context.CancelCauseFunc
}

// Close implements io.Closer.
func (u *untilClosed) Close() error {
	defer u.cancel(nil)
	return u.ReadWriteCloser.Close()
}

// probe has a node try what it is to try.
func (s *checkSession) probe(probes []netcheck.Probe) {
	if s.with == nil {
		return
	}
	s.part.Probes = probes
	err := json.NewEncoder(s.with).Encode(probes)
	if err == nil {
		err = s.in.Decode(&s.part.Outcomes)
	}
	if err != nil {
		s.part.Trouble = checkTrouble(err)
	}
}

// close ends the conversation. That a node could not end it in order is in its log.
func (s *checkSession) close() {
	if s.with != nil {
		_ = s.with.Close()
	}
}

// checkTrouble says why a node took no part.
func checkTrouble(err error) string {
	if refused, ok := errors.AsType[*tunnel.Refused](err); ok && refused.Code == http.StatusNotFound {
		return "its agent is of a version without checks of the network"
	}
	if errors.Is(err, tunnel.ErrNoAgent) || errors.Is(err, errNoAgent) {
		return "its agent is not connected to this server"
	}
	return err.Error()
}

// converse begins a check's conversation with a node, here or elsewhere.
func (n *nodes) converse(ctx context.Context, node string) (io.ReadWriteCloser, error) {
	if r := n.remote(node); r != nil {
		return r.Stream(ctx, node, netcheckStream)
	}
	plane := n.plane.Load()
	if plane == nil {
		return nil, errNoAgent
	}
	ours, theirs := net.Pipe()
	c := &localConversation{Conn: ours, ended: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { ours.Close() })
	go func() {
		defer close(c.ended)
		defer stop()
		defer theirs.Close()
		_ = plane.Check(ctx, theirs) // the report shows what is missing
	}()
	return c, nil
}

// localConversation is one with the node of this process.
type localConversation struct {
	net.Conn
	ended chan struct{}
}

// Close implements io.Closer. It waits until the node has ended its side.
func (c *localConversation) Close() error {
	err := c.Conn.Close()
	<-c.ended
	return err
}
