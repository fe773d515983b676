package state_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"strconv"
	"testing"
	"testing/iotest"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// drawTxn draws a transaction that is likely to hit something.
func drawTxn(t *rapid.T, s *state.State) command.Txn {
	tx := command.Txn{
		Key:   rapid.SampledFrom([]string{"", "", "k1", "k2", "k3"}).Draw(t, "key"),
		Time:  rapid.Int64Range(0, 1<<41).Draw(t, "time"),
		Actor: "user/x",
	}
	source := ""
	if rapid.IntRange(0, 3).Draw(t, "commit") == 0 {
		source = rapid.SampledFrom([]string{"s0", "s1", "absent"}).Draw(t, "source")
		parent := ""
		if o, ok := api.Get[*api.Source](s, "", source); ok {
			parent = o.Status.Applied
		}
		c := commit(source, parent, "c"+strconv.FormatUint(s.Revision(), 10))
		if rapid.IntRange(0, 9).Draw(t, "refused") == 0 {
			c.Commit.Revision.Spec.Result = api.RevisionRefused
		}
		tx.Commit = c.Commit
	}
	for range rapid.IntRange(0, 4).Draw(t, "n") {
		tx.Mutations = append(tx.Mutations, drawMutation(t, s, source))
	}
	if rapid.Bool().Draw(t, "server") {
		tx.Actor = "server/a" // who may write what else is refused
	}
	return tx
}

// drawParts draws a transaction and cuts it into parts: out of order, some twice, and
// some of them missing.
func drawParts(t *rapid.T, s *state.State) []command.Txn {
	whole := drawTxn(t, s)
	data, err := command.EncodeTxn(&whole)
	if err != nil {
		t.Fatal(err)
	}
	txns, err := command.Split(data, max(1, len(data)/rapid.IntRange(1, 5).Draw(t, "parts")))
	if err != nil {
		t.Fatal(err)
	}
	for i := range txns {
		txns[i].Time = rapid.Int64Range(0, 1<<41).Draw(t, "time")
		txns[i].Actor = "user/x"
	}
	txns = rapid.Permutation(append(txns, txns[0])).Draw(t, "order")
	return txns[rapid.SampledFrom([]int{0, 0, 0, 1}).Draw(t, "lost"):]
}

func drawMutation(t *rapid.T, s *state.State, source string) api.Mutation {
	name := "n" + strconv.Itoa(rapid.IntRange(0, 5).Draw(t, "name"))
	o := drawObject(t, name)
	if source != "" && rapid.IntRange(0, 9).Draw(t, "origin") > 0 {
		from(o, source)
	}
	m := mutation(api.Verb(rapid.IntRange(1, 4).Draw(t, "verb")), o)
	if old, ok := s.Get(m.Key); ok && rapid.IntRange(0, 4).Draw(t, "precondition") == 0 {
		m.UID = old.GetUID()
		m.Revision, _ = strconv.ParseUint(old.GetResourceVersion(), 10, 64)
	}
	if rapid.IntRange(0, 4).Draw(t, "grace") == 0 {
		m.Grace = new(int64)
	}
	return m
}

func drawObject(t *rapid.T, name string) api.Object {
	value := rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, "value")
	switch rapid.IntRange(0, 6).Draw(t, "kind") {
	case 0:
		o := pod(name, rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "node"))
		o.Status.Message = value
		if value != "" {
			yes := true
			o.OwnerReferences = []metav1.OwnerReference{{Kind: "K", Name: value, UID: types.UID("uid-" + value), Controller: &yes}}
		}
		return o
	case 1:
		return service(name, ip(rapid.SampledFrom([]string{"", "", "None", "10.97.0.3", "10.97.0.5", "10.97.0.2"}).Draw(t, "ip")), func(s *corev1.Service) {
			s.Spec.SessionAffinity = corev1.ServiceAffinity(value)
			switch rapid.IntRange(0, 8).Draw(t, "type") {
			case 0:
				s.Spec.Type = corev1.ServiceTypeExternalName
			case 1, 2, 3:
				s.Spec.Type = rapid.SampledFrom([]corev1.ServiceType{"NodePort", "LoadBalancer"}).Draw(t, "node ports")
			}
			drawPorts(t, s)
			drawFamilies(t, s)
		})
	case 2:
		n := node(name)
		n.Labels = map[string]string{"v": value}
		return n
	case 3:
		o := sourceObject("s" + name[1:])
		o.Spec.Path = value
		return o
	case 4:
		o := &api.Server{Spec: api.ServerSpec{Address: value}}
		meta(o, name)
		return o
	}
	return configMap(name, value)
}

