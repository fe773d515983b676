package raftstore_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// BenchmarkPropose measures durable transactions of one 256-byte object each, with a
// number of proposers that wait for one another's fsync.
func BenchmarkPropose(b *testing.B) {
	for _, proposers := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("%dproposers", proposers), func(b *testing.B) {
			s := open(b, config(b.TempDir()))
			value := strings.Repeat("x", 256)
			var n atomic.Int64
			var wg sync.WaitGroup
			b.ResetTimer()
			for range proposers {
				wg.Go(func() {
					for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
						r, err := s.Propose(context.Background(), create(configMap(fmt.Sprint("c", i), value)))
						if err != nil || r.Err() != nil {
							b.Error(err, r.Err())
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "txn/s")
		})
	}
}

// BenchmarkRead measures linearizable reads.
func BenchmarkRead(b *testing.B) {
	s := open(b, config(b.TempDir()))
	for range b.N {
		if _, err := s.Read(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWatch measures events delivered to many watchers of one resource.
func BenchmarkWatch(b *testing.B) {
	const watchers = 100
	s := open(b, config(b.TempDir()))
	var objects []api.Object
	for i := range 1000 {
		objects = append(objects, configMap(fmt.Sprint("c", i), "x"))
	}
	var wg sync.WaitGroup
	total := b.N * len(objects)
	for range watchers {
		w := watch(b, s, s.View().Revision(), raftstore.Filter{Resource: api.ConfigMaps})
		wg.Go(func() {
			for seen := 0; seen < total; {
				events, err := w.Next(context.Background())
				if err != nil {
					b.Error(err)
					return
				}
				seen += len(events)
			}
		})
	}
	b.ResetTimer()
	for i := range b.N {
		if i%2 == 0 {
			must(b, s, create(objects...))
			continue
		}
		txn := create(objects...)
		for j := range txn.Mutations {
			txn.Mutations[j].Verb, txn.Mutations[j].Object = api.Delete, nil
		}
		must(b, s, txn)
	}
	wg.Wait()
	b.ReportMetric(float64(total*watchers)/b.Elapsed().Seconds(), "events/s")
}
