package command_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
	"sigs.k8s.io/randfill"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// filler makes objects with every field set at random to values that the API can
// hold: whole seconds, quantities in canonical form.
func filler(seed int64) *randfill.Filler {
	return randfill.NewWithSeed(seed).NilChance(0.3).NumElements(1, 3).MaxDepth(20).Funcs(
		func(t *metav1.Time, c randfill.Continue) { *t = metav1.Unix(c.Int63n(1<<33), 0) },
		func(t *metav1.MicroTime, c randfill.Continue) {
			*t = metav1.MicroTime{Time: time.UnixMicro(c.Int63n(1 << 50))}
		},
		func(d *metav1.Duration, c randfill.Continue) { d.Duration = time.Duration(c.Int63()) },
		func(q *resource.Quantity, c randfill.Continue) {
			*q = resource.MustParse([]string{"100m", "1Gi", "3", "2500M", "0"}[c.Intn(5)])
		},
		func(v *intstr.IntOrString, c randfill.Continue) {
			*v = intstr.FromInt32(c.Int31())
			if c.Bool() {
				*v = intstr.FromString("25%")
			}
		},
		func(b *[]byte, c randfill.Continue) { *b = []byte{byte(c.Uint32())} }, // nil comes back as empty in maps
		func(f *metav1.FieldsV1, c randfill.Continue) { *f = metav1.FieldsV1{} },
		func(s *string, c randfill.Continue) { *s = []string{"a", "web", "ünïcode", "x y", "0"}[c.Intn(5)] },
	)
}

func drawObject(t *rapid.T) api.Object {
	kind := api.Kinds()[rapid.IntRange(0, len(api.Kinds())-1).Draw(t, "kind")]
	o := kind.New()
	filler(rapid.Int64().Draw(t, "seed")).Fill(o)
	o.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind)
	o.SetManagedFields(nil)
	return o
}

func asJSON(t *rapid.T, v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestObjectRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := drawObject(t)
		b, err := command.AppendObject(nil, o)
		if err != nil {
			t.Fatal(err)
		}
		again, err := command.AppendObject(nil, api.Clone(o))
		if err != nil || !bytes.Equal(b, again) {
			t.Fatalf("encoded twice, two results (%v)", err)
		}
		got, err := command.DecodeObject(b)
		if err != nil {
			t.Fatal(err)
		}
		if want, have := asJSON(t, o), asJSON(t, got); want != have {
			t.Fatalf("changed on the way:\n%s", cmp.Diff(want, have))
		}
		if !apiequality.Semantic.DeepEqual(o, got) {
			t.Fatalf("changed on the way:\n%s", cmp.Diff(o, got))
		}
		if second, err := command.AppendObject(nil, got); err != nil || !bytes.Equal(b, second) {
			t.Fatalf("decoded and encoded again, another result (%v)", err)
		}
	})
}

// TestEveryKindRoundTrips does not depend on what rapid draws.
func TestEveryKindRoundTrips(t *testing.T) {
	for _, kind := range api.Kinds() {
		for seed := range int64(20) {
			o := kind.New()
			filler(seed).Fill(o)
			o.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind)
			o.SetManagedFields(nil)
			b, err := command.AppendObject(nil, o)
			if err != nil {
				t.Fatal(err)
			}
			got, err := command.DecodeObject(b)
			if err != nil {
				t.Fatal(err)
			}
			if !apiequality.Semantic.DeepEqual(o, got) {
				t.Fatalf("%s changed on the way:\n%s", kind.Kind, cmp.Diff(o, got))
			}
		}
	}
}

func TestOwnKindsKeepOddText(t *testing.T) {
	o := &api.Revision{Spec: api.RevisionSpec{Subject: "caf\xe9 \x00 not UTF-8", Result: api.RevisionRefused}}
	o.GetObjectKind().SetGroupVersionKind(api.GroupVersion.WithKind("Revision"))
	b, err := command.AppendObject(nil, o)
	if err != nil {
		t.Fatal(err)
	}
	got, err := command.DecodeObject(b)
	if err != nil {
		t.Fatal(err)
	}
	if subject := got.(*api.Revision).Spec.Subject; subject != o.Spec.Subject {
		t.Fatalf("got %q", subject)
	}
}

