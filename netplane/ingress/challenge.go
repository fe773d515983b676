package ingress

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"

	"decree.dev/decree/netplane/ingress/route"
)

const (
	// challengePath is where a CA asks for the proof that belongs to a token (RFC 8555, 8.3).
	challengePath = "/.well-known/acme-challenge/"
	// askedHeader keeps nodes from asking each other in circles.
	askedHeader = "Decree-Challenge-Asked"
	// askingRate and askingBurst bound how often other nodes are asked, in questions a second: a
	// stranger's question becomes one to each of them. CAs ask a few times for each certificate.
	askingRate, askingBurst = 10, 50
	// askingTimeout is less than CAs wait.
	askingTimeout = 5 * time.Second
	// maxProof is more than a token, which has 22 characters or more, and a hash have in bytes.
	maxProof = 1 << 10
)

// askingClient is one that asks other nodes.
func askingClient(dial func(ctx context.Context, network, address string) (net.Conn, error)) *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DialContext: dial, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// challenges answers the CA's questions, and hands everything else on. Names lead to all nodes,
// so that the CA asks any of them: who does not know the proof asks the others.
func (o *obtainer) challenges(now func() *route.Table, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !certmagic.LooksLikeHTTPChallenge(r) {
			h.ServeHTTP(w, r)
			return
		}
		if o.way.Load().issuer.HandleHTTPChallenge(w, r) {
			return
		}
		t := now()
		if _, managed := t.Certificate(hostName(r.Host)); managed && r.Header.Get(askedHeader) == "" {
			if proof := o.askOthers(r, t.Others); proof != nil {
				w.Header().Set("Content-Type", "text/plain")
				_, _ = w.Write(proof) // the CA asks again
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}

// askOthers returns the proof that one of some nodes has; nil: there is none.
func (o *obtainer) askOthers(r *http.Request, others []netip.Addr) []byte {
	token := strings.TrimPrefix(r.URL.Path, challengePath)
	if token == "" || strings.ContainsFunc(token, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_')
	}) {
		return nil
	}
	if !o.asking.Allow() {
		return nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), askingTimeout)
	defer cancel()
	proofs := make(chan []byte, len(others))
	for _, node := range others {
		go func() { proofs <- o.ask(ctx, net.JoinHostPort(node.String(), strconv.Itoa(o.http)), r.Host, token) }()
	}
	for range others {
		if proof := <-proofs; proof != nil {
			return proof
		}
	}
	return nil
}

// ask asks one node. What is no proof for the token may be anybody's page, and is not passed on.
func (o *obtainer) ask(ctx context.Context, node, host, token string) []byte {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+node+challengePath+token, nil)
	if err != nil {
		return nil
	}
	req.Host = host
	req.Header.Set(askedHeader, "1")
	res, err := o.others.Do(req)
	if err != nil {
		return nil
	}
	defer res.Body.Close()
	proof, err := io.ReadAll(io.LimitReader(res.Body, maxProof+1))
	if err != nil || res.StatusCode != http.StatusOK || len(proof) > maxProof || !bytes.HasPrefix(proof, []byte(token+".")) {
		return nil
	}
	return proof
}
