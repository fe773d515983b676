package netplane_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
)

// take takes what a stream has lost so far.
func (s *stream) take() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	lost := s.lost
	s.lost = nil
	return lost
}

// client makes a stream of requests from a host; patience is how long one may take. With kept
// they go over one connection, else over one each.
func (f *fleet) client(from netplanetest.Host, to netip.AddrPort, patience time.Duration, kept bool) *stream {
	dial := func() (c net.Conn, err error) {
		err = netspace.Do(f.lab.Path[from], func() (err error) {
			c, err = net.DialTimeout("tcp", to.String(), patience)
			return err
		})
		return c, err
	}
	s := &stream{name: fmt.Sprintf("%s to %s", from, to), asked: make(chan struct{}, 1)}
	if kept {
		c, err := dial()
		if err != nil {
			f.t.Fatal(err)
		}
		f.t.Cleanup(func() { c.Close() })
		in := bufio.NewReader(c)
		s.name += ", one connection"
		s.ask = func() error { return exchange(c, in, patience) }
		return s
	}
	s.ask = func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return exchange(c, bufio.NewReader(c), patience)
	}
	return s
}

// resolver makes a stream of queries of the cluster's DNS from a host, for the service in front.
func (f *fleet) resolver(from netplanetest.Host) *stream {
	s := &stream{name: fmt.Sprintf("%s asks for a name", from), asked: make(chan struct{}, 1)}
	s.ask = func() error {
		var c net.Conn
		err := netspace.Do(f.lab.Path[from], func() (err error) {
			c, err = net.Dial("udp", netip.AddrPortFrom(dnsIP, render.DNSPort).String())
			return err
		})
		if err != nil {
			return err
		}
		defer c.Close()
		client := dns.Client{Timeout: 10 * time.Second}
		m, _, err := client.ExchangeWithConn(new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA), &dns.Conn{Conn: c})
		if err == nil && len(m.Answer) != 1 {
			err = fmt.Errorf("%s", m)
		}
		return err
	}
	return s
}

// flow runs streams for the time of the test, or until the returned function is called.
func flow(t *testing.T, all ...*stream) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, s := range all {
		wg.Go(func() { s.run(ctx) })
	}
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// goOn waits until all streams have asked some times more: once for what may have begun before.
func goOn(t *testing.T, all ...*stream) {
	t.Helper()
	var targets []int
	for _, s := range all {
		targets = append(targets, s.count()+4)
	}
	for i, s := range all {
		s.until(t, targets[i])
	}
}

// well fails the test if any stream has lost something.
func well(t *testing.T, when string, all ...*stream) {
	t.Helper()
	for _, s := range all {
		if lost := s.take(); len(lost) > 0 {
			t.Errorf("%s: %s lost %d requests, the first: %v", when, s.name, len(lost), lost[0])
		}
	}
}

// TestFleetFaults: on five nodes, with streams of requests from pods, nodes and outside in both
// families.
//   - Who has to send the first packet of a connection again gets through.
//   - While endpoints come and go and agents are killed in the middle of that and started
//     again, nothing is lost.
//   - A link that is cut costs what goes over it, while it is cut, and nothing else.
//   - A node that dies costs requests to its endpoints until they are removed, none after that.
func TestFleetFaults(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 5)
	f.load(200)
	testSentAgain(t, f)
	testPlanned(t, f)
	testCut(t, f)
	testDeath(t, f)
}

// load adds services, so that an update takes its time.
func (f *fleet) load(services int) {
	for i := range services {
		f.service(fmt.Sprint("other", i), 100+i, 80, linePort, nil, "pod1")
	}
}

func (f *fleet) front(pods ...netplanetest.Host) {
	f.service("web", 1, 80, linePort, func(s *corev1.Service) {
		s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, 30080
	}, pods...)
}

