package ingressbench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"decree.dev/decree/cmd/decree/internal/process"
)

func TestReadLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "requests")
	text := ""
	for i := range 100 {
		text += fmt.Sprintf("%d\t200\t%d\n", 1e15+i, 1000-i)
	}
	if err := os.WriteFile(path, []byte(text+"1\t502\t7\n2\t-1\t9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := readLog(path, 2*time.Second)
	if err != nil || l.perSec != 50 || l.done != 100 || l.failed != 2 || l.p50 != 951 || l.p99 != 1000 {
		t.Errorf("%+v, %v", l, err)
	}
	if err := os.WriteFile(path, []byte("usage: h2load\n\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readLog(path, time.Second); err == nil {
		t.Error("no figures are taken for some")
	}
}

// TestServe: the proxy that is measured leads all workloads to the backend.
func TestServe(t *testing.T) {
	dir := t.TempDir()
	if err := writeCertificate(dir); err != nil {
		t.Fatal(err)
	}
	var ports [3]int
	for i := range ports {
		var err error
		if ports[i], err = process.FreePort(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- Answer(ctx, fmt.Sprintf("127.0.0.1:%d", ports[2])) }()
	go func() {
		ended <- Serve(ctx, fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d,127.0.0.1:%d", ports[0], ports[1], ports[2]), dir)
	}()
	defer func() { cancel(); <-ended; <-ended }()
	p := proxy{http: ports[0], https: ports[1]}
	for _, w := range workloads {
		if err := ready(ctx, new(process.Process), p.url(w)); err != nil {
			t.Errorf("%s: %v", w.name, err)
		}
	}
}
