package route_test

import (
	"fmt"
	"testing"

	"decree.dev/decree/netplane/ingress/route"
)

// BenchmarkBuild is one change in a cluster of 30,000 services, of which 300 are reached
// by name.
func BenchmarkBuild(b *testing.B) {
	var o route.Objects
	for i := range 30_000 {
		name := fmt.Sprintf("s%d", i)
		service(&o, name, "10.98.0.1", "10.98.0.2")
		if i%100 == 0 {
			ingress(&o, name, 1, rule(name+".example.com", path("/", name)))
		}
	}
	for b.Loop() {
		route.Build(o, nil)
	}
}

// BenchmarkMatch finds one of ten thousand hosts.
func BenchmarkMatch(b *testing.B) {
	var o route.Objects
	service(&o, "s", "10.98.0.1")
	for i := range 10_000 {
		ingress(&o, fmt.Sprint("i", i), 1, rule(fmt.Sprintf("h%d.example.com", i), path("/", "s"), path("/api/v1", "s")))
	}
	tb := route.Build(o, nil)
	for b.Loop() {
		if tb.Match("h7777.example.com", "/api/v1/orders/17") == nil {
			b.Fatal("not found")
		}
	}
}
