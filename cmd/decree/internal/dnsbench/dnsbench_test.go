package dnsbench

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"testing"

	"github.com/miekg/dns"

	"decree.dev/decree/cmd/decree/internal/process"
)

func TestParseDnsperf(t *testing.T) {
	l, err := parseDnsperf(`
Statistics:

  Queries sent:         12345
  Queries completed:    12340 (99.96%)
  Queries lost:         5 (0.04%)

  Response codes:       NOERROR 12340 (100.00%)
  Run time (s):         2.000100
  Queries per second:   6169.691515
`)
	if err != nil || l.completed != 12340 || l.lost != 5 || l.perSec != 6169.691515 {
		t.Errorf("%+v, %v", l, err)
	}
	if _, err := parseDnsperf("usage: dnsperf"); err == nil {
		t.Error("no figures are taken for some")
	}
}

// TestServe: the server that is measured knows what it is asked, from the cluster and from
// upstream, and nothing is lost.
func TestServe(t *testing.T) {
	up, err := startUpstream()
	if err != nil {
		t.Fatal(err)
	}
	defer up.close()
	port, err := process.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), up.address(), 500) }()
	defer func() { cancel(); <-ended }()
	if err := new(process.Process).Await(ctx, (&server{name: "decree", port: port}).try); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Names: 500}
	for _, w := range workloads(&cfg) {
		want := "NOERROR 1"
		if w.name == "absent names" {
			want = "NXDOMAIN 0"
		}
		questions := []string{}
		for i := range 500 {
			questions = append(questions, w.question(0, i))
		}
		l, err := generateHere(ctx, port, questions, 0)
		if err != nil || l.completed != 500 || l.lost != 0 || l.perSec <= 0 {
			t.Errorf("%s: %+v, %v", w.name, l, err)
		}
		if p50, p99, err := oneAtATime(ctx, port, questions, 100); err != nil || p50 <= 0 || p99 < p50 {
			t.Errorf("%s: %v, %v, %v", w.name, p50, p99, err)
		}
		q, err := packets(questions[7:8])
		if err != nil {
			t.Fatal(err)
		}
		req := new(dns.Msg)
		if err := req.Unpack(q[0]); err != nil {
			t.Fatal(err)
		}
		m, _, err := new(dns.Client).Exchange(req, net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(dns.RcodeToString[m.Rcode], " ", len(m.Answer)); got != want {
			t.Errorf("%s: %s, want %s", questions[7], got, want)
		}
	}
}
