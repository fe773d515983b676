package command_test

import (
	"bytes"
	"errors"
	"flag"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// update writes testdata of a format that is not released yet.
var update = flag.Bool("update", false, "write testdata/entry-v3")

func server() *api.Server {
	s := &api.Server{ObjectMeta: metav1.ObjectMeta{Name: "one"}, Spec: api.ServerSpec{Node: "n1", Address: "10.0.0.1:7443"}}
	s.SetGroupVersionKind(api.GroupVersion.WithKind("Server"))
	return s
}

func create(objects ...api.Object) command.Txn {
	tx := command.Txn{Actor: "system"}
	for _, o := range objects {
		tx.Mutations = append(tx.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	return tx
}

func encoded(t testing.TB, tx command.Txn) []byte {
	t.Helper()
	b, err := command.EncodeTxn(&tx)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parts(t testing.TB, tx command.Txn, size int) []command.Txn {
	t.Helper()
	txns, err := command.Split(encoded(t, tx), size)
	if err != nil {
		t.Fatal(err)
	}
	return txns
}

// needs2 is one transaction for everything that format 1 does not know.
func needs2(t testing.TB) map[string]command.Txn {
	out := map[string]command.Txn{
		"part":           parts(t, create(pod()), 100)[1],
		"server":         create(pod(), server()),
		"delete a token": {Mutations: []api.Mutation{{Verb: api.Delete, Key: api.Key{Resource: api.JoinTokens, Name: "x"}}}},
		"key and object": {Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(pod()), Object: server()}}},
		"restored": {Bootstrap: &command.Bootstrap{ClusterID: "c", ServiceCIDR: netip.MustParsePrefix("10.0.0.0/16"),
			PodCIDR: netip.MustParsePrefix("10.1.0.0/16"), NodeMask: 24, DNS: netip.MustParseAddr("10.0.0.1"), Restored: &command.Restored{ClusterID: "old", Revision: 3, Time: 4}}},
	}
	for _, r := range []api.Resource{api.Servers, api.Authorities, api.JoinTokens, api.Machines} {
		kind, _ := api.KindFor(r)
		out["kind "+kind.Kind] = create(kind.New())
	}
	return out
}

func service(edit func(*corev1.ServiceSpec)) *corev1.Service {
	svc := &corev1.Service{}
	svc.Kind, svc.APIVersion, svc.Namespace, svc.Name = "Service", "v1", "default", "web"
	edit(&svc.Spec)
	return svc
}

// needs3 is one transaction for everything that format 2 does not know.
func needs3(t testing.TB) map[string]command.Txn {
	born := func(edit func(*command.Bootstrap)) command.Txn {
		b := &command.Bootstrap{ClusterID: "c", ServiceCIDR: netip.MustParsePrefix("10.0.0.0/16"),
			PodCIDR: netip.MustParsePrefix("10.1.0.0/16"), NodeMask: 24, DNS: netip.MustParseAddr("10.0.0.1")}
		edit(b)
		return command.Txn{Bootstrap: b}
	}
	second := command.Ranges{ServiceCIDR: netip.MustParsePrefix("fd00:1::/108"), PodCIDR: netip.MustParsePrefix("fd00:2::/48"), NodeMask: 64}
	require := corev1.IPFamilyPolicyRequireDualStack
	nodePort := func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeNodePort }
	pool, _ := api.KindFor(api.AddressPools)
	return map[string]command.Txn{
		"kind AddressPool":     create(pool.New()),
		"delete a pool":        {Mutations: []api.Mutation{{Verb: api.Delete, Key: api.Key{Resource: api.AddressPools, Name: "x"}}}},
		"node port":            create(pod(), service(nodePort)),
		"node port and server": create(server(), service(nodePort)),
		"node port as key":     {Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(pod()), Object: service(nodePort)}}},
		"load balancer":        create(service(func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeLoadBalancer })),
		"dual stack":           create(service(func(s *corev1.ServiceSpec) { s.IPFamilyPolicy = &require })),
		"families":             create(service(func(s *corev1.ServiceSpec) { s.IPFamilies = []corev1.IPFamily{"IPv4", "IPv6"} })),
		"a chosen family":      create(service(func(s *corev1.ServiceSpec) { s.IPFamilies = []corev1.IPFamily{"IPv4"} })),
		"another family":       create(service(func(s *corev1.ServiceSpec) { s.IPFamilies, s.ClusterIP = []corev1.IPFamily{"IPv6"}, "10.0.0.7" })),
		"addresses":            create(service(func(s *corev1.ServiceSpec) { s.ClusterIPs = []string{"10.0.0.7", "fd00:1::7"} })),
		"second family":        born(func(b *command.Bootstrap) { b.Second = second }),
		"range of node ports":  born(func(b *command.Bootstrap) { b.NodePorts = command.PortRange{First: 20000, Last: 20100} }),
		"restored, two families": born(func(b *command.Bootstrap) {
			b.Second, b.Restored = second, &command.Restored{ClusterID: "old", Revision: 3}
		}),
		"parts": parts(t, create(service(nodePort)), 50)[0],
	}
}