func drawTxn(t *rapid.T) command.Txn {
	name := rapid.SampledFrom([]string{"", "a", "shop", "x/y"})
	tx := command.Txn{
		Key: name.Draw(t, "key"), Time: rapid.Int64().Draw(t, "time"),
		Actor: name.Draw(t, "actor"), Reason: name.Draw(t, "reason"),
	}
	if rapid.Bool().Draw(t, "commit") {
		tx.Commit = &command.Commit{Source: name.Draw(t, "source"), Parent: name.Draw(t, "parent")}
		if rapid.Bool().Draw(t, "revision") {
			r := &api.Revision{Spec: api.RevisionSpec{Commit: name.Draw(t, "hash"), Changes: []api.Change{{Verb: "create", Fields: []string{"spec"}}}}}
			r.GetObjectKind().SetGroupVersionKind(api.GroupVersion.WithKind("Revision"))
			tx.Commit.Revision = r
		}
	}
	if rapid.Bool().Draw(t, "bootstrap") {
		tx.Bootstrap = &command.Bootstrap{
			ClusterID: name.Draw(t, "id"), ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"),
			PodCIDR: netip.MustParsePrefix("fd00::/48"), NodeMask: 64, DNS: netip.MustParseAddr("10.97.0.10"),
		}
	}
	if tx.Bootstrap != nil && rapid.Bool().Draw(t, "second") {
		tx.Bootstrap.Second = command.Ranges{ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"), NodeMask: 24}
	}
	if tx.Bootstrap != nil && rapid.Bool().Draw(t, "ports") {
		tx.Bootstrap.NodePorts = command.PortRange{First: rapid.Uint16Min(1).Draw(t, "first"), Last: 65535}
	}
	if tx.Bootstrap != nil && rapid.Bool().Draw(t, "restored") {
		tx.Bootstrap.Restored = &command.Restored{ClusterID: name.Draw(t, "old"), Revision: rapid.Uint64().Draw(t, "revision"), Time: rapid.Int64().Draw(t, "when")}
	}
	if rapid.IntRange(0, 3).Draw(t, "part") == 0 {
		data := rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(t, "data")
		tx.Part = &command.Part{ID: "id", Index: 1, Count: 3, Total: int64(len(data)) + 5, Sum: [32]byte{1, 2}, Format: rapid.IntRange(1, 2).Draw(t, "format"), Data: data}
	}
	for range rapid.IntRange(0, 3).Draw(t, "n") {
		m := api.Mutation{
			Verb: api.Verb(rapid.Byte().Draw(t, "verb")), Revision: rapid.Uint64().Draw(t, "rv"), UID: types.UID(name.Draw(t, "uid")),
			Key: api.Key{Resource: api.Resource(name.Draw(t, "resource")), Namespace: name.Draw(t, "ns"), Name: name.Draw(t, "name")},
		}
		if rapid.Bool().Draw(t, "object") {
			m.Object = drawObject(t)
		}
		if rapid.Bool().Draw(t, "graceful") {
			grace := rapid.Int64().Draw(t, "grace")
			m.Grace = &grace
		}
		tx.Mutations = append(tx.Mutations, m)
	}
	return tx
}

func TestEntryRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var txns []command.Txn
		var parts [][]byte
		for range rapid.IntRange(0, 3).Draw(t, "txns") {
			tx := drawTxn(t)
			b, err := command.EncodeTxn(&tx)
			if err != nil {
				t.Fatal(err)
			}
			txns, parts = append(txns, tx), append(parts, b)
		}
		entry, err := command.EncodeEntry(command.Newest, parts...)
		if err != nil {
			t.Fatal(err)
		}
		got, err := command.DecodeEntry(entry)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(txns) {
			t.Fatalf("%d transactions of %d", len(got), len(txns))
		}
		for i := range txns {
			if !apiequality.Semantic.DeepEqual(plain(txns[i]), plain(got[i])) || !reflect.DeepEqual(txns[i].Bootstrap, got[i].Bootstrap) {
				t.Fatalf("transaction %d changed on the way: %+v, was %+v", i, got[i], txns[i])
			}
			if b, err := command.EncodeTxn(&got[i]); err != nil || !bytes.Equal(b, parts[i]) {
				t.Fatalf("transaction %d encodes to something else (%v)", i, err)
			}
		}
	})
}

// plain leaves out the settings, whose unexported fields DeepEqual of apimachinery
// cannot see.
func plain(t command.Txn) command.Txn {
	t.Bootstrap = nil
	return t
}

func TestUnknownVersion(t *testing.T) {
	entry, err := command.EncodeEntry(command.Newest)
	if err != nil {
		t.Fatal(err)
	}
	entry[0] = command.Newest + 1
	var version *command.VersionError
	if _, err := command.DecodeEntry(entry); !errors.As(err, &version) || version.Got != command.Newest+1 {
		t.Fatalf("got %v", err)
	}
}

func pod() *corev1.Pod {
	p := &corev1.Pod{Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{
		Name: "web", Image: "registry.example/web:1", Env: []corev1.EnvVar{{Name: "A", Value: "b"}},
		Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("64Mi")}},
	}}}}
	p.Kind, p.APIVersion, p.Namespace, p.Name = "Pod", "v1", "default", "web-1"
	p.Labels = map[string]string{"app": "web"}
	return p
}

