package main

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/client"
)

// TestAgentElsewhere: an agent that is no part of a server joins with a token, runs what
// is pushed, and its containers are reached through every server, also after the one
// that it joined by is gone.
func TestAgentElsewhere(t *testing.T) {
	p := newControlPlane(t, 3)
	p.agent("n1", 101, p.servers[1])
	p.push(p.servers[2], "hello")
	reach := func(at *serverProcess) {
		t.Helper()
		c, err := p.client(at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		pods, _, err := client.List[*corev1.Pod](t.Context(), c, client.ListOptions{Namespace: "default"})
		if err != nil || len(pods) == 0 || pods[0].Spec.NodeName != "n1" {
			t.Fatalf("%s: %d pods, %v", at.name, len(pods), err)
		}
		if out := p.run(at, p.binary, "logs", pods[0].Name); !strings.Contains(out, "listening") {
			t.Errorf("%s: log %q", at.name, out)
		}
		// A second one cannot listen where the first does: it ran in the pod.
		if out, err := p.attempt(at, p.binary, "exec", pods[0].Name, "--", "/hello"); err == nil || !strings.Contains(out, "address already in use") {
			t.Errorf("%s: exec: %v %q", at.name, err, out)
		}
	}
	for _, s := range p.servers {
		reach(s)
	}
	p.kill(p.servers[1]) // the one that it joined by
	reach(p.servers[0])
	reach(p.servers[2])
}
