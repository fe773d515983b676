package apiserver_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/pki"
)

// oneSize is a terminal that is never resized.
type oneSize struct {
	sizes chan remotecommand.TerminalSize
}

func (q oneSize) Next() *remotecommand.TerminalSize {
	s, ok := <-q.sizes
	if !ok {
		return nil
	}
	return &s
}

// TestExecProtocols runs the same sessions over SPDY, as kubectl up to 1.29 does,
// and over WebSocket, as newer ones do.
func TestExecProtocols(t *testing.T) {
	f := newFixture(t)
	f.create(newPod("web-1", "n1"))
	cfg := f.restConfig()
	path := "/api/v1/namespaces/default/pods/web-1/exec?"
	protocols := map[string]func(query string) (remotecommand.Executor, error){
		"websocket": func(q string) (remotecommand.Executor, error) {
			return remotecommand.NewWebSocketExecutor(cfg, http.MethodGet, f.url+path+q)
		},
		"spdy": func(q string) (remotecommand.Executor, error) {
			req, err := http.NewRequestWithContext(timeout(t), http.MethodPost, f.url+path+q, nil)
			if err != nil {
				return nil, err
			}
			return remotecommand.NewSPDYExecutor(cfg, http.MethodPost, req.URL)
		},
	}
	for name, open := range protocols {
		t.Run(name, func(t *testing.T) {
			run := func(query string, o remotecommand.StreamOptions) error {
				t.Helper()
				e, err := open(query)
				if err != nil {
					t.Fatal(err)
				}
				return e.StreamWithContext(timeout(t), o)
			}
			var out, errs bytes.Buffer
			if err := run("command=cat&stdin=true&stdout=true", remotecommand.StreamOptions{Stdin: strings.NewReader("through"), Stdout: &out}); err != nil || out.String() != "through" {
				t.Errorf("cat: %q %v", out.String(), err)
			}
			err := run("command=fail&stderr=true", remotecommand.StreamOptions{Stderr: &errs})
			var exit exec.CodeExitError
			if !errors.As(err, &exit) || exit.Code != 7 || errs.String() != "it went wrong\n" {
				t.Errorf("fail: %q %v", errs.String(), err)
			}
			out.Reset()
			sizes := oneSize{make(chan remotecommand.TerminalSize, 1)}
			sizes.sizes <- remotecommand.TerminalSize{Width: 80, Height: 25}
			close(sizes.sizes)
			if err := run("command=size&stdout=true&tty=true", remotecommand.StreamOptions{Stdout: &out, Tty: true, TerminalSizeQueue: sizes}); err != nil || out.String() != "80x25" {
				t.Errorf("size: %q %v", out.String(), err)
			}
			if err := run("stdout=true", remotecommand.StreamOptions{Stdout: &out}); err == nil || !strings.Contains(err.Error(), "exec needs a command") {
				t.Errorf("no command: %v", err)
			}
			ctx, cancel := context.WithCancel(timeout(t))
			done := make(chan error, 1)
			e, err := open("command=wait&stdout=true")
			if err != nil {
				t.Fatal(err)
			}
			go func() { done <- e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out}) }()
			<-f.nodes.started
			cancel()
			if err := <-f.nodes.ended; err == nil {
				t.Error("the process goes on without its client")
			}
			<-done
		})
	}
}

func TestStreamsAreBounded(t *testing.T) {
	f := newFixture(t, func(c *apiserver.Config) { c.Streams = 1 })
	f.create(newPod("web-1", "n1"))
	e, err := remotecommand.NewWebSocketExecutor(f.restConfig(), http.MethodGet, f.url+"/api/v1/namespaces/default/pods/web-1/exec?command=wait&stdout=true")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(timeout(t))
	done := make(chan error, 1)
	go func() { done <- e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &bytes.Buffer{}}) }()
	<-f.nodes.started
	code, _ := f.raw(f.http(&pki.Request{Name: "admin", Groups: []string{pki.GroupAdmins}}), "GET", "/api/v1/namespaces/default/pods/web-1/log", "")
	if code != http.StatusTooManyRequests {
		t.Errorf("a second stream: %d", code)
	}
	cancel()
	<-f.nodes.ended
	<-done
	if strings.Contains(f.logs.String(), "command=wait") {
		t.Error("the command is in the log")
	}
}

func (f *fixture) restConfig() *rest.Config {
	k, err := pki.ReadKubeconfig(f.kubeconfig)
	if err != nil {
		f.t.Fatal(err)
	}
	return &rest.Config{Host: f.url, TLSClientConfig: rest.TLSClientConfig{CAData: k.CA, CertData: k.Pair.CertPEM, KeyData: k.Pair.KeyPEM}}
}