// callers are clients of the service in front, from everywhere.
func (f *fleet) callers(patience time.Duration, kept bool) (out []*stream) {
	for _, n := range f.nets {
		for _, from := range []netplanetest.Host{"pod1", f.podHosts()[len(f.nodes)-1], "n1", outside} {
			to := netip.AddrPortFrom(n.Service(1), 80)
			if from == outside {
				to = netip.AddrPortFrom(n.Addr["n3"], 30080)
			}
			out = append(out, f.client(from, to, patience, kept))
		}
	}
	return out
}

func testSentAgain(t *testing.T, f *fleet) {
	pods := f.podHosts()
	for _, pod := range []netplanetest.Host{pods[0], pods[len(pods)-1]} {
		f.front(pod)
		f.publish()
		callers := f.callers(20*time.Second, false)
		d := netspacetest.Deafen(t, f.lab.Path[pod])
		errs := make([]error, len(callers))
		var all sync.WaitGroup
		for i, s := range callers {
			all.Go(func() { errs[i] = s.ask() })
		}
		d.Missed(len(callers))
		d.End()
		all.Wait()
		for i, err := range errs {
			if err != nil {
				t.Errorf("%s, served by %s, which did not hear the first packet: %v", callers[i].name, pod, err)
			}
		}
	}
}

func testPlanned(t *testing.T, f *fleet) {
	pods := f.podHosts()
	f.front(pods...)
	f.publish()
	all := append(f.callers(10*time.Second, false), f.callers(10*time.Second, true)...)
	all = append(all, f.resolver("pod1"), f.resolver(pods[len(pods)-1]))
	stop := flow(t, all...)
	goOn(t, all...)
	rounds := 0
	victims := slices.Clone(f.nodes)
	if !vm.Inside() {
		victims = append(victims, f.nodes...)
	}
	for _, victim := range victims {
		rounds++
		gone := rounds % len(pods) // one leaves, and the one before is back
		f.front(append(slices.Clone(pods[:gone]), pods[gone+1:]...)...)
		if err := victim.in.Encode(order{Set: f.desired(victim)}); err != nil {
			t.Fatal(err)
		}
		killed := time.After(rand.N(updating)) // somewhere in that
		f.publish(victim)
		<-killed
		victim.kill()
		goOn(t, all...)
		victim.start()
		f.publish()
		goOn(t, all...)
		well(t, fmt.Sprintf("round %d, %s killed in an update", rounds, victim.object.Name), all...)
	}
	stop()
	total := 0
	for _, s := range all {
		total += s.count()
	}
	t.Logf("%d agents killed in updates, %d requests of %d clients, none lost", rounds, total, len(all))
}

// patience is how long requests wait that are expected to be lost; those that are not wait three
// times as long, which a packet that is lost still shows in. updating is about how long an agent
// needs for an update. An emulated machine is slow to answer.
var patience, updating = func() (p, u time.Duration) {
	if vm.Inside() {
		return 2 * time.Second, 500 * time.Millisecond
	}
	return 300 * time.Millisecond, 15 * time.Millisecond
}()

func testCut(t *testing.T, f *fleet) {
	victim := f.nodes[1]
	var through, after, beside []*stream
	for _, n := range f.nets {
		for _, from := range slices.Compact([]netplanetest.Host{"pod1", "pod2", "pod3", f.podHosts()[len(f.nodes)-1]}) {
			for _, to := range f.podHosts() {
				at := netip.AddrPortFrom(n.Addr[to], linePort)
				s := f.client(from, at, 3*patience, false)
				if from != to && (from == "pod2" || to == "pod2") {
					through, after = append(through, f.client(from, at, patience, false)), append(after, s)
				} else {
					beside = append(beside, s)
				}
			}
		}
	}
	stop := flow(t, slices.Concat(through, beside)...)
	back(t, 20*time.Second, through...)
	goOn(t, beside...)
	begun := time.Now()
	f.cable(victim, false)
	for _, s := range through {
		s.take()
	}
	goOnOnce(t, through...)
	goOn(t, beside...)
	for _, s := range through {
		if len(s.take()) == 0 {
			t.Errorf("%s goes on over a link that is cut", s.name)
		}
	}
	f.cable(victim, true)
	cut := time.Since(begun)
	back(t, 20*time.Second, through...) // neighbours that did not answer are asked again after a second
	again := time.Since(begun) - cut
	goOn(t, beside...)
	stop()
	well(t, "beside the link that was cut", beside...)
	stop = flow(t, after...)
	goOn(t, after...)
	stop()
	well(t, "with the link again", after...)
	t.Logf("a link was cut for %s: %d clients lost requests, %d others none; all went on %s after it was back", cut.Round(time.Millisecond), len(through), len(beside), again.Round(time.Millisecond))
}