func TestFormatIsWrittenWhenAllReadIt(t *testing.T) {
	single := corev1.IPFamilyPolicySingleStack
	one := create(pod(), service(func(s *corev1.ServiceSpec) {}), // also with what the state machine writes
		service(func(s *corev1.ServiceSpec) {
			s.ClusterIP, s.ClusterIPs, s.IPFamilies, s.IPFamilyPolicy = "10.0.0.7", []string{"10.0.0.7"}, []corev1.IPFamily{"IPv4"}, &single
		}),
		service(func(s *corev1.ServiceSpec) {
			s.ClusterIP, s.IPFamilies, s.IPFamilyPolicy = "None", []corev1.IPFamily{"IPv4"}, &single
		}))
	if f := command.FormatOf(&one); f != 1 {
		t.Fatalf("a pod and services need format %d", f)
	}
	for need, txns := range map[int]map[string]command.Txn{2: needs2(t), 3: needs3(t)} {
		for name, tx := range txns {
			t.Run(name, func(t *testing.T) { isWrittenAs(t, need, one, tx) })
		}
	}
	entry, err := command.EncodeEntry(command.Newest, encoded(t, one))
	if err != nil || entry[0] != 1 {
		t.Fatalf("what needs format 1 was written as %d, %v", entry[0], err)
	}
	if _, err := (command.Decoder{Max: 1}).Entry(entry); err != nil {
		t.Fatal(err)
	}
}

// isWrittenAs checks that tx, which needs a format, is refused, written and read as such.
func isWrittenAs(t *testing.T, need int, one, tx command.Txn) {
	if f := command.FormatOf(&tx); f != need {
		t.Fatalf("needs format %d", f)
	}
	_, err := command.EncodeEntry(need-1, encoded(t, one), encoded(t, tx))
	var format *command.FormatError
	if !errors.Is(err, command.ErrFormat) || !errors.As(err, &format) || format.Need != need || format.Have != need-1 || !strings.Contains(err.Error(), "upgrade all servers first") {
		t.Fatalf("got %v", err)
	}
	entry, err := command.EncodeEntry(need, encoded(t, one), encoded(t, tx))
	if err != nil || entry[0] != byte(need) {
		t.Fatalf("format %d, %v", entry[0], err)
	}
	got, err := command.DecodeEntry(entry)
	if err != nil || !apiequality.Semantic.DeepEqual(plain(got[1]), plain(tx)) || !reflect.DeepEqual(got[1].Bootstrap, tx.Bootstrap) {
		t.Fatalf("got %+v, %v", got, err)
	}
	var version *command.VersionError
	if _, err := (command.Decoder{Max: need - 1}).Entry(entry); !errors.As(err, &version) || version.Got != need || version.Max != need-1 {
		t.Fatalf("the version before: %v", err)
	}
	// An encoder that is wrong about the format is found out by everybody.
	for wrong := byte(1); wrong < byte(need); wrong++ {
		entry[0] = wrong
		for _, d := range []command.Decoder{{}, {Max: int(wrong)}} {
			if _, err := d.Entry(entry); !errors.Is(err, command.ErrMalformed) && !errors.As(err, &version) {
				t.Fatalf("as format %d: %v", wrong, err)
			}
		}
	}
}

