package pki

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"
)

// TestHTTP2 is how the API server and its clients use a Keeper: net/http changes
// copies of what it is given, and must still get HTTP/2 and who asks.
func TestHTTP2(t *testing.T) {
	i := issuer(t, newSpec(t, time.Now()))
	s1, n1 := newMember(t, i, ServerIdentity("s1")), newMember(t, i, Node("n1"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		TLSConfig: s1.ServerTLS("h2", "http/1.1"), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, node, _ := Who(r.TLS.VerifiedChains[0][0])
			_, _ = io.WriteString(w, r.Proto+" "+node)
		}),
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(l, "", "") }()
	transport := &http.Transport{TLSClientConfig: RequireGroup(n1.ClientTLS(), GroupServers), ForceAttemptHTTP2: true}
	resp, err := (&http.Client{Transport: transport}).Get("https://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "HTTP/2.0 n1" {
		t.Errorf("%s, %v", body, err)
	}
	resp.Body.Close()
	transport.CloseIdleConnections()
	srv.Close()
	<-done
}