func goodEntry(t testing.TB) []byte {
	grace := int64(3)
	tx := command.Txn{Key: "k", Time: 1, Actor: "a", Reason: "r", Commit: &command.Commit{Source: "s", Parent: "p", Revision: &api.Revision{}},
		Bootstrap: &command.Bootstrap{ClusterID: "c", ServiceCIDR: netip.MustParsePrefix("10.0.0.0/16"), DNS: netip.MustParseAddr("10.0.0.1")},
		Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(pod()), Object: pod()}, {Verb: api.Delete, Key: api.Key{Resource: api.Pods, Name: "x"}, Grace: &grace}}}
	b, err := command.EncodeTxn(&tx)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := command.EncodeEntry(command.Newest, b, b)
	if err != nil {
		t.Fatal(err)
	}
	return entry
}

func TestDecodeRefusesEveryCut(t *testing.T) {
	good := goodEntry(t)
	if _, err := command.DecodeEntry(good); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		if _, err := command.DecodeEntry(good[:i]); !errors.Is(err, command.ErrMalformed) {
			t.Fatalf("cut at %d of %d: %v", i, len(good), err)
		}
	}
	if _, err := command.DecodeEntry(append(good, 0)); !errors.Is(err, command.ErrMalformed) {
		t.Fatalf("a byte too many: %v", err)
	}
}

func TestBounds(t *testing.T) {
	long := strings.Repeat("x", 5000)
	for name, tx := range map[string]command.Txn{
		"key":       {Key: long},
		"actor":     {Actor: long},
		"reason":    {Reason: long},
		"name":      {Mutations: []api.Mutation{{Key: api.Key{Name: long}}}},
		"parent":    {Commit: &command.Commit{Parent: long}},
		"cluster":   {Bootstrap: &command.Bootstrap{ClusterID: long}},
		"mutations": {Mutations: make([]api.Mutation, command.MaxMutations+1)},
		"object":    {Mutations: []api.Mutation{{Object: &corev1.ConfigMap{Data: map[string]string{"a": strings.Repeat("x", command.MaxObject)}}}}},
		"record":    {Commit: &command.Commit{Revision: &api.Revision{Spec: api.RevisionSpec{Message: strings.Repeat("x", command.MaxObject)}}}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := command.EncodeTxn(&tx); !errors.Is(err, command.ErrTooLarge) {
				t.Fatalf("got %v", err)
			}
		})
	}
	if _, err := command.EncodeEntry(command.Newest, make([][]byte, command.MaxTxns+1)...); !errors.Is(err, command.ErrTooLarge) {
		t.Fatalf("got %v", err)
	}
	if _, err := command.DecodeEntry(make([]byte, command.MaxEntry+1)); !errors.Is(err, command.ErrTooLarge) {
		t.Fatalf("got %v", err)
	}
	if _, err := command.EncodeTxn(&command.Txn{Mutations: []api.Mutation{{Verb: api.Create, Object: (*corev1.Pod)(nil)}}}); err == nil {
		t.Fatal("a nil object was encoded")
	}
}

// FuzzDecodeEntry: whatever the bytes, decoding ends with a value or an error, and a
// value survives another round.
func FuzzDecodeEntry(f *testing.F) {
	f.Add(goodEntry(f))
	empty, _ := command.EncodeEntry(command.Newest)
	f.Add(empty)
	f.Add([]byte{})
	f.Add([]byte{2, 1, 0})
	f.Add(entryV2(f))
	f.Add(entryV3(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		txns, err := command.DecodeEntry(data)
		if err != nil {
			return
		}
		for i := range txns {
			b, err := command.EncodeTxn(&txns[i])
			if err != nil {
				continue // an object may grow beyond a bound when it is written in full
			}
			entry, err := command.EncodeEntry(command.Newest, b)
			if err != nil {
				continue
			}
			again, err := command.DecodeEntry(entry)
			if err != nil {
				t.Fatalf("what was decoded cannot be encoded and decoded again: %v", err)
			}
			second, err := command.EncodeTxn(&again[0])
			if err != nil || !bytes.Equal(b, second) {
				t.Fatalf("the encoding is not stable (%v)", err)
			}
		}
	})
}

func BenchmarkEncodePod(b *testing.B) {
	o := pod()
	b.ReportAllocs()
	for range b.N {
		if _, err := command.AppendObject(nil, o); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodePod(b *testing.B) {
	data, err := command.AppendObject(nil, pod())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for range b.N {
		if _, err := command.DecodeObject(data); err != nil {
			b.Fatal(err)
		}
	}
}

// TestFormatIsStable reads an entry that was written when version 1 was new: logs on
// disks hold such. A change that breaks it needs a new version.
func TestFormatIsStable(t *testing.T) {
	entry, err := os.ReadFile("testdata/entry-v1")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(entry, goodEntry(t)) {
		t.Fatal("version 1 is written differently now")
	}
	txns, err := command.DecodeEntry(entry)
	if err != nil || len(txns) != 2 || txns[0].Mutations[0].Object.GetName() != "web-1" {
		t.Fatalf("got %+v, %v", txns, err)
	}
}