func drawPorts(t *rapid.T, s *corev1.Service) {
	for i := range rapid.IntRange(0, 3).Draw(t, "ports") {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{
			Name: "p" + strconv.Itoa(i), Port: rapid.Int32Range(80, 81).Draw(t, "port"), Protocol: rapid.SampledFrom([]corev1.Protocol{"", "TCP", "UDP"}).Draw(t, "protocol"),
			NodePort: rapid.SampledFrom([]int32{0, 0, 0, 30000, 30003}).Draw(t, "number"),
		})
	}
	if rapid.IntRange(0, 3).Draw(t, "local") == 0 {
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		s.Spec.HealthCheckNodePort = rapid.SampledFrom([]int32{0, 0, 30001}).Draw(t, "health")
	}
	if rapid.IntRange(0, 5).Draw(t, "allocate") == 0 {
		s.Spec.AllocateLoadBalancerNodePorts = new(bool)
	}
}

func drawFamilies(t *rapid.T, s *corev1.Service) {
	if rapid.IntRange(0, 2).Draw(t, "policy") == 0 {
		policy := rapid.SampledFrom([]corev1.IPFamilyPolicy{"SingleStack", "PreferDualStack", "RequireDualStack"}).Draw(t, "policy")
		s.Spec.IPFamilyPolicy = &policy
	}
	if rapid.IntRange(0, 3).Draw(t, "families") == 0 {
		s.Spec.IPFamilies = rapid.SampledFrom([][]corev1.IPFamily{{"IPv4"}, {"IPv6"}, {"IPv4", "IPv6"}, {"IPv6", "IPv4"}}).Draw(t, "named")
	}
}

// twoFamilies is a cluster with few addresses of both families and few node ports.
func twoFamilies() *command.Bootstrap {
	b := bootstrap()
	b.Second = command.Ranges{ServiceCIDR: netip.MustParsePrefix("fd00:97::/125"), PodCIDR: netip.MustParsePrefix("fd00:98::/61"), NodeMask: 64}
	b.NodePorts = command.PortRange{First: 30000, Last: 30007}
	return b
}

// TestReduceProperties runs random logs and checks, after every transaction, what
// must hold whatever happens.
func TestReduceProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		birth := rapid.SampledFrom([]func() *command.Bootstrap{bootstrap, twoFamilies}).Draw(t, "birth")
		s, _, _ := state.Reduce(state.New(), 1, command.Txn{Bootstrap: birth()})
		log := []command.Txn{{Bootstrap: birth()}}
		steps := rapid.IntRange(1, 40).Draw(t, "steps")
		half := s
		var waiting []command.Txn // parts
		for i := range steps {
			if rapid.IntRange(0, 7).Draw(t, "split") == 0 {
				waiting = append(waiting, drawParts(t, s)...)
			}
			var tx command.Txn
			if len(waiting) > 0 && rapid.Bool().Draw(t, "part") {
				tx, waiting = waiting[0], waiting[1:]
			} else {
				tx = drawTxn(t, s)
			}
			log = append(log, tx)
			next, r, events := state.Reduce(s, uint64(i+2), tx)
			checkStep(t, s, next, r, events, tx.Part != nil)
			checkTables(t, next)
			s = next
			if i == steps/2 {
				half = s
			}
		}
		checkReplay(t, log, s)
		checkEntries(t, log)
		checkRestored(t, half, s, log[steps/2+2:], uint64(steps/2+3))
	})
}

