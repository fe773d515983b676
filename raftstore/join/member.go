package join

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"

	"decree.dev/decree/raftstore/pki"
)

// Member keeps a machine that has joined in the cluster: it has certificates renewed
// by any server, and follows what is to be trusted.
type Member struct {
	Keeper  *pki.Keeper
	Servers func() []string // host:port of the servers, best first
	Log     *slog.Logger    // nil: slog.Default()
	Every   time.Duration   // between two looks at what is to be trusted; 5 min
}

const (
	askTime     = 15 * time.Second // for one server to answer, before the next is asked
	followEvery = 5 * time.Minute
	followRetry = 30 * time.Second
	followSoon  = time.Second // most members change at the same time
)

// Renew is what [pki.Keeper.Run] needs.
func (m *Member) Renew(ctx context.Context, csrPEM []byte) (chainPEM, bundlePEM []byte, err error) {
	var got certificates
	if err := m.ask(ctx, http.MethodPost, "", renewRequest{CSR: string(csrPEM)}, &got); err != nil {
		return nil, nil, err
	}
	return []byte(got.Chain), []byte(got.Bundle), nil
}

// ask asks one server after the other. A refusal is the cluster's, not the server's.
func (m *Member) ask(ctx context.Context, method, query string, body, got any) error {
	// Verified by the Keeper, as is the group: an agent cannot pose as a server.
	client := newHTTP(pki.RequireGroup(m.Keeper.ClientTLS(), pki.GroupServers))
	var errs []error
	for _, address := range m.Servers() {
		one, cancel := context.WithTimeout(ctx, askTime)
		err := call(one, client, method, "https://"+address+RenewPath+query, body, got)
		cancel()
		if err == nil {
			return nil
		}
		err = fmt.Errorf("ask %s: %w", address, err)
		if errors.Is(err, ErrReplaced) || errors.Is(err, ErrRemoved) {
			return err
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return errors.New("no server is known")
	}
	return errors.Join(errs...)
}

// Follow keeps the trusted CAs up to date, tells the cluster what this machine holds,
// and renews the certificate when another CA signs. A new CA therefore reaches
// everybody within m.Every. It returns nil when ctx is done.
func (m *Member) Follow(ctx context.Context) error {
	every := m.Every
	if every == 0 {
		every = followEvery
	}
	log := m.Log
	if log == nil {
		log = slog.Default()
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	changed := m.Keeper.Changed()
	for failed := false; ; {
		event := changed
		if failed {
			event = nil // it must not bypass the wait
		}
		select {
		case <-ctx.Done():
			return nil
		case <-event: // what this machine holds has changed: tell the cluster soon
			changed = nil
			timer.Reset(rand.N(min(every, followSoon)))
			continue
		case <-timer.C:
		}
		changed = m.Keeper.Changed()
		err := m.followOnce(ctx)
		failed = err != nil && ctx.Err() == nil
		wait := every
		if failed {
			wait = min(every, followRetry)
			log.Warn("ask which CAs to trust", "err", err)
		}
		timer.Reset(wait/2 + rand.N(wait/2+1))
	}
}

func (m *Member) followOnce(ctx context.Context) error {
	var got trust
	query := "?trusts=" + url.QueryEscape(strings.Join(m.Keeper.Trusts(), ","))
	if err := m.ask(ctx, http.MethodGet, query, nil, &got); err != nil {
		return err
	}
	if err := m.Keeper.SetBundle([]byte(got.Bundle)); err != nil {
		return err
	}
	if m.Keeper.Issuer() != got.Active {
		m.Keeper.RenewNow()
	}
	return nil
}
