package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// tlsManifest adds a certificate to examples/ingress.
const tlsManifest = `package site

front: spec: tls: [{hosts: ["hello.example"], secretName: "hello"}]
certificate: {
	apiVersion: "v1"
	kind:       "Secret"
	metadata: name: "hello"
	type: "kubernetes.io/tls"
	stringData: {
		"tls.crt": %q
		"tls.key": %q
	}
}
`

// selfSigned is a certificate for a name, and its key, in PEM.
func selfSigned(t *testing.T, name string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
}

// TestIngress reads a page by its name with the certificate of a Secret, changes the
// application under load without losing a request, and closes the ports with the last
// Ingress.
func TestIngress(t *testing.T) {
	l := newLive(t)
	cert, key := selfSigned(t, "hello.example")
	if err := os.WriteFile(filepath.Join(l.dir, "ca.pem"), []byte(cert), 0o644); err != nil {
		t.Fatal(err)
	}
	l.must(t, "cd "+l.dir+"/repo && git rm -q hello.cue greeting.cue && cp ../examples/ingress/site.cue . && sed -i 's/timeout/timout/' site.cue && git add -A && git commit -qm 'a mistake'")
	out, code := l.run(t, "git push")
	if contains(t, out, "site.cue:", `metadata.annotations["ingress.decree.dev/timout"]: there is no such annotation`); code == 0 {
		t.Error("a push with an annotation that does not exist is accepted")
	}
	l.must(t, "sed -i 's/timout/timeout/' site.cue")
	contains(t, l.push(t, "tls.cue", fmt.Sprintf(tlsManifest, cert, key)), `+ ingresses.networking.k8s.io "default/hello"`, "healthy after")
	const at = "curl -sS --max-time 5 --resolve hello.example:443:127.0.0.1 --resolve hello.example:80:127.0.0.1 "
	l.until(t, at+"--cacert "+l.dir+"/ca.pem https://hello.example/ || true", "Hello from hello-")
	contains(t, l.ok(t, at+"-o /dev/null -w '%{http_code} %{redirect_url}' http://hello.example/a?b"), "308 https://hello.example/a?b")
	contains(t, l.ok(t, "curl -sS --max-time 5 http://127.0.0.1/"), "404", "no ingress has a rule")
	l.until(t, "$K get ing", "hello", "hello.example", "127.0.0.1", "80, 443")
	contains(t, l.ok(t, "decree describe ing hello"), "127.0.0.1", "hello.example", "hello:http", "by secret hello", "tls.cue:")
	contains(t, l.ok(t, "decree get ingressclasses"), "decree.dev/ingress")

	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(cert))
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetHTTP1(true)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, Protocols: protocols, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return l.dial(ctx, network, "127.0.0.1:443")
	}}
	t.Cleanup(tr.CloseIdleConnections)
	s := startLoadBy(t, &http.Client{Timeout: 5 * time.Second, Transport: tr}, "https://hello.example/")
	before := l.read(t, "site.cue")
	for n := range 3 {
		contains(t, l.push(t, "site.cue", strings.Replace(before, "replicas: 2", fmt.Sprintf("replicas: %d\n\tenv: ROUND: \"%d\"", 2+n, n), 1)), "healthy after")
	}
	s.check(t)
	testServersOutlive(t, l, &http.Client{Timeout: 5 * time.Second, Transport: tr})

	l.must(t, "git rm -q tls.cue && sed -i '/^front:/,$d' site.cue && git commit -qam 'no ingress' && git push")
	l.untilGood(t, "ss -Hltun 'sport = :80 or sport = :443'", func(out string) bool { return out == "" })
	l.end(t)
}

// testServersOutlive kills decree, starts it again, and starts one with another configuration,
// under load: nobody who asks the node for a name or an Ingress notices.
func testServersOutlive(t *testing.T, l *live, client *http.Client) {
	t.Helper()
	web := startLoadBy(t, client, "https://hello.example/")
	names := startLoadOf(t, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		conn, err := l.dial(ctx, "udp", "10.97.0.10:53")
		if err != nil {
			return err
		}
		defer conn.Close()
		m, _, err := new(dns.Client).ExchangeWithConn(new(dns.Msg).SetQuestion("hello.default.svc.cluster.local.", dns.TypeA), &dns.Conn{Conn: conn})
		if err == nil && len(m.Answer) != 1 {
			err = fmt.Errorf("%s", m)
		}
		return err
	})
	if err := l.daemon.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-l.exited
	web.goOn(t, 200)
	names.goOn(t, 200)
	l.up(t)
	web.goOn(t, 200)
	l.stop(t)
	l.up(t, "--ingress-access-log", filepath.Join(l.dir, "access.log"))
	web.goOn(t, 200)
	names.goOn(t, 200)
	web.check(t)
	names.check(t)
	l.until(t, "curl -sS --max-time 5 -o /dev/null -H 'Host: hello.example' http://127.0.0.1/; tail -n1 "+filepath.Join(l.dir, "access.log"), "hello.example")
}