// checkStep: a rejection changes nothing, revisions have no gap, and events are the
// exact difference. Only the last part of a transaction that is rejected changes
// something: the parts are gone.
func checkStep(t *rapid.T, before, after *state.State, r command.Result, events []state.Event, part bool) {
	if r.Rejected != nil && (!part && before != after || len(events) > 0 || before == after && before.Hash() != after.Hash()) {
		t.Fatalf("rejected, but changed: %v", r.Rejected)
	}
	if r.Missing > 0 && (!part || len(events) > 0) {
		t.Fatalf("%d parts are missing, and there are %d events", r.Missing, len(events))
	}
	if n, size := after.Unfinished(); n > state.MaxUnfinishedSets || size > state.MaxUnfinished || (n == 0) != (size == 0) {
		t.Fatalf("%d transactions with %d bytes are unfinished", n, size)
	}
	if after.Revision() != before.Revision()+uint64(len(events)) {
		t.Fatalf("revision %d after %d and %d events", after.Revision(), before.Revision(), len(events))
	}
	objects := all(before)
	for i, e := range events {
		if e.Revision != before.Revision()+uint64(i)+1 {
			t.Fatalf("event %d has revision %d after %d", i, e.Revision, before.Revision())
		}
		if objects[e.Key] != e.Old {
			t.Fatalf("%s: the event's old object is not the stored one", e.Key)
		}
		delete(objects, e.Key)
		if e.New != nil {
			objects[e.Key] = e.New
			if e.New.GetResourceVersion() != strconv.FormatUint(e.Revision, 10) {
				t.Fatalf("%s has resourceVersion %s at revision %d", e.Key, e.New.GetResourceVersion(), e.Revision)
			}
		}
	}
	now := all(after)
	if len(now) != len(objects) {
		t.Fatalf("%d objects, by the events %d", len(now), len(objects))
	}
	for k, o := range now {
		if objects[k] != o {
			t.Fatalf("%s changed without an event", k)
		}
	}
}

func all(s *state.State) map[api.Key]api.Object {
	m := make(map[api.Key]api.Object)
	for _, k := range api.Kinds() {
		for o := range s.List(k.Resource, "") {
			m[api.KeyOf(o)] = o
		}
	}
	return m
}

// checkTables: no address, range or identity is given twice, and the indexes agree
// with the tables.
func checkTables(t *rapid.T, s *state.State) {
	taken := map[string]api.Key{}
	once := func(what string, k api.Key) {
		if other, twice := taken[what]; twice {
			t.Fatalf("%s belongs to %s and %s", what, other, k)
		}
		taken[what] = k
	}
	counts := map[string]int64{}
	for k, o := range all(s) {
		once("uid "+string(o.GetUID()), k)
		once("revision "+o.GetResourceVersion(), k)
		counts[o.GetAnnotations()[api.AnnotationSource]]++
		switch o := o.(type) {
		case *corev1.Service:
			if o.Spec.Type != corev1.ServiceTypeExternalName && o.Spec.ClusterIP == "" || o.Spec.ClusterIP == "10.97.0.2" {
				t.Fatalf("%s has cluster IP %q", k, o.Spec.ClusterIP)
			}
			checkService(t, s, k, o, once)
		case *corev1.Node:
			if len(o.Spec.PodCIDRs) != len(s.Settings().Families()) {
				t.Fatalf("%s has %v", k, o.Spec.PodCIDRs)
			}
			for _, cidr := range o.Spec.PodCIDRs {
				once("range "+cidr, k)
			}
		}
		if ref := metav1.GetControllerOf(o); ref != nil {
			found := false
			for owned := range s.Owned(ref.UID) {
				found = found || owned == o
			}
			if !found {
				t.Fatalf("%s is not among what %s owns", k, ref.UID)
			}
		}
	}
	for o := range api.List[*api.Source](s, "") {
		if o.Status.Applied != "" && o.Status.AppliedAt == nil {
			t.Fatalf("source %s has half a status", o.Name)
		}
	}
}

