package gitsource

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// maybeHelper makes the test binary a git-remote-decree when it is called by that
// name.
func maybeHelper() bool {
	if filepath.Base(os.Args[0]) != "git-remote-decree" {
		return false
	}
	cred := Credentials{CAFile: os.Getenv("TEST_CA"), CertFile: os.Getenv("TEST_CERT"), KeyFile: os.Getenv("TEST_KEY")}
	err := RemoteHelper(context.Background(), os.Args[1:], os.Environ(), Streams{os.Stdin, os.Stdout, os.Stderr}, cred)
	if err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	return true
}

// pki makes a CA, a server and a client certificate in dir.
func pki(t *testing.T, dir string) (server tls.Certificate, pool *x509.CertPool) {
	t.Helper()
	make := func(name string, tmpl, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if signer == nil {
			parent, signer = tmpl, key
		}
		tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		writePEM(t, filepath.Join(dir, name+".crt"), "CERTIFICATE", der)
		writePEM(t, filepath.Join(dir, name+".key"), "EC PRIVATE KEY", keyDER)
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	ca, caKey := make("ca", &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	make("server", &x509.Certificate{Subject: pkix.Name{CommonName: "server"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, ca, caKey)
	make("client", &x509.Certificate{Subject: pkix.Name{CommonName: "bob"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, ca, caKey)
	pool = x509.NewCertPool()
	pool.AddCert(ca)
	server, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key"))
	if err != nil {
		t.Fatal(err)
	}
	return server, pool
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	encodePEM(f, kind, der)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestRemoteHelper(t *testing.T) {
	b := newBench(t, func(c *ServerConfig) {
		c.Identity = func(r *http.Request) string { return r.TLS.PeerCertificates[0].Subject.CommonName }
	})
	b.seed(hello)
	dir := t.TempDir()
	cert, pool := pki(t, dir)
	srv := httptest.NewUnstartedServer(b.server)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	srv.StartTLS()
	defer srv.Close()
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(bin, "git-remote-decree")); err != nil {
		t.Fatal(err)
	}
	b.env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "TEST_CA="+filepath.Join(dir, "ca.crt"),
		"TEST_CERT="+filepath.Join(dir, "client.crt"), "TEST_KEY="+filepath.Join(dir, "client.key"), "https_proxy=http://127.0.0.1:1")
	address := "decree://" + strings.TrimPrefix(srv.URL, "https://") + "/shop"
	b.mustGit(dir, "clone", "-q", address)
	work := filepath.Join(dir, "shop")
	hash := b.commit(work, "a", "1")
	b.mustGit(work, "push", "-q", "origin", "main")
	if b.head() != hash || b.recv.pushes[0].Pusher != "bob" {
		t.Errorf("head %s, pusher %q", b.head(), b.recv.pushes[0].Pusher)
	}
	out, err := b.git(dir, "clone", "decree://127.0.0.1/..%2fx")
	if err == nil {
		t.Error("cloned a bad address")
	}
	mustContain(t, out, "the form is decree://HOST:PORT/NAME")
}

func TestRemoteHelperReportsExit(t *testing.T) {
	err := RemoteHelper(t.Context(), []string{"origin", "decree://127.0.0.1:1/shop"}, os.Environ(), Streams{In: strings.NewReader("list\n")}, Credentials{})
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Errorf("a server that is not there: %v", err)
	}
}
