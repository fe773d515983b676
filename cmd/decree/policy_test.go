package main

import (
	"fmt"
	"strings"
	"testing"
)

// deniedPolicy isolates the pod "vault" for ingress, on line 5 of its file; allowedPolicy
// lets the pod "client" in.
const (
	deniedPolicy = `package hello

import networking "k8s.io/api/networking/v1"

denied: networking.#NetworkPolicy & {
	apiVersion: "networking.k8s.io/v1"
	kind:       "NetworkPolicy"
	metadata: name: "vault"
	spec: podSelector: matchLabels: app: "vault"
}
`
	allowedPolicy = `package hello

import networking "k8s.io/api/networking/v1"

allowed: networking.#NetworkPolicy & {
	apiVersion: "networking.k8s.io/v1"
	kind:       "NetworkPolicy"
	metadata: name: "client"
	spec: {
		podSelector: matchLabels: app: "vault"
		ingress: [{from: [{podSelector: matchLabels: app: "client"}], ports: [{port: 8080}]}]
	}
}
`
)

// TestNetworkPolicy: a pod that a policy isolates is not reached from its start on, the
// command line says why and where that is written, and a push opens it again.
func TestNetworkPolicy(t *testing.T) {
	l := newLive(t)
	serve := fmt.Sprintf(`image: %q, command: ["sh", "-c", "echo secret > /index.html; httpd -f -p 8080 -h /"]`, busybox)
	idle := fmt.Sprintf(`image: %q, command: ["sleep", "1000"]`, busybox)
	text := "package hello\n\nimport core \"k8s.io/api/core/v1\"\n\n" + bare("vault", "", serve) + bare("client", "", idle) + bare("other", "", idle)
	for _, name := range []string{"vault", "client", "other"} {
		text = strings.Replace(text, fmt.Sprintf("metadata: name: %q", name), fmt.Sprintf("metadata: {name: %[1]q, labels: app: %[1]q}", name), 1)
	}
	l.push(t, "policy.cue", deniedPolicy)
	l.push(t, "pods.cue", text)
	for _, name := range []string{"vault", "client", "other"} {
		l.until(t, "$K get pod "+name, "1/1", "Running")
	}
	ip := strings.TrimSpace(l.must(t, "decree get pod vault -o jsonpath={.status.podIP}"))
	ask := func(pod string) string {
		return fmt.Sprintf(`timeout 5 $K exec %s -- sh -c 'printf "GET /index.html HTTP/1.0\r\n\r\n" | nc -w 2 %s 8080 | grep secret'`, pod, ip)
	}
	l.refused(t, ask("client"))
	out := l.refused(t, "decree why-blocked client vault:8080")
	contains(t, out, "blocked: default/client", "default/vault is isolated for ingress", "policy.cue:5 at ")
	contains(t, l.ok(t, "decree describe netpol vault"), "app=vault", "nobody")
	contains(t, l.ok(t, "curl -s http://"+ip+":8080/index.html"), "secret") // as the node's own probes do

	contains(t, l.ok(t, "decree netcheck"), "NODE TO POD ON", "1 node, 4 checks: all well") // by a pod that is not isolated

	l.push(t, "allowed.cue", allowedPolicy)
	l.until(t, ask("client"), "secret")
	l.refused(t, ask("other"))
	contains(t, l.ok(t, "decree why-blocked client vault:8080"), "allowed: default/client", "allowed.cue:5 at ")
	l.end(t)
}