// checkService: what a service has is of the families and the range that it says, and
// nobody else's.
func checkService(t *rapid.T, s *state.State, k api.Key, o *corev1.Service, once func(string, api.Key)) {
	if ip := o.Spec.ClusterIP; ip != "" && ip != "None" {
		if len(o.Spec.ClusterIPs) != len(o.Spec.IPFamilies) || o.Spec.ClusterIPs[0] != ip {
			t.Fatalf("%s has %s, %v, %v", k, ip, o.Spec.ClusterIPs, o.Spec.IPFamilies)
		}
		for i, ip := range o.Spec.ClusterIPs {
			once("address "+ip, k)
			if netip.MustParseAddr(ip).Is4() != (o.Spec.IPFamilies[i] == corev1.IPv4Protocol) {
				t.Fatalf("%s has %v, %v", k, o.Spec.ClusterIPs, o.Spec.IPFamilies)
			}
		}
	}
	if o.Spec.Type != corev1.ServiceTypeNodePort && o.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return
	}
	numbers := map[int32]bool{}
	for _, p := range o.Spec.Ports {
		numbers[p.NodePort] = true
		if p.NodePort == 0 && (o.Spec.Type == corev1.ServiceTypeNodePort || o.Spec.AllocateLoadBalancerNodePorts == nil) {
			t.Fatalf("%s has no node port for %s", k, p.Name)
		}
	}
	if health := o.Spec.HealthCheckNodePort; health != 0 && numbers[health] {
		t.Fatalf("%s has %d twice", k, health)
	} else if (health != 0) != (o.Spec.Type == corev1.ServiceTypeLoadBalancer && o.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal) {
		t.Fatalf("%s has the health check port %d", k, health)
	} else if health != 0 {
		numbers[health] = true
	}
	delete(numbers, 0)
	r := s.Settings().NodePortRange()
	for n := range numbers {
		once("port "+strconv.Itoa(int(n)), k)
		if n < int32(r.First) || n > int32(r.Last) {
			t.Fatalf("%s has %d outside %s", k, n, r)
		}
	}
}

// checkReplay: the same log gives the same bytes, also through the encoding.
func checkReplay(t *rapid.T, log []command.Txn, want *state.State) {
	s := state.New()
	for i, tx := range log {
		data, err := command.EncodeTxn(&tx)
		if err != nil {
			t.Fatal(err)
		}
		entry, err := command.EncodeEntry(command.Newest, data)
		if err != nil {
			t.Fatal(err)
		}
		decoded, err := command.DecodeEntry(entry)
		if err != nil {
			t.Fatal(err)
		}
		s, _, _ = state.Reduce(s, uint64(i+1), decoded[0])
	}
	if s.Hash() != want.Hash() {
		t.Fatal("the same log gave another state")
	}
}

// checkEntries: several transactions in one entry do what they do one by one, and
// leave the state before them alone.
func checkEntries(t *rapid.T, log []command.Txn) {
	one, many := state.New(), state.New()
	for index := uint64(1); len(log) > 0; index++ {
		n := rapid.IntRange(1, len(log)).Draw(t, "entry")
		before, hash := many, many.Hash()
		next, results, events := state.ReduceEntry(many, index, log[:n])
		if before.Hash() != hash {
			t.Fatal("ReduceEntry changed its input")
		}
		for i, tx := range log[:n] {
			var want command.Result
			var wanted []state.Event
			one, want, wanted = state.Reduce(one, index, tx)
			if !reflect.DeepEqual(results[i], want) {
				t.Fatalf("transaction %d of %d: %+v, alone %+v", i, n, results[i], want)
			}
			sameEvents(t, events[i], wanted)
		}
		many, log = next, log[n:]
		if one.Hash() != many.Hash() || one.Index() != many.Index() {
			t.Fatalf("%d transactions in one entry lead elsewhere than one by one", n)
		}
		checkTables(t, many)
	}
}

func sameEvents(t *rapid.T, got, want []state.Event) {
	if len(got) != len(want) {
		t.Fatalf("%d events, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i].Revision != want[i].Revision || got[i].Key != want[i].Key || !reflect.DeepEqual(got[i].Old, want[i].Old) || !reflect.DeepEqual(got[i].New, want[i].New) {
			t.Fatalf("event %d is %+v, want %+v", i, got[i], want[i])
		}
	}
}

