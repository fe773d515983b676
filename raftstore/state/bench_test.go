package state_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// puts makes n transactions, each with one ConfigMap of 256 bytes, as a decoded
// entry holds them.
func puts(verb api.Verb, n int, name func(i int) int) []command.Txn {
	txns := make([]command.Txn, n)
	for i := range txns {
		o := &corev1.ConfigMap{Data: map[string]string{"value": strings.Repeat("x", 248) + fmt.Sprintf("%08x", rand.Uint32())}}
		o.Kind, o.APIVersion, o.Namespace, o.Name = "ConfigMap", "v1", "default", fmt.Sprintf("key-%08d", name(i))
		txns[i] = command.Txn{Key: fmt.Sprintf("KEY%016X%07X", rand.Uint64(), i), Time: 1_700_000_000_000, Actor: "user/bench", Mutations: []api.Mutation{{Verb: verb, Key: api.KeyOf(o), Object: o}}}
	}
	return txns
}

// loaded is a state of 100,000 objects with a full history of keys.
func loaded(b *testing.B) *state.State {
	s, _, _ := state.Reduce(state.New(), 1, command.Txn{Bootstrap: bootstrap()})
	for i := 0; i < 100_000; i += 1000 {
		s = reduceAll(b, s, uint64(i+2), puts(api.Create, 1000, func(j int) int { return i + j }))
	}
	return s
}

func reduceAll(b *testing.B, s *state.State, index uint64, txns []command.Txn) *state.State {
	next, results, _ := state.ReduceEntry(s, index, txns)
	for _, r := range results {
		if r.Rejected != nil {
			b.Fatal(r.Rejected)
		}
	}
	return next
}

// BenchmarkReduceEntry has the transaction as its operation, not the entry.
func BenchmarkReduceEntry(b *testing.B) {
	base := loaded(b)
	for _, n := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("create-%d", n), func(b *testing.B) { benchmarkReduce(b, base, api.Create, n) })
		b.Run(fmt.Sprintf("update-%d", n), func(b *testing.B) { benchmarkReduce(b, base, api.Update, n) })
	}
}

func benchmarkReduce(b *testing.B, s *state.State, verb api.Verb, n int) {
	fresh := 100_000
	name := func(int) int {
		if verb == api.Update {
			return rand.IntN(100_000)
		}
		fresh++
		return fresh
	}
	// The transactions are made beforehand: stopping the clock for every entry costs
	// more than the entry.
	all := puts(verb, b.N, name)
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; i < b.N; i += n {
		s = reduceAll(b, s, uint64(i), all[i:min(i+n, b.N)])
	}
}

// BenchmarkApply is all that a server does for a transaction that is committed:
// decoding its entry and reducing it. The transaction is the operation.
func BenchmarkApply(b *testing.B) {
	base := loaded(b)
	for _, n := range []int{1, 64, 256} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			entries := make([][]byte, (b.N+n-1)/n)
			for i := range entries {
				entries[i] = encode(b, puts(api.Update, n, func(int) int { return rand.IntN(100_000) }))
			}
			s := base
			b.ReportAllocs()
			b.ResetTimer()
			for i, entry := range entries {
				txns, err := command.DecodeEntry(entry)
				if err != nil {
					b.Fatal(err)
				}
				s = reduceAll(b, s, uint64(i), txns)
			}
		})
	}
}

func encode(b *testing.B, txns []command.Txn) []byte {
	parts := make([][]byte, len(txns))
	for i := range txns {
		var err error
		if parts[i], err = command.EncodeTxn(&txns[i]); err != nil {
			b.Fatal(err)
		}
	}
	entry, err := command.EncodeEntry(command.Newest, parts...)
	if err != nil {
		b.Fatal(err)
	}
	return entry
}
