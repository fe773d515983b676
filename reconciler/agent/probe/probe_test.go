package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func serve(t *testing.T) (Target, int) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Key") != "k" || r.Host != "shop.example" {
			http.Error(w, "who are you, "+r.Host, http.StatusForbidden)
		}
	})
	mux.HandleFunc("/sick", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, "no database\n"+strings.Repeat("x", 1<<20))
	})
	mux.HandleFunc("/loop", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/loop", http.StatusFound) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://elsewhere.invalid/", http.StatusFound)
	})
	mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	host, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return Target{IP: host, Container: &corev1.Container{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: int32(n)}}}}, n
}

func TestHTTP(t *testing.T) {
	target, _ := serve(t)
	for _, test := range []struct {
		path, port string
		headers    []corev1.HTTPHeader
		want       Outcome
		message    string
	}{
		{"/ok", "http", []corev1.HTTPHeader{{Name: "X-Key", Value: "k"}, {Name: "Host", Value: "shop.example"}}, Success, "200"},
		{"ok", "http", nil, Failure, "403: who are you"},
		{"/sick", "http", nil, Failure, "statuscode: 503: no database xxx"},
		{"/loop", "http", nil, Failure, "redirects"},
		{"/away", "http", nil, Success, "302"},
		{"/slow", "http", nil, Failure, "timed out"},
		{"/ok", "nope", nil, Failure, `no port named "nope"`},
	} {
		p := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: test.path, Port: intstr.FromString(test.port), HTTPHeaders: test.headers}}}
		r := Check(t.Context(), p, target)
		if r.Outcome != test.want || !strings.Contains(r.Message, test.message) || len(r.Message) > 400 {
			t.Errorf("%s: %s %q, want %s %q", test.path, r.Outcome, r.Message, test.want, test.message)
		}
	}
}

func TestTCP(t *testing.T) {
	target, port := serve(t)
	p := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(port)}}}
	if r := Check(t.Context(), p, target); r.Outcome != Success {
		t.Errorf("open port: %+v", r)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.TCPSocket.Port = intstr.FromInt(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	if r := Check(t.Context(), p, target); r.Outcome != Failure || !strings.Contains(r.Message, "refused") {
		t.Errorf("closed port: %+v", r)
	}
}

func TestExec(t *testing.T) {
	p := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"x"}}}, TimeoutSeconds: 1}
	for name, test := range map[string]struct {
		code int
		err  error
		wait bool
		want Outcome
	}{
		"zero":           {0, nil, false, Success},
		"not zero":       {3, nil, false, Failure},
		"lost runtime":   {0, errors.New("connection refused"), false, Unknown},
		"beyond timeout": {0, nil, true, Failure},
	} {
		target := Target{Exec: func(ctx context.Context, _ []string, out io.Writer) (int, error) {
			fmt.Fprint(out, "some text")
			if test.wait {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return test.code, test.err
		}}
		begin := time.Now()
		r := Check(t.Context(), p, target)
		if r.Outcome != test.want || time.Since(begin) > 10*time.Second {
			t.Errorf("%s: %+v after %s", name, r, time.Since(begin))
		}
		if r.Outcome == Failure && !strings.Contains(r.Message, "some text") {
			t.Errorf("%s: the output is not shown: %q", name, r.Message)
		}
	}
}