// checkRestored: a snapshot in the middle changes nothing about what follows.
func checkRestored(t *rapid.T, half, want *state.State, rest []command.Txn, index uint64) {
	s := reread(t, half)
	if s.Hash() != half.Hash() || s.Revision() != half.Revision() || !s.Time().Equal(half.Time()) || s.Index() != half.Index() {
		t.Fatal("a restored snapshot is another state")
	}
	for i, tx := range rest {
		s, _, _ = state.Reduce(s, index+uint64(i), tx)
	}
	if s.Hash() != want.Hash() {
		t.Fatal("after a restored snapshot the same log gave another state")
	}
	checkTables(t, s)
}

type failer interface{ Fatal(...any) }

func reread(t failer, s *state.State) *state.State {
	var buf bytes.Buffer
	if n, err := s.WriteTo(&buf); err != nil || n != int64(buf.Len()) {
		t.Fatal(n, err)
	}
	restored, err := state.Read(&buf)
	if err != nil {
		t.Fatal(err)
	}
	return restored
}

func snapshotBytes(t *testing.T) []byte {
	w := sources(t, "shop")
	w.must(commit("shop", "", "c1", mutation(api.Create, from(service("s"), "shop"))))
	keyed := txn(api.Create, node("n"), pod("p", "n"))
	keyed.Key = "k"
	w.must(keyed)
	w.part(split(t, txn(api.Create, configMap("large", "1")), 3)[1])
	var buf bytes.Buffer
	if _, err := w.s.WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestSnapshotRefusesDamage(t *testing.T) {
	good := snapshotBytes(t)
	if _, err := state.Read(bytes.NewReader(good)); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x40
		if _, err := state.Read(bytes.NewReader(bad)); !errors.Is(err, state.ErrCorrupt) {
			t.Fatalf("byte %d flipped: %v", i, err)
		}
		if _, err := state.Read(bytes.NewReader(good[:i])); !errors.Is(err, state.ErrCorrupt) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
	if _, err := state.Read(bytes.NewReader(append(good, 0))); !errors.Is(err, state.ErrCorrupt) {
		t.Fatalf("a byte too many: %v", err)
	}
	broken := errors.New("disk on fire")
	if _, err := state.Read(io.MultiReader(bytes.NewReader(good[:50]), iotest.ErrReader(broken))); !errors.Is(err, broken) || errors.Is(err, state.ErrCorrupt) {
		t.Fatalf("failing reader: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	s, _, _ := state.Reduce(state.New(), 1, command.Txn{Bootstrap: bootstrap()})
	s, _, _ = state.Reduce(s, 2, txn(api.Create, configMap("a", "1"), service("s")))
	var buf bytes.Buffer
	if _, err := s.WriteTo(&buf); err != nil {
		f.Fatal(err)
	}
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := state.Read(bytes.NewReader(data))
		if err == nil && s.Hash() != reread(t, s).Hash() {
			t.Fatal("not the same after another round")
		}
	})
}

func BenchmarkReduceCreatePod(b *testing.B) {
	s, _, _ := state.Reduce(state.New(), 1, command.Txn{Bootstrap: bootstrap()})
	b.ReportAllocs()
	for i := range b.N {
		tx := txn(api.Create, pod(fmt.Sprint("p", i), ""))
		tx.Key = fmt.Sprint(i)
		next, r, _ := state.Reduce(s, uint64(i), tx)
		if r.Rejected != nil {
			b.Fatal(r.Rejected)
		}
		s = next
	}
}

func BenchmarkReduceBindPod(b *testing.B) {
	s, _, _ := state.Reduce(state.New(), 1, command.Txn{Bootstrap: bootstrap()})
	const pods = 10_000
	for i := range pods {
		s, _, _ = state.Reduce(s, 1, txn(api.Create, pod(fmt.Sprint("p", i), "")))
	}
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		s, _, _ = state.Reduce(s, 1, txn(api.Update, pod(fmt.Sprint("p", i%pods), "n")))
	}
}
