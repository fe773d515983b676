package membership_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// BenchmarkPut measures durable changes of one 256-byte object each through three
// servers that speak mutual TLS, all of them in this process.
func BenchmarkPut(b *testing.B) {
	_, servers := three(b)
	const keys = 10_000
	txn := command.Txn{Actor: "bench"}
	for i := range keys {
		o := configMap("k"+strconv.Itoa(i), "")
		txn.Mutations = append(txn.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	if r, err := servers[0].store.Propose(context.Background(), txn); err != nil || r.Err() != nil {
		b.Fatal(err, r.Err())
	}
	value := strings.Repeat("x", 256)
	for _, callers := range []int{1, 64, 256, 1000} {
		b.Run(fmt.Sprintf("%dcallers", callers), func(b *testing.B) {
			var n atomic.Int64
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
						o := configMap("k"+strconv.FormatInt(i*7919%keys, 10), (strconv.FormatInt(i, 36) + value)[:256])
						data, err := command.EncodeTxn(&command.Txn{Time: i, Actor: "bench", Mutations: []api.Mutation{{Verb: api.Update, Key: api.KeyOf(o), Object: o}}})
						if err != nil {
							b.Error(err)
							return
						}
						if r, err := servers[1].peers.Propose(context.Background(), servers[0].address, data); err != nil || r.Err() != nil {
							b.Error(err, r.Err())
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "puts/s")
		})
	}
}
