package backup_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/pki"
)

// serve runs the handler behind mutual TLS and returns a client of user.
func serve(t *testing.T, h *backup.Handler, user pki.Request) *client.Client {
	t.Helper()
	authority, err := pki.Open(t.TempDir(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	spec, err := authority.Spec()
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := pki.NewIssuer(spec)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := issuer.Issue(user, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		subject := r.TLS.PeerCertificates[0].Subject
		h.ServeHTTP(w, r.WithContext(apiserver.WithIdentity(r.Context(), apiserver.Identity{Name: subject.CommonName, Groups: subject.Organization})))
	}))
	serving, err := issuer.Issue(pki.ServerIdentity("one", "127.0.0.1"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := serving.TLS()
	if err != nil {
		t.Fatal(err)
	}
	server.TLS = tlsOf(cert)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	c, err := client.New(client.Config{Server: server.URL, CA: issuer.Bundle(), Pair: pair, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestHandler(t *testing.T) {
	c := serve(t, &backup.Handler{Source: func(context.Context) (backup.Source, error) { return source(), nil }}, pki.Admin("admin"))
	s, err := c.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if want := (backup.Name{ClusterID: cluster().Settings().ClusterID, Time: now, Revision: cluster().Revision()}); s.Name != want {
		t.Errorf("name %v, want %v", s.Name, want)
	}
	k := newKey(t)
	var b bytes.Buffer
	if _, err := backup.Reseal(t.Context(), &b, s, k.Protection); err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Verify(t.Context(), &b, k.Keys, nil); err != nil {
		t.Error(err)
	}
}

// TestHandlerFails holds that a client notices a snapshot that broke in the middle, and
// is told why.
func TestHandlerFails(t *testing.T) {
	c := serve(t, &backup.Handler{Source: func(context.Context) (backup.Source, error) {
		src := source()
		src.Repositories = failing{src.Repositories.(repositories)}
		return src, nil
	}}, pki.Admin("admin"))
	s, err := c.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var b bytes.Buffer
	_, err = backup.Reseal(t.Context(), &b, s, plain)
	if err == nil || !strings.Contains(err.Error(), errExport.Error()) {
		t.Errorf("copied with %v", err)
	}
	if b.Len() < len(big())/2 {
		t.Errorf("%d bytes came: the failure was not in the middle", b.Len())
	}
	if _, err := backup.Verify(t.Context(), &b, backup.Keys{}, nil); !errors.Is(err, backup.ErrCorrupt) {
		t.Errorf("what came: %v", err)
	}
}

func TestHandlerRefuses(t *testing.T) {
	calls := 0
	h := &backup.Handler{Source: func(context.Context) (backup.Source, error) { calls++; return small(), nil }}
	if _, err := serve(t, h, pki.ServerIdentity("one", "127.0.0.1")).Snapshot(t.Context()); !apierrors.IsForbidden(err) {
		t.Errorf("a server's certificate: %v", err)
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, backup.Path, nil))
	if rec.Code != http.StatusForbidden {
		t.Errorf("nobody: status %d", rec.Code)
	}
	admin := apiserver.WithIdentity(t.Context(), apiserver.Identity{Name: "admin", Groups: []string{pki.GroupAdmins}})
	rec = httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, backup.Path, nil).WithContext(admin))
	if rec.Code != http.StatusMethodNotAllowed || calls > 0 {
		t.Errorf("POST: status %d, %d reads", rec.Code, calls)
	}
	h.Source = func(context.Context) (backup.Source, error) { return backup.Source{}, raftstore.ErrNotLeader }
	rec = httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, backup.Path, nil).WithContext(admin))
	if rec.Code != http.StatusServiceUnavailable || rec.Header().Get(backup.HeaderName) != "" {
		body, _ := io.ReadAll(rec.Body)
		t.Errorf("no leader: status %d, %s", rec.Code, body)
	}
}

func tlsOf(cert tls.Certificate) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert}
}