// back waits until all streams have been answered once more.
func back(t *testing.T, patience time.Duration, all ...*stream) {
	t.Helper()
	end := time.NewTimer(patience)
	defer end.Stop()
	for _, s := range all {
		for before := s.won(); s.won() == before; {
			select {
			case <-s.asked:
			case <-end.C:
				t.Fatalf("%s is not answered again", s.name)
			}
		}
	}
}

// won is how many requests were answered.
func (s *stream) won() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answered
}

func testDeath(t *testing.T, f *fleet) {
	pods, victim := f.podHosts(), f.nodes[len(f.nodes)-2]
	f.front(pods...)
	f.publish()
	rounds := 10
	if vm.Inside() {
		rounds = 3
	}
	all := f.callers(patience, false)
	stop := flow(t, all...)
	back(t, 20*time.Second, all...)
	for _, s := range all {
		s.take() // of those that had to wait in the beginning
	}
	begun := time.Now()
	victim.kill()
	f.cable(victim, false)
	goOn(t, all...)
	unanswered := f.unanswered()
	// What the control plane makes of it.
	victim.object.Status.Conditions[0].Status = corev1.ConditionUnknown
	f.front(slices.DeleteFunc(slices.Clone(pods), func(h netplanetest.Host) bool { return f.pods[h].Spec.NodeName == victim.object.Name })...)
	f.publish(victim)
	removed := time.Since(begun)
	goOnOnce(t, all...) // what was under way ends
	lost := 0
	for _, s := range all {
		lost += len(s.take())
	}
	stop()
	for a, port := range unanswered {
		if err := a.fromPort(f, port); err != nil {
			t.Errorf("%s from port %d, which went to the node that died before: %v", a, port, err)
		}
	}
	all = f.callers(3*patience, false)
	stop = flow(t, all...)
	for range rounds {
		goOn(t, all...)
	}
	stop()
	well(t, "once its endpoints are removed", all...)
	asked := 0
	for _, s := range all {
		asked += s.count()
	}
	if lost == 0 {
		t.Error("a node died, and nobody noticed")
	}
	t.Logf("a node died and was removed after %s: %d requests lost until then, none of %d after", removed.Round(time.Millisecond), lost, asked)
}

// unanswered finds, for clients of each family, a port from which they ask the dead node.
func (f *fleet) unanswered() map[asked]int {
	f.t.Helper()
	out := map[asked]int{}
	for _, n := range f.nets {
		a := asked{"pod1", netip.AddrPortFrom(n.Service(1), 80)}
		for port := 20000; out[a] == 0; port++ {
			if a.fromPort(f, port) != nil {
				out[a] = port
			}
			if port == 20200 {
				f.t.Fatalf("%s: a node died, and everything is answered", a)
			}
		}
	}
	return out
}

// fromPort connects from a port of the client.
func (a asked) fromPort(f *fleet, port int) error {
	return netspace.Do(f.lab.Path[a.from], func() error {
		c, err := (&net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{Port: port}}).Dial("tcp", a.to.String())
		if err == nil {
			_ = c.(*net.TCPConn).SetLinger(0) // so that the port is free again
			c.Close()
		}
		return err
	})
}

// goOnOnce waits until the requests under way have ended.
func goOnOnce(t *testing.T, all ...*stream) {
	t.Helper()
	for _, s := range all {
		s.until(t, s.count()+2)
	}
}
