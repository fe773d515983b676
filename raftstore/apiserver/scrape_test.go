package apiserver_test

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/pki"
)

// TestScrape: the metrics of a node are below its proxy, for administrators; what goes
// wrong is told in the words of the API.
func TestScrape(t *testing.T) {
	f := newFixture(t, func(c *apiserver.Config) { c.Scrape = 20 * time.Millisecond })
	for _, name := range []string{"n1", "away", "slow", "large", "page"} {
		f.create(newNode(name))
	}
	admin := pki.Admin("admin")
	c := f.http(&admin)
	req, err := http.NewRequestWithContext(timeout(t), http.MethodGet, f.url+"/api/v1/nodes/n1/proxy/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Accept": {"application/openmetrics-text"}, "Accept-Encoding": {"snappy"}, "User-Agent": {"me"}}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if want := "#  reads application/openmetrics-text of n1\n"; err != nil || string(body) != want {
		t.Errorf("%q, %v, want %q", body, err, want)
	}
	for name, want := range map[string]string{"Content-Type": "text/plain; version=0.0.4", "Content-Encoding": "snappy", "X-Content-Type-Options": "nosniff"} {
		if got := resp.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}

	for _, tt := range []struct {
		method, path string
		code         int
		text         string
	}{
		{"GET", "none/proxy/metrics", 404, `nodes "none" not found`},
		{"GET", "away/proxy/metrics", 503, "not connected"},
		{"GET", "slow/proxy/metrics", 504, "node slow did not say its metrics within 20ms"},
		{"GET", "large/proxy/metrics", 500, "more than 8388608 bytes"},
		{"GET", "page/proxy/metrics", 500, "no format of metrics"},
		{"GET", "n1/proxy", 404, "does not serve"},
		{"GET", "n1/proxy/", 404, "does not serve"},
		{"GET", "n1/proxy/metrics/cadvisor", 404, "does not serve nodes/proxy/metrics/cadvisor"},
		{"GET", "n1/proxy/run/default/web", 404, "does not serve"},
		{"GET", "n1/log/metrics", 404, "does not serve"},
		{"POST", "n1/proxy/metrics", 405, "not supported"},
		{"DELETE", "n1/proxy/metrics", 405, "not supported"},
	} {
		code, body := f.raw(c, tt.method, "/api/v1/nodes/"+tt.path, "")
		var s metav1.Status
		if code != tt.code || json.Unmarshal([]byte(body), &s) != nil || !strings.Contains(s.Message, tt.text) {
			t.Errorf("%s %s: %d %s, want %d %q", tt.method, tt.path, code, body, tt.code, tt.text)
		}
	}
	for _, who := range []pki.Request{pki.Node("n1"), {Name: "ann"}} {
		if code, body := f.raw(f.http(&who), "GET", "/api/v1/nodes/n1/proxy/metrics", ""); code != 403 || !strings.Contains(body, "nodes/proxy") {
			t.Errorf("%s: %d %s", who.Name, code, body)
		}
	}
	if code, body := f.raw(c, "GET", "/api/v1", ""); code != 200 || !strings.Contains(body, `"nodes/proxy"`) {
		t.Errorf("discovery: %d %s", code, body)
	}
}
