package dnsbench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/cmd/decree/internal/process"
	clusterdns "decree.dev/decree/netplane/dns"
	"decree.dev/decree/netplane/render"
)

// server is one that is measured, as a process.
type server struct {
	*process.Process
	name string
	port int
}

// start starts all servers that there are. Those that it returns have to be stopped, also
// if there is an error.
func start(ctx context.Context, cfg *Config, upstream string) (all []*server, err error) {
	for _, s := range []struct {
		name, binary string
		args         func(cfg *Config, dir string, port int, upstream string) ([]string, error)
	}{{"decree", cfg.Binary, decreeArgs}, {"coredns", cfg.CoreDNS, corednsArgs}, {"unbound", cfg.Unbound, unboundArgs}} {
		if s.binary == "" {
			continue
		}
		port, err := process.FreePort()
		if err != nil {
			return all, err
		}
		args, err := s.args(cfg, cfg.Dir, port, upstream)
		if err != nil {
			return all, err
		}
		run := &server{name: s.name, port: port}
		if run.Process, err = process.Start(ctx, s.name, nil, append([]string{s.binary}, args...)...); err != nil {
			return all, err
		}
		all = append(all, run)
		if err := run.ready(ctx); err != nil {
			return all, err
		}
	}
	return all, nil
}

// ready waits until the server answers for a service.
func (s *server) ready(ctx context.Context) error { return s.Await(ctx, s.try) }

func (s *server) try(ctx context.Context) error {
	m, _, err := (&dns.Client{Timeout: time.Second}).ExchangeContext(ctx, new(dns.Msg).SetQuestion(dns.Fqdn(serviceName(0)), dns.TypeA), s.address())
	if err == nil && len(m.Answer) != 1 {
		err = fmt.Errorf("%d answers", len(m.Answer))
	}
	return err
}

func (s *server) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

func decreeArgs(cfg *Config, _ string, port int, upstream string) ([]string, error) {
	return []string{"bench", "dns", "--serve", fmt.Sprintf("127.0.0.1:%d", port), "--upstream", upstream, "--names", strconv.Itoa(cfg.Names)}, nil
}

// Serve is the process that is measured: the cluster DNS with services of its own.
func Serve(ctx context.Context, at, upstream string, names int) error {
	d := render.Desired{Domain: domain, DNS: netip.MustParseAddr("127.0.0.99"), ServiceCIDR: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}}
	for i := range names {
		name, _, _ := strings.Cut(serviceName(i), ".")
		d.Services = append(d.Services, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace(i)},
			Spec:       corev1.ServiceSpec{ClusterIP: address(i), Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
		})
	}
	for i := range 50 { // a name that is absent is so in a namespace that is there
		d.Services = append(d.Services, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "any", Namespace: namespace(i)}, Spec: corev1.ServiceSpec{ClusterIP: "10.111.255.1"}})
	}
	up, err := netip.ParseAddrPort(upstream)
	if err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	s := clusterdns.New(clusterdns.Config{Upstreams: []netip.AddrPort{up}})
	s.Set(d)
	pc, err := net.ListenPacket("udp", at)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", at)
	if err != nil {
		return errors.Join(err, pc.Close())
	}
	return s.Serve(ctx, pc, ln)
}

// corednsArgs: the zone is a file, as its kubernetes plugin needs an API server; that makes
// it quicker, if anything. Cache and forwarding are as in the clusters of kubeadm.
func corednsArgs(cfg *Config, dir string, port int, upstream string) ([]string, error) {
	var zone strings.Builder
	fmt.Fprintf(&zone, "$ORIGIN %s.\n@ 5 IN SOA ns.dns hostmaster 1 7200 1800 86400 5\n@ 5 IN NS ns.dns\nns.dns 5 IN A 127.0.0.99\n", domain)
	for i := range cfg.Names {
		fmt.Fprintf(&zone, "%s. 5 IN A %s\n", serviceName(i), address(i))
	}
	conf := fmt.Sprintf(".:%d {\n\tbind 127.0.0.1\n\tfile %s %s\n\tforward . %s\n\tcache 300\n}\n", port, filepath.Join(dir, "zone"), domain, upstream)
	path := filepath.Join(dir, "Corefile")
	return []string{"-conf", path}, errors.Join(os.WriteFile(filepath.Join(dir, "zone"), []byte(zone.String()), 0o600), os.WriteFile(path, []byte(conf), 0o600))
}

// unboundArgs: as many threads as decree has, and no validation, which decree leaves to its
// upstreams.
func unboundArgs(cfg *Config, dir string, port int, upstream string) ([]string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, `server:
	interface: 127.0.0.1
	port: %d
	num-threads: 2
	so-reuseport: yes
	do-daemonize: no
	use-syslog: no
	username: ""
	chroot: ""
	pidfile: ""
	directory: "%s"
	module-config: "iterator"
	qname-minimisation: no
	do-not-query-localhost: no
	access-control: 127.0.0.0/8 allow
	local-zone: "%s." static
	local-data: "%s. 5 IN SOA ns.dns.%s. hostmaster.%s. 1 7200 1800 86400 5"
`, port, dir, domain, domain, domain, domain)
	for i := range cfg.Names {
		fmt.Fprintf(&b, "\tlocal-data: \"%s. 5 IN A %s\"\n", serviceName(i), address(i))
	}
	fmt.Fprintf(&b, "forward-zone:\n\tname: \".\"\n\tforward-addr: %s\nremote-control:\n\tcontrol-enable: no\n", strings.Replace(upstream, ":", "@", 1))
	path := filepath.Join(dir, "unbound.conf")
	return []string{"-d", "-c", path}, os.WriteFile(path, []byte(b.String()), 0o600)
}
