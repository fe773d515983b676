package daemon

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"
	"time"

	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/raftstore/tunnel"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
)

// admit lets servers alone speak the protocols of servers, and nobody who was taken
// out of the cluster. Calls of a removed server are let in, to be answered that it is:
// see refuse.
func (s *server) admit(protocol string, state tls.ConnectionState) error {
	want := map[string]string{peer.ProtocolRaft: api.RoleServer, peer.ProtocolPeer: api.RoleServer, tunnel.Protocol: api.RoleAgent}[protocol]
	if want != "" {
		who, ok := peer.IdentityOf(state)
		if !ok {
			return fmt.Errorf("an %s shows a certificate", want)
		}
		if role, _, ok := pki.Who(state.VerifiedChains[0][0]); !ok || role != want {
			return fmt.Errorf("%s is no %s", who.Name, want)
		}
	}
	// Trust may have changed since the handshake looked.
	if protocol == peer.ProtocolPeer {
		return s.trusted(state)
	}
	return s.still(protocol, state)
}

// trusted says why a certificate that was verified once would not be any more.
func (s *server) trusted(state tls.ConnectionState) error {
	if len(state.VerifiedChains) == 0 {
		return nil // a stranger, who may ask to join
	}
	return s.creds.keeper.Recheck(state.VerifiedChains, time.Now())
}

// belongs says why a machine that has shown its certificate is no part of the cluster
// any more. Operators and strangers are no machines.
func (s *server) belongs(state tls.ConnectionState) error {
	if len(state.VerifiedChains) == 0 {
		return nil
	}
	role, node, ok := pki.Who(state.VerifiedChains[0][0])
	if !ok {
		return nil
	}
	view := s.store.View()
	if role == api.RoleServer {
		return membership.Out(view, s.store.Members(), node)
	}
	_, settled := api.Get[*api.Authority](view, "", api.AuthorityName)
	if _, known := api.Get[*api.Machine](view, "", api.MachineName(role, node)); settled && !known {
		return fmt.Errorf("%s %s is not known: it was removed, or this server has not heard of it yet", role, node)
	}
	return nil
}

// refuse says why nothing is done for a server.
func (s *server) refuse(who peer.Identity) error {
	return membership.Out(s.store.View(), s.store.Members(), strings.TrimPrefix(who.Name, pki.ServerPrefix))
}

// still judges a connection by what holds now.
func (s *server) still(_ string, state tls.ConnectionState) error {
	if err := s.trusted(state); err != nil {
		return err
	}
	return s.belongs(state)
}

const (
	// recheckEvery bounds for how long a connection outlives its certificate.
	recheckEvery = time.Minute
	retryTrust   = time.Second
	// recheckRest lies between two looks at all connections, while machines join by the
	// thousand.
	recheckRest = 200 * time.Millisecond
)

// followTrust makes what the cluster trusts what this server does: its own CAs follow
// the replicated ones, and connections of who is trusted no more are closed. And it has
// the cluster told what this server is, where that is mistaken.
func (s *server) followTrust(ctx context.Context) error {
	for asked := ""; ; {
		changed, revision := s.creds.keeper.Changed(), s.store.View().Revision()
		wait := recheckEvery
		if err := s.trust(ctx, &asked); err != nil && ctx.Err() == nil {
			s.cfg.Log.Info("ask the cluster which CAs it trusts", "error", err, "retry", retryTrust)
			wait = retryTrust
		}
		if membership.Leaving(s.store.View(), s.store.Members()) {
			wait = retryTrust // that it is out brings no event
		}
		if membership.Mistaken(s.store.View(), s.self()) {
			s.changedSelf()
		}
		s.mux.Recheck(s.still)
		rest := time.NewTimer(recheckRest)
		select {
		case <-rest.C:
		case <-ctx.Done():
			rest.Stop()
			return nil
		}
		waiting, cancel := context.WithTimeout(ctx, wait)
		err := s.awaitAny(waiting, changed, revision, api.Authorities, api.Servers, api.Machines)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow whom the cluster trusts: %w", err)
		}
	}
}

// trust takes over the CAs of the replicated state, and has this server's certificate
// renewed, once, when another one signs than the one that was asked for last. The state
// must be the newest: one that is behind may hold CAs that were given up.
func (s *server) trust(ctx context.Context, asked *string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	view, err := s.store.Read(ctx)
	if err != nil {
		return err
	}
	a, ok := api.Get[*api.Authority](view, "", api.AuthorityName)
	if !ok {
		return nil // the founder has not settled it yet
	}
	issuer, err := pki.NewIssuer(a.Spec)
	if err != nil {
		return err
	}
	if err := s.creds.keeper.SetBundle(issuer.Bundle()); err != nil {
		return err
	}
	if s.creds.keeper.Issuer() != a.Spec.Active && *asked != a.Spec.Active {
		*asked = a.Spec.Active
		s.creds.keeper.RenewNow()
	}
	return nil
}

// awaitAny waits for a signal, for a change of one of the kinds after revision, or for
// the end of ctx, which is no error.
func (s *server) awaitAny(ctx context.Context, signal <-chan struct{}, revision uint64, kinds ...api.Resource) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st := replicated.Store{Store: s.store}
	ends := make(chan error, len(kinds))
	for _, r := range kinds {
		go func() { ends <- st.Await(ctx, revision, r) }()
	}
	var err error
	waiting := len(kinds)
	select {
	case <-signal:
	case <-ctx.Done():
	case err = <-ends:
		waiting--
	}
	ended := ctx.Err() != nil
	cancel()
	for range waiting {
		<-ends
	}
	if ended {
		return nil
	}
	return err
}
