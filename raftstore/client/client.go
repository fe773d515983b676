// Package client talks to an API server of the cluster: it is what the CLI and the
// agents use. It has typed reads and watches by the registry of kinds, tables, logs,
// exec, reports of nodes, and [Mirror], an agent's local copy that outlives every
// server.
//
// It decides nothing: errors of the server are passed on as the *apierrors.StatusError
// they are, so that k8s.io/apimachinery/pkg/api/errors tells them apart.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/pki"
)

// Config says which server to ask, and as whom.
type Config struct {
	Server string // "https://127.0.0.1:7443"
	// Others, when not nil, returns more servers of the same cluster, as host:port. One
	// of them is asked when a server cannot be reached.
	Others func() []string
	// TLS, when not nil, is used instead of CA and certificates: see
	// [pki.Keeper.ClientTLS].
	TLS  *tls.Config
	CA   []byte // PEM
	Pair pki.Pair

	// Stale has reads answered with what the server has at hand, without a leader or a
	// quorum: see [Client.Lag].
	Stale bool

	Timeout time.Duration // of a request that is not a stream; 30 s
	Retries int           // more attempts after a lost connection or an overloaded server; 4, negative: none
	Log     *slog.Logger  // nil: slog.Default()
}

// FromKubeconfig reads the current context of a kubeconfig file.
func FromKubeconfig(path string) (Config, error) {
	k, err := pki.ReadKubeconfig(path)
	if err != nil {
		return Config{}, err
	}
	return Config{Server: k.Server, CA: k.CA, Pair: k.Pair}, nil
}

// Client is safe for concurrent use. Close releases idle connections.
type Client struct {
	cfg  Config
	base atomic.Pointer[url.URL]
	lag  atomic.Pointer[string]
	tls  *tls.Config
	http *http.Client
	log  *slog.Logger
}

// New returns a Client; it makes no connection yet.
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(strings.TrimSuffix(cfg.Server, "/"))
	if err != nil || base.Scheme != "https" || base.Host == "" {
		return nil, fmt.Errorf("new client: server %q is not an address such as https://127.0.0.1:7443", cfg.Server)
	}
	pool := x509.NewCertPool()
	if cfg.TLS == nil && !pool.AppendCertsFromPEM(cfg.CA) {
		return nil, errors.New("new client: the CA holds no certificate")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 30 * time.Second
	}
	if cfg.Retries == 0 {
		cfg.Retries = 4
	}
	c := &Client{cfg: cfg, log: cfg.Log, tls: cfg.TLS}
	c.base.Store(base)
	if c.log == nil {
		c.log = slog.Default()
	}
	if c.tls == nil {
		pair, err := cfg.Pair.TLS()
		if err != nil {
			return nil, fmt.Errorf("new client: %w", err)
		}
		c.tls = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, Certificates: []tls.Certificate{pair}}
	}
	c.http = &http.Client{Transport: &http.Transport{
		TLSClientConfig:     c.tls,
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		IdleConnTimeout:     90 * time.Second,
		ForceAttemptHTTP2:   true,
		// Pings find servers that vanished: watches are silent for long.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 10 * time.Second},
	}}
	return c, nil
}

// Close releases idle connections; requests under way are not disturbed.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Server returns the address of the server that is asked now.
func (c *Client) Server() string { return c.base.Load().String() }

// Lag is how old the last answer to a Stale read may be, in words; empty if the server
// did not say.
func (c *Client) Lag() string {
	if lag := c.lag.Load(); lag != nil {
		return *lag
	}
	return ""
}

// turn goes on to the next server, unless somebody has done so already. It reports
// whether there is another one.
func (c *Client) turn(from *url.URL) bool {
	if c.cfg.Others == nil {
		return false
	}
	others := c.cfg.Others()
	at := slices.Index(others, from.Host) // -1 begins with the first
	for i := range others {
		next := others[(at+1+i)%len(others)]
		if next == from.Host {
			continue
		}
		u := *from
		u.Host = next
		c.base.CompareAndSwap(from, &u)
		return true
	}
	return false
}

