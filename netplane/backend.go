package netplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

// Backend is what balances services in the kernel.
type Backend string

// The backends. The zero value is IPVS where the kernel has it, and else nftables.
const (
	IPVS     Backend = "ipvs"
	NFTables Backend = "nftables"
)

// other is the one that b is not.
func (b Backend) other() Backend {
	if b == IPVS {
		return NFTables
	}
	return IPVS
}

// backend is service tables that can give way to those of another backend.
type backend interface {
	Services
	// Retire removes what any Sync made, but lets connections that are established go
	// on; true means that nothing is left to do.
	Retire(ctx context.Context) (bool, error)
	Close() error
}

// balancer is the service tables in force, and those that give way to them. It is not
// safe for concurrent use.
type balancer struct {
	cfg    *Config
	log    *slog.Logger
	in     Backend
	tables backend
	// leaving is what an earlier process or Switch left of the other backend; nil if
	// that is gone.
	leaving backend
}

// openBalancer opens the backend that cfg asks for.
func openBalancer(cfg *Config) (*balancer, error) {
	b := &balancer{cfg: cfg, log: cfg.Log, in: cfg.Backend}
	if b.in == "" {
		b.in = IPVS
		if err := netspace.Do(cfg.NetNS, ipvs.Probe); err != nil {
			b.in = NFTables
			b.log.Info("services are balanced by nftables", "because", err)
		}
	}
	var err error
	if b.tables, err = b.open(b.in); err != nil {
		return nil, err
	}
	b.leaving, err = b.open(b.in.other())
	if errors.Is(err, ipvs.ErrMissing) {
		err = nil // then there is nothing of it either
	}
	if err != nil {
		return nil, errors.Join(err, b.tables.Close())
	}
	return b, nil
}

func (b *balancer) open(which Backend) (s backend, err error) {
	err = netspace.Do(b.cfg.NetNS, func() error {
		switch which {
		case IPVS:
			cfg := b.cfg.IPVS
			cfg.Table, cfg.Log = "", b.log
			v, err := ipvs.New(cfg)
			if err == nil {
				s = v
			}
			return err
		case NFTables:
			n, err := nft.New(b.cfg.Table, b.log)
			if err == nil {
				s = n
			}
			return err
		}
		return fmt.Errorf("backend %q: want %q or %q", which, IPVS, NFTables)
	})
	return s, err
}

// Sync implements Services. What the other backend left goes once this one has all.
func (b *balancer) Sync(ctx context.Context, t render.Table) (int, error) {
	n, err := b.tables.Sync(ctx, t)
	if err != nil || b.leaving == nil {
		return n, err
	}
	done, err := b.leaving.Retire(ctx)
	if err != nil {
		return n, fmt.Errorf("give way to %s: %w", b.in, err)
	}
	if done {
		err, b.leaving = b.leaving.Close(), nil
	}
	return n, err
}

// Read implements Services.
func (b *balancer) Read(ctx context.Context) (render.Table, error) { return b.tables.Read(ctx) }

// Purge implements Services, for both backends.
func (b *balancer) Purge(ctx context.Context) error {
	other := b.leaving
	if other == nil {
		var err error
		if other, err = b.open(b.in.other()); err != nil && !errors.Is(err, ipvs.ErrMissing) {
			return err
		}
	}
	err := b.tables.Purge(ctx)
	if other != nil {
		err = errors.Join(err, other.Purge(ctx), other.Close())
	}
	b.leaving = nil
	return err
}

// move makes another backend the one in force, with the services of t unless t is nil.
// If that does not work, all stays as it was.
func (b *balancer) move(ctx context.Context, to Backend, t *render.Table) error {
	if to == b.in {
		return nil
	}
	next := b.leaving // it may still drain
	if next == nil {
		var err error
		if next, err = b.open(to); err != nil {
			return err
		}
	}
	if t != nil {
		if _, err := next.Sync(ctx, *t); err != nil {
			_, rerr := next.Retire(ctx)
			b.leaving = next
			return errors.Join(err, rerr)
		}
	}
	b.in, b.tables, b.leaving = to, next, b.tables
	return nil
}

// Close lets go of the kernel's interfaces.
func (b *balancer) Close() error {
	err := b.tables.Close()
	if b.leaving != nil {
		err = errors.Join(err, b.leaving.Close())
	}
	return err
}

// Backend is what balances services now.
func (p *Plane) Backend() Backend {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.services.in
}

// Switch makes a backend the one in force: it gets all services before the other one
// lets go of them. Connections that are established go on where they are; what the
// other one made is removed when they have ended, or had their time.
func (p *Plane) Switch(ctx context.Context, to Backend) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.services.move(ctx, to, p.want); err != nil {
		return fmt.Errorf("switch services to %s: %w", to, err)
	}
	if p.want == nil {
		return nil
	}
	_, err := p.services.Sync(ctx, *p.want)
	if err != nil {
		return fmt.Errorf("services: %w", err)
	}
	return nil
}
