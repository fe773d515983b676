package ingressbench

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/cmd/decree/internal/process"
	"decree.dev/decree/netplane/ingress"
	"decree.dev/decree/netplane/ingress/route"
)

// proxy is one that is measured.
type proxy struct {
	*process.Process
	http, https int
}

func (p *proxy) url(w workload) string {
	if w.tls {
		return fmt.Sprintf("https://127.0.0.1:%d%s", p.https, w.path)
	}
	return fmt.Sprintf("http://127.0.0.1:%d%s", p.http, w.path)
}

// ready waits until a proxy answers for its backend.
func ready(ctx context.Context, p *process.Process, urls ...string) error {
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: time.Second}
	return p.Await(ctx, func(ctx context.Context) error {
		for _, u := range urls {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
			if err != nil {
				return err
			}
			res, err := c.Do(req)
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, res.Body)
			if res.Body.Close(); err != nil || res.StatusCode != http.StatusOK {
				return fmt.Errorf("%s: %s, %v", u, res.Status, err)
			}
		}
		return nil
	})
}

// startBackend starts nginx, or a server of our own if it is not installed.
func startBackend(ctx context.Context, cfg *Config) (*process.Process, int, error) {
	port, err := process.FreePort()
	if err != nil {
		return nil, 0, err
	}
	argv := []string{cfg.Binary, "bench", "ingress", "--answer", fmt.Sprintf("127.0.0.1:%d", port)}
	if cfg.Nginx != "" {
		if err := os.WriteFile(filepath.Join(cfg.Dir, "large"), make([]byte, large), 0o644); err != nil {
			return nil, 0, err
		}
		conf := nginxHead(cfg.Dir, "backend") + fmt.Sprintf("server { listen 127.0.0.1:%d backlog=1024; keepalive_requests 100000000; location = /small { return 200 'hello, world'; } location = /large { alias %s/large; } }\n}\n", port, cfg.Dir)
		path := filepath.Join(cfg.Dir, "backend.conf")
		if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
			return nil, 0, err
		}
		argv = []string{cfg.Nginx, "-c", path}
	}
	p, err := process.Start(ctx, "backend", []string{"GOMAXPROCS=1"}, append([]string{"taskset", "-c", otherCore}, argv...)...)
	if err != nil {
		return nil, 0, err
	}
	if err := ready(ctx, p, fmt.Sprintf("http://127.0.0.1:%d/small", port)); err != nil {
		p.Stop()
		return nil, 0, err
	}
	return p, port, nil
}

// startProxies starts all proxies that there are. Those that it returns have to be stopped,
// also if there is an error.
func startProxies(ctx context.Context, cfg *Config, backend int) (all []*proxy, err error) {
	for _, s := range []struct {
		name, binary string
		args         func(cfg *Config, http, https, backend int) ([]string, error)
	}{{"decree", cfg.Binary, decreeArgs}, {"nginx", cfg.Nginx, nginxArgs}, {"haproxy", cfg.HAProxy, haproxyArgs}, {"caddy", cfg.Caddy, caddyArgs}} {
		if s.binary == "" {
			continue
		}
		p := &proxy{}
		if p.http, err = process.FreePort(); err != nil {
			return all, err
		}
		if p.https, err = process.FreePort(); err != nil {
			return all, err
		}
		args, err := s.args(cfg, p.http, p.https, backend)
		if err != nil {
			return all, err
		}
		env := []string{"GOMAXPROCS=1", "XDG_DATA_HOME=" + cfg.Dir, "XDG_CONFIG_HOME=" + cfg.Dir}
		if p.Process, err = process.Start(ctx, s.name, env, append([]string{"taskset", "-c", proxyCore, s.binary}, args...)...); err != nil {
			return all, err
		}
		all = append(all, p)
		if err := ready(ctx, p.Process, p.url(workload{path: "/small"}), p.url(workload{path: "/small", tls: true})); err != nil {
			return all, err
		}
	}
	return all, nil
}

// writeCertificate writes one for anybody, in the forms that proxies want.
func writeCertificate(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"bench.example"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	secret := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	return errors.Join(os.WriteFile(filepath.Join(dir, "cert.pem"), cert, 0o600), os.WriteFile(filepath.Join(dir, "key.pem"), secret, 0o600),
		os.WriteFile(filepath.Join(dir, "both.pem"), append(cert, secret...), 0o600))
}

