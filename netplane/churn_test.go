package netplane_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace"
)

// TestChurn: no request is lost, on new connections or on those that are kept, while
// endpoints come, go and come back, the node's agent is another one, and another backend
// balances.
func TestChurn(t *testing.T) {
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			t.Parallel()
			churn(t, n)
		})
	}
}

// pause is the least time from one request of a client to the next; without one, nothing
// else would get on in an emulated machine.
var pause = func() time.Duration {
	if vm.Inside() {
		return 100 * time.Millisecond
	}
	return time.Millisecond
}()

// stream is a client that asks again and again.
type stream struct {
	name string
	// ask sends one request and waits for its answer.
	ask func() error

	mu       sync.Mutex
	answered int
	lost     []error
	// asked is signalled after each request.
	asked chan struct{}
}

func (s *stream) run(ctx context.Context) {
	pace := time.NewTicker(pause)
	defer pace.Stop()
	for ctx.Err() == nil {
		<-pace.C
		err := s.ask()
		s.mu.Lock()
		if err == nil {
			s.answered++
		} else {
			s.lost = append(s.lost, err)
		}
		s.mu.Unlock()
		select {
		case s.asked <- struct{}{}:
		default:
		}
	}
}

func (s *stream) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answered + len(s.lost)
}

// until waits until there have been so many requests.
func (s *stream) until(t *testing.T, target int) {
	t.Helper()
	late := time.NewTimer(time.Minute)
	defer late.Stop()
	for s.count() < target {
		select {
		case <-s.asked:
		case <-late.C:
			t.Fatalf("%s: only %d requests", s.name, s.count())
		}
	}
}

// streams are clients of every kind: from everywhere, on a connection for each request and on
// one that is kept.
func streams(t *testing.T, lab *netplanetest.Lab, to netip.AddrPort) (out []*stream) {
	dial := func(path string) (c net.Conn, err error) {
		err = netspace.Do(path, func() (err error) {
			c, err = net.DialTimeout("tcp", to.String(), 10*time.Second)
			return err
		})
		return c, err
	}
	for _, from := range []netplanetest.Host{netplanetest.Pod1, netplanetest.Outside, netplanetest.Node} {
		path := lab.Path[from]
		out = append(out, &stream{name: fmt.Sprint("new connections from ", from), asked: make(chan struct{}, 1), ask: func() error {
			c, err := dial(path)
			if err != nil {
				return err
			}
			defer c.Close()
			return exchange(c, bufio.NewReader(c), 10*time.Second)
		}})
		kept, err := dial(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { kept.Close() })
		in := bufio.NewReader(kept)
		out = append(out, &stream{name: fmt.Sprint("one connection from ", from), asked: make(chan struct{}, 1), ask: func() error { return exchange(kept, in, 10*time.Second) }})
	}
	return out
}

// exchange says one line and hears it, in a while.
func exchange(c net.Conn, in *bufio.Reader, patience time.Duration) error {
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintln(c, "hello"); err != nil {
		return err
	}
	got, err := in.ReadString('\n')
	if err == nil && got != "hello\n" {
		err = fmt.Errorf("heard %q", got)
	}
	return err
}

func churn(t *testing.T, n netplanetest.Net) {
	lab := netplanetest.NewLab(t)
	for _, p := range netplanetest.Pods {
		lines(t, lab.Path[p], linePort)
	}
	cfg := netplane.Config{DataDir: t.TempDir(), NetNS: lab.Path[netplanetest.Node], Log: slog.New(slog.DiscardHandler)}
	var p *netplane.Plane
	to := netip.AddrPortFrom(n.Service(1), 80)
	want := labDesired(n, to)
	set := func(pods ...netplanetest.Host) error {
		want = labDesired(n, to)
		want.Slices[0].Endpoints = nil
		for _, h := range pods {
			want.Slices[0].Endpoints = append(want.Slices[0].Endpoints, discoveryv1.Endpoint{Addresses: []string{n.Addr[h].String()}})
		}
		return p.Set(t.Context(), want)
	}
	start := func() (err error) {
		if p, err = netplane.New(cfg); err == nil {
			err = p.Set(t.Context(), want)
		}
		return err
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}
	defer func() { p.Close() }()
	all := streams(t, lab, to)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, s := range all {
		wg.Go(func() { s.run(ctx) })
	}
	restart := func() error { return errors.Join(p.Close(), start()) }
	switchTo := func(b netplane.Backend) func() error {
		return func() error {
			cfg.Backend = b // of the next process, too
			return p.Switch(t.Context(), b)
		}
	}
	const pod1, pod2, pod3 = netplanetest.Pod1, netplanetest.Pod2, netplanetest.Pod3
	changes := []struct {
		name string
		do   func() error
	}{
		{"endpoints come", func() error { return set(pod1, pod2, pod3) }},
		{"the first endpoint goes", func() error { return set(pod1, pod3) }},
		{"another agent", restart},
		{"it is back", func() error { return set(pod1, pod2, pod3) }},
		{"all but one go", func() error { return set(pod3) }},
		{"all are others", func() error { return set(pod1, pod2) }},
	}
	rounds := slices.Clone(changes)
	if vm.Inside() { // the other backend, and a restart while one gives way
		for _, b := range []netplane.Backend{netplane.NFTables, netplane.IPVS} {
			rounds = append(append(rounds, struct {
				name string
				do   func() error
			}{"to " + string(b), switchTo(b)}), changes...)
		}
	}
	for _, c := range rounds {
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		var targets []int
		for _, s := range all {
			targets = append(targets, s.count()+4) // the first of which may have begun before
		}
		for i, s := range all {
			s.until(t, targets[i])
			s.mu.Lock()
			if len(s.lost) > 0 {
				t.Errorf("%s: %d requests lost: %s; the first: %v", s.name, len(s.lost), c.name, s.lost[0])
			}
			s.lost = nil
			s.mu.Unlock()
		}
		if t.Failed() {
			return
		}
	}
	total := 0
	for _, s := range all {
		total += s.count()
	}
	t.Logf("%d changes, %d requests, none lost", len(rounds), total)
}
