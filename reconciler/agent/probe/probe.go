// Package probe carries out one check of a container: HTTP, TCP, gRPC or a command
// in the container. When to check, and what follows, is decided by the agent.
package probe

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Outcome is what a check says. Unknown means that the check itself could not be
// made: it must change nothing.
type Outcome uint8

// The outcomes.
const (
	Unknown Outcome = iota
	Success
	Failure
)

// String names the outcome, for metrics and logs.
func (o Outcome) String() string { return [...]string{"unknown", "success", "failure"}[o] }

// Result is an outcome and what was seen, fit to be shown to people.
type Result struct {
	Outcome Outcome
	Message string
}

const (
	bodyLimit    = 10 << 10 // read from an HTTP answer or a command
	excerptLimit = 256      // of it shown
	maxRedirects = 10
)

// Target is the container to check.
type Target struct {
	IP        string // of the pod
	Container *corev1.Container
	// Dial opens connections from the node; nil: net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Exec runs a command in the container and returns its exit code.
	Exec func(ctx context.Context, command []string, out io.Writer) (int, error)
}

// Check makes one check, within the probe's timeout (1 s when not set).
func Check(ctx context.Context, p *corev1.Probe, t Target) Result {
	timeout := time.Duration(max(p.TimeoutSeconds, 1)) * time.Second
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	switch {
	case p.HTTPGet != nil:
		return httpGet(ctx, p.HTTPGet, t)
	case p.TCPSocket != nil:
		return tcp(ctx, p.TCPSocket, t)
	case p.Exec != nil:
		return command(ctx, p.Exec.Command, timeout, t)
	case p.GRPC != nil:
		return grpcHealth(ctx, p.GRPC, t)
	}
	return Result{Unknown, "the probe has none of httpGet, tcpSocket, exec and grpc"}
}

// HTTPGet makes one request as a lifecycle hook does.
func HTTPGet(ctx context.Context, h *corev1.HTTPGetAction, t Target) Result {
	return httpGet(ctx, h, t)
}

func httpGet(ctx context.Context, h *corev1.HTTPGetAction, t Target) Result {
	req, err := request(ctx, h, t)
	if err != nil {
		return Result{Failure, err.Error()}
	}
	transport := &http.Transport{
		DialContext: t.dialer(), DisableKeepAlives: true, DisableCompression: true,
		// A probe asks whether the container answers, not who it is; Kubernetes
		// does not verify either.
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: true},
		MaxResponseHeaderBytes: 64 << 10,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: func(next *http.Request, via []*http.Request) error {
		if next.URL.Hostname() != req.URL.Hostname() {
			return http.ErrUseLastResponse // an answer that sends elsewhere is an answer
		}
		if len(via) >= maxRedirects {
			return fmt.Errorf("stopped after %d redirects", maxRedirects)
		}
		return nil
	}}
	res, err := client.Do(req)
	if err != nil {
		return Result{Failure, describe(ctx, err)}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, bodyLimit))
	if err != nil {
		return Result{Failure, "read the answer: " + describe(ctx, err)}
	}
	if res.StatusCode >= 200 && res.StatusCode < 400 {
		return Result{Success, res.Status}
	}
	return Result{Failure, fmt.Sprintf("HTTP probe failed with statuscode: %d%s", res.StatusCode, excerpt(body))}
}

func request(ctx context.Context, h *corev1.HTTPGetAction, t Target) (*http.Request, error) {
	port, err := portOf(h.Port, t.Container)
	if err != nil {
		return nil, err
	}
	scheme := strings.ToLower(string(h.Scheme))
	if scheme == "" {
		scheme = "http"
	}
	host := h.Host
	if host == "" {
		host = t.IP
	}
	u, err := url.Parse(h.Path)
	if err != nil {
		u = &url.URL{Path: h.Path}
	}
	if !strings.HasPrefix(u.Path, "/") {
		u.Path = "/" + u.Path
	}
	u.Scheme, u.Host = scheme, net.JoinHostPort(host, strconv.Itoa(port))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "decree-probe")
	req.Header.Set("Accept", "*/*")
	for _, hd := range h.HTTPHeaders {
		if strings.EqualFold(hd.Name, "Host") {
			req.Host = hd.Value
			continue
		}
		req.Header.Add(hd.Name, hd.Value)
	}
	return req, nil
}

func tcp(ctx context.Context, a *corev1.TCPSocketAction, t Target) Result {
	port, err := portOf(a.Port, t.Container)
	if err != nil {
		return Result{Failure, err.Error()}
	}
	host := a.Host
	if host == "" {
		host = t.IP
	}
	conn, err := t.dialer()(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return Result{Failure, describe(ctx, err)}
	}
	conn.Close()
	return Result{Success, "connected"}
}

func command(ctx context.Context, cmd []string, timeout time.Duration, t Target) Result {
	out := &limited{max: bodyLimit}
	code, err := t.Exec(ctx, cmd, out)
	switch {
	case errors.Is(err, context.DeadlineExceeded) || (err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded)):
		return Result{Failure, fmt.Sprintf("command timed out after %s%s", timeout, excerpt(out.Bytes()))}
	case err != nil:
		return Result{Unknown, err.Error()}
	case code != 0:
		return Result{Failure, fmt.Sprintf("command exited with %d%s", code, excerpt(out.Bytes()))}
	}
	return Result{Success, "command exited with 0"}
}

func grpcHealth(ctx context.Context, a *corev1.GRPCAction, t Target) Result {
	dial := t.dialer()
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(t.IP, strconv.Itoa(int(a.Port))),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUserAgent("decree-probe"),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dial(ctx, "tcp", addr) }))
	if err != nil {
		return Result{Failure, err.Error()}
	}
	defer conn.Close()
	req := &grpc_health_v1.HealthCheckRequest{}
	if a.Service != nil {
		req.Service = *a.Service
	}
	res, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, req)
	if err != nil {
		return Result{Failure, "gRPC health check: " + err.Error()}
	}
	if res.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		return Result{Failure, "gRPC health check: service is " + res.Status.String()}
	}
	return Result{Success, "SERVING"}
}

func (t Target) dialer() func(context.Context, string, string) (net.Conn, error) {
	if t.Dial != nil {
		return t.Dial
	}
	return (&net.Dialer{KeepAlive: -1}).DialContext
}

// portOf resolves a port number or the name of one of the container's ports.
func portOf(p intstr.IntOrString, c *corev1.Container) (int, error) {
	if p.Type == intstr.Int {
		return int(p.IntVal), nil
	}
	for _, cp := range c.Ports {
		if cp.Name == p.StrVal {
			return int(cp.ContainerPort), nil
		}
	}
	if n, err := strconv.Atoi(p.StrVal); err == nil && n > 0 && n < 1<<16 {
		return n, nil
	}
	return 0, fmt.Errorf("the container has no port named %q", p.StrVal)
}

// describe prefers the deadline to the noise that it causes.
func describe(ctx context.Context, err error) string {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return "timed out: " + err.Error()
	}
	return err.Error()
}

// excerpt is the beginning of what a container said, on one line.
func excerpt(body []byte) string {
	s := strings.Join(strings.Fields(strings.ToValidUTF8(string(body), "?")), " ")
	if s == "" {
		return ""
	}
	if len(s) > excerptLimit {
		s = strings.ToValidUTF8(s[:excerptLimit], "") + "…"
	}
	return ": " + s
}

// limited keeps the first max bytes and forgets the rest.
type limited struct {
	bytes.Buffer
	max int
}

func (l *limited) Write(p []byte) (int, error) {
	if room := l.max - l.Len(); room > 0 {
		l.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
