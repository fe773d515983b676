package command_test

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// put is the transaction that `decree bench store` proposes: one ConfigMap of 256
// bytes under a key of its own.
func put(verb api.Verb, i int) command.Txn {
	o := &corev1.ConfigMap{Data: map[string]string{"value": strings.Repeat("x", 256)}}
	o.Kind, o.APIVersion, o.Namespace, o.Name = "ConfigMap", "v1", "default", fmt.Sprintf("key-%08d", i)
	return command.Txn{Key: fmt.Sprintf("KEYOFTWENTYSIXLETTERS%08d", i), Time: 1_700_000_000_000, Actor: "user/bench", Mutations: []api.Mutation{{Verb: verb, Key: api.KeyOf(o), Object: o}}}
}

func BenchmarkEncodeTxn(b *testing.B) {
	tx := put(api.Update, 1)
	b.ReportAllocs()
	for range b.N {
		if _, err := command.EncodeTxn(&tx); err != nil {
			b.Fatal(err)
		}
	}
}

// entryOf encodes n puts into one entry.
func entryOf(b *testing.B, n int) []byte {
	parts := make([][]byte, n)
	for i := range parts {
		tx := put(api.Update, i)
		var err error
		if parts[i], err = command.EncodeTxn(&tx); err != nil {
			b.Fatal(err)
		}
	}
	entry, err := command.EncodeEntry(command.Newest, parts...)
	if err != nil {
		b.Fatal(err)
	}
	return entry
}

// BenchmarkDecodeEntry has the transaction as its operation, not the entry.
func BenchmarkDecodeEntry(b *testing.B) {
	for _, n := range []int{64, 256} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			entry := entryOf(b, n)
			b.ReportAllocs()
			for i := 0; i < b.N; i += n {
				if _, err := command.DecodeEntry(entry); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