// TestHiddenKind: a transaction that does not say that it has new kinds is refused in
// every format, not only where it would be written too early.
func TestHiddenKind(t *testing.T) {
	data := encoded(t, create(server()))
	flags := len("\x00\x00\x06system\x00")
	if data[flags] != 16 {
		t.Fatalf("the flags are not at %d of %x", flags, data)
	}
	data[flags] = 0
	entry, err := command.EncodeEntry(command.Newest, data)
	if err != nil {
		t.Fatal(err)
	}
	for format := byte(command.Oldest); format <= command.Newest; format++ {
		entry[0] = format
		if _, err := command.DecodeEntry(entry); !errors.Is(err, command.ErrMalformed) {
			t.Fatalf("format %d: %v", format, err)
		}
	}
	data = encoded(t, create(service(func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeNodePort })))
	if data[flags] != 32 {
		t.Fatalf("the flags are not at %d of %x", flags, data)
	}
	for _, wrong := range []byte{0, 16, 48} {
		data[flags] = wrong
		entry, err := command.EncodeEntry(command.Newest, data)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := command.DecodeEntry(entry); !errors.Is(err, command.ErrMalformed) {
			t.Fatalf("flags %d: %v", wrong, err)
		}
	}
}

// TestEveryKindHasItsFormat fails when a kind is new: an older server cannot read it,
// so that it needs a new format.
func TestEveryKindHasItsFormat(t *testing.T) {
	byFormat := map[int]string{}
	for _, k := range api.Kinds() {
		byFormat[command.FormatOfKind(k.Resource)] += k.Kind + " "
	}
	if byFormat[1] != "Namespace Node Pod Service ConfigMap Secret Event Deployment ReplicaSet EndpointSlice Source Revision " || byFormat[2] != "Server Authority JoinToken Machine " || byFormat[3] != "NetworkPolicy Ingress IngressClass AddressPool " || len(byFormat) != 3 {
		t.Fatalf("got %v", byFormat)
	}
}

func TestVersionErrorSaysWhatToDo(t *testing.T) {
	for got, words := range map[byte][]string{
		0:                  {"too old", "snapshot", "then upgrade"},
		command.Newest + 1: {"upgrade this server", "downgrade", "restore a backup"},
	} {
		_, err := command.DecodeEntry([]byte{got, 0})
		for _, word := range words {
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("%v does not say %q", err, word)
			}
		}
	}
}

func TestSplitAndJoin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tx := drawTxn(t)
		tx.Part = nil
		data, err := command.EncodeTxn(&tx)
		if err != nil {
			t.Fatal(err)
		}
		txns, err := command.Split(data, rapid.IntRange(max(1, len(data)/command.MaxParts+1), len(data)).Draw(t, "size"))
		if err != nil {
			t.Fatal(err)
		}
		pieces := make([][]byte, len(txns))
		for i, p := range txns {
			if err := p.Part.Check(); err != nil || p.Part.Index != i || p.Part.Count != len(txns) || p.Part.ID != txns[0].Part.ID {
				t.Fatalf("part %d: %+v, %v", i, p.Part, err)
			}
			pieces[i] = p.Part.Data
		}
		p := txns[0].Part
		got, err := command.Join(pieces, p.Sum, p.Format)
		if err != nil {
			t.Fatal(err)
		}
		again, err := command.EncodeTxn(got)
		if err != nil || !bytes.Equal(again, data) || !apiequality.Semantic.DeepEqual(plain(tx), plain(*got)) {
			t.Fatalf("changed on the way: %+v, was %+v (%v)", got, tx, err)
		}
		if !bytes.Equal(bytes.Join(pieces, nil), data) {
			t.Fatal("Join changed the parts")
		}
		last := pieces[len(pieces)-1]
		if _, err := command.Join(append(pieces[:len(pieces)-1:len(pieces)-1], last[:len(last)-1]), p.Sum, p.Format); !errors.Is(err, command.ErrMalformed) {
			t.Fatalf("a byte less: %v", err)
		}
	})
}