// request describes one call.
type request struct {
	method, path string
	query        url.Values
	accept       string
	body         []byte
	contentType  string
	// again allows a retry although the server may have acted already.
	again bool
}

// do sends r and returns the answer if its code says success. A lost connection and
// a server that asks for patience are met with retries, as far as that is harmless.
func (c *Client) do(ctx context.Context, r request) (*http.Response, error) {
	for attempt := 0; ; attempt++ {
		base := c.base.Load()
		resp, err := c.once(ctx, base, r)
		if err == nil {
			return resp, nil
		}
		if !isStatus(err) || apierrors.IsServiceUnavailable(err) {
			c.turn(base)
		}
		if attempt >= c.cfg.Retries || ctx.Err() != nil || !retriable(err, r) {
			return nil, err
		}
		wait := min(100*time.Millisecond<<attempt, 3*time.Second)
		c.log.Debug("retry", "method", r.method, "path", r.path, "error", err, "after", wait)
		if !sleep(ctx, wait/2+rand.N(wait/2+1)) {
			return nil, err
		}
	}
}

// retriable: the connection was never made, or the call changes nothing.
func retriable(err error, r request) bool {
	var op *net.OpError
	switch {
	case apierrors.IsServiceUnavailable(err), apierrors.IsTooManyRequests(err):
		return true
	case isStatus(err):
		return false
	case errors.As(err, &op) && op.Op == "dial":
		return true
	}
	return r.method == http.MethodGet || r.again
}

func isStatus(err error) bool {
	var s apierrors.APIStatus
	return errors.As(err, &s)
}

func (c *Client) once(ctx context.Context, base *url.URL, r request) (*http.Response, error) {
	u := *base
	u.Path += r.path
	if c.cfg.Stale && r.method == http.MethodGet && r.query.Get("watch") == "" {
		q := url.Values{"resourceVersion": {"0"}}
		maps.Copy(q, r.query)
		r.query = q
	}
	u.RawQuery = r.query.Encode()
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), bytes.NewReader(r.body))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	req.Header.Set("Accept", orDefault(r.accept, "application/json"))
	if r.contentType != "" {
		req.Header.Set("Content-Type", r.contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // the URL is said below, without its query
		}
		return nil, fmt.Errorf("%s %s%s: %w", r.method, base, r.path, err)
	}
	if lag := resp.Header.Get(apiserver.LagHeader); lag != "" {
		c.lag.Store(&lag)
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, statusError(resp, r)
}

func orDefault(s, d string) string {
	if s == "" {
		return d
	}
	return s
}

// statusError makes an error of an answer that is none.
func statusError(resp *http.Response, r request) error {
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("%s %s: read answer: %w", r.method, r.path, err)
	}
	var status metav1.Status
	if json.Unmarshal(data, &status) == nil && status.Kind == "Status" {
		return &apierrors.StatusError{ErrStatus: status}
	}
	return fmt.Errorf("%s %s: the server answered %s: %.200s", r.method, r.path, resp.Status, data)
}

// maxAnswer bounds answers that are read as a whole.
const maxAnswer = 1 << 30

// Raw sends a request to a path such as "/readyz" and returns the body. A nil body
// with POST is empty. Only GET is retried after the server may have acted.
func (c *Client) Raw(ctx context.Context, method, path string, query url.Values, contentType string, body []byte) ([]byte, error) {
	return c.read(ctx, request{method: method, path: path, query: query, contentType: contentType, body: body, accept: "application/json, */*"})
}

func (c *Client) read(ctx context.Context, r request) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	resp, err := c.do(ctx, r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("%s %s: read answer: %w", r.method, r.path, err)
	}
	return data, nil
}

// sleep waits and reports whether the time has passed before ctx was done.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