func decreeArgs(cfg *Config, http, https, backend int) ([]string, error) {
	return []string{"bench", "ingress", "--serve", fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d,127.0.0.1:%d", http, https, backend), "--certificate", cfg.Dir}, nil
}

// Serve is the process that is measured: the proxy with one ingress. at are its addresses
// for HTTP and HTTPS, and that of the backend; dir has the certificate.
func Serve(ctx context.Context, at, dir string) error {
	addresses := strings.Split(at, ",")
	if len(addresses) != 3 {
		return fmt.Errorf("%q: expected three addresses", at)
	}
	back, err := netip.ParseAddrPort(addresses[2])
	if err != nil {
		return err
	}
	cert, err1 := os.ReadFile(filepath.Join(dir, "cert.pem"))
	key, err2 := os.ReadFile(filepath.Join(dir, "key.pem"))
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	s, err := ingress.New(ingress.Config{HTTP: addresses[0], HTTPS: addresses[1]})
	if err != nil {
		return err
	}
	about := metav1.ObjectMeta{Namespace: "bench", Name: "bench"}
	ofService := metav1.ObjectMeta{Namespace: "bench", Name: "bench", Labels: map[string]string{discoveryv1.LabelServiceName: "bench"}}
	port, name, prefix := int32(back.Port()), "", networkingv1.PathTypePrefix
	var o route.Objects
	o.Services = []*corev1.Service{{ObjectMeta: about, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}}
	o.Slices = []*discoveryv1.EndpointSlice{{ObjectMeta: ofService, AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{back.Addr().String()}}}}}
	o.Secrets = []*corev1.Secret{{ObjectMeta: about, Type: corev1.SecretTypeTLS, Data: map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key}}}
	to := networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "bench", Port: networkingv1.ServiceBackendPort{Number: 80}}}
	rule := networkingv1.IngressRule{}
	rule.HTTP = &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{{Path: "/", PathType: &prefix, Backend: to}}}
	o.Ingresses = []*networkingv1.Ingress{{ObjectMeta: about, Spec: networkingv1.IngressSpec{Rules: []networkingv1.IngressRule{rule}, TLS: []networkingv1.IngressTLS{{SecretName: "bench"}}}}}
	o.Ingresses[0].Annotations = map[string]string{"ingress.decree.dev/ssl-redirect": "false"}
	s.Set(o)
	return s.Run(ctx)
}

// Answer is the backend for machines without nginx.
func Answer(ctx context.Context, at string) error {
	body := make([]byte, large)
	srv := &http.Server{Addr: at, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			w.Header().Set("Content-Length", strconv.Itoa(large))
			_, _ = w.Write(body)
			return
		}
		_, _ = io.WriteString(w, "hello, world")
	})}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// nginxHead begins a configuration with one worker that writes no logs.
func nginxHead(dir, name string) string {
	return fmt.Sprintf("daemon off; master_process off; worker_processes 1; pid %[1]s/%[2]s.pid; error_log /dev/null;\nevents { worker_connections 4096; }\nhttp { access_log off; sendfile on; tcp_nodelay on;\n"+
		"client_body_temp_path %[1]s; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;\n", dir, name)
}

// nginxArgs: connections to the backend are kept, which nginx does not do by itself.
func nginxArgs(cfg *Config, http, https, backend int) ([]string, error) {
	conf := nginxHead(cfg.Dir, "nginx") + fmt.Sprintf(`upstream back { server 127.0.0.1:%d; keepalive 512; keepalive_requests 100000000; }
server {
	listen 127.0.0.1:%d backlog=1024; listen 127.0.0.1:%d ssl http2; keepalive_requests 100000000;
	ssl_certificate %s/cert.pem; ssl_certificate_key %[4]s/key.pem; ssl_protocols TLSv1.2 TLSv1.3;
	location / {
		proxy_pass http://back; proxy_http_version 1.1; proxy_set_header Connection "";
		proxy_set_header Host $host; proxy_set_header X-Real-IP $remote_addr; proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme; proxy_set_header X-Forwarded-Host $host;
	}
}
}
`, backend, http, https, cfg.Dir)
	path := filepath.Join(cfg.Dir, "nginx.conf")
	return []string{"-c", path}, os.WriteFile(path, []byte(conf), 0o600)
}

func haproxyArgs(cfg *Config, http, https, backend int) ([]string, error) {
	conf := fmt.Sprintf(`global
	nbthread 1
	maxconn 4096
defaults
	mode http
	timeout client 60s
	timeout server 60s
	timeout connect 5s
	http-reuse always
frontend front
	bind 127.0.0.1:%d
	bind 127.0.0.1:%d ssl crt %s/both.pem alpn h2,http/1.1
	option forwardfor
	http-request set-header X-Forwarded-Proto https if { ssl_fc }
	default_backend back
backend back
	server one 127.0.0.1:%d
`, http, https, cfg.Dir, backend)
	path := filepath.Join(cfg.Dir, "haproxy.cfg")
	return []string{"-db", "-f", path}, os.WriteFile(path, []byte(conf), 0o600)
}

func caddyArgs(cfg *Config, http, https, backend int) ([]string, error) {
	conf := fmt.Sprintf(`{
	admin off
	auto_https off
	log {
		output discard
	}
}
http://:%d {
	bind 127.0.0.1
	reverse_proxy 127.0.0.1:%[3]d
}
https://:%[2]d {
	bind 127.0.0.1
	tls %[4]s/cert.pem %[4]s/key.pem
	reverse_proxy 127.0.0.1:%[3]d
}
`, http, https, backend, cfg.Dir)
	path := filepath.Join(cfg.Dir, "Caddyfile")
	return []string{"run", "--adapter", "caddyfile", "--config", path}, os.WriteFile(path, []byte(conf), 0o600)
}