func TestSplitBounds(t *testing.T) {
	data := encoded(t, create(pod()))
	for name, size := range map[string]int{"zero": 0, "too large a part": command.MaxPart + 1} {
		if _, err := command.Split(data, size); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := command.Split(make([]byte, command.MaxParts+1), 1); !errors.Is(err, command.ErrTooLarge) {
		t.Errorf("too many parts: %v", err)
	}
	if _, err := command.Split([]byte{255}, 1); !errors.Is(err, command.ErrMalformed) {
		t.Errorf("no transaction: %v", err)
	}
	// More than an entry holds can be encoded, and goes in parts only.
	big := command.Txn{}
	for range 5 {
		p := pod()
		p.Annotations = map[string]string{"a": strings.Repeat("x", command.MaxObject-1000)}
		big.Mutations = append(big.Mutations, create(p).Mutations...)
	}
	data = encoded(t, big)
	if _, err := command.EncodeEntry(command.Newest, data); !errors.Is(err, command.ErrTooLarge) {
		t.Errorf("one entry: %v", err)
	}
	if txns, err := command.Split(data, 1<<20); err != nil || len(txns) != 40 {
		t.Errorf("%d parts, %v", len(txns), err)
	}
}

func entryV2(t testing.TB) []byte {
	names := []string{"key and object", "part", "restored", "delete a token", "server", "kind Authority", "kind JoinToken", "kind Machine"}
	var txns [][]byte
	for _, name := range names {
		txns = append(txns, encoded(t, needs2(t)[name]))
	}
	entry, err := command.EncodeEntry(2, txns...)
	if err != nil {
		t.Fatal(err)
	}
	return entry
}

// TestFormat2IsStable is TestFormatIsStable for format 2.
func TestFormat2IsStable(t *testing.T) {
	entry, err := os.ReadFile("testdata/entry-v2")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(entry, entryV2(t)) {
		t.Fatal("format 2 is written differently now")
	}
	for i := range entry {
		if _, err := command.DecodeEntry(entry[:i]); !errors.Is(err, command.ErrMalformed) {
			t.Fatalf("cut at %d of %d: %v", i, len(entry), err)
		}
	}
	txns, err := command.DecodeEntry(entry)
	if err != nil || len(txns) != 8 || txns[1].Part.Index != 1 || txns[2].Bootstrap.Restored.Revision != 3 || txns[4].Mutations[1].Object.GetName() != "one" {
		t.Fatalf("got %+v, %v", txns, err)
	}
}

func entryV3(t testing.TB) []byte {
	all := needs3(t)
	var txns [][]byte
	for _, name := range slices.Sorted(maps.Keys(all)) {
		txns = append(txns, encoded(t, all[name]))
	}
	entry, err := command.EncodeEntry(3, txns...)
	if err != nil {
		t.Fatal(err)
	}
	return entry
}

// TestFormat3IsStable is TestFormatIsStable for format 3.
func TestFormat3IsStable(t *testing.T) {
	if *update {
		if err := os.WriteFile("testdata/entry-v3", entryV3(t), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	entry, err := os.ReadFile("testdata/entry-v3")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(entry, entryV3(t)) {
		t.Fatal("format 3 is written differently now")
	}
	for i := range entry {
		if _, err := command.DecodeEntry(entry[:i]); !errors.Is(err, command.ErrMalformed) {
			t.Fatalf("cut at %d of %d: %v", i, len(entry), err)
		}
	}
}
