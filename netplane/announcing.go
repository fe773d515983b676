package netplane

import (
	"context"
	"net/netip"
	"time"

	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/render"
)

// call announces the addresses of load balancers. The caller holds mu.
func (p *Plane) call(addrs []netip.Addr) error {
	p.announced = addrs
	changes := 0
	err := netspace.Do(p.cfg.NetNS, func() (err error) {
		changes, err = p.callers.Sync(addrs)
		return err
	})
	if changes > 0 {
		select {
		case p.told <- struct{}{}:
		default:
		}
	}
	return err
}

// announcedBy are the addresses that the node of d announces, in order.
func announcedBy(d Desired) (out []netip.Addr) {
	for _, a := range render.Announcements(d) {
		if a.Node == d.Node {
			out = append(out, a.Addr)
		}
	}
	return out
}

// tellEvery is the time between two times that others are told of an address that came.
const tellEvery = time.Second

// tell repeats what others were told, for a while.
func (p *Plane) tell(ctx context.Context) {
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.told:
		case <-again:
			left := 0
			p.mu.Lock()
			err := netspace.Do(p.cfg.NetNS, func() (err error) { left, err = p.callers.Tell(); return err })
			p.mu.Unlock()
			if err != nil {
				p.log.Warn("announce addresses", "err", err)
			}
			if left == 0 {
				again = nil
				continue
			}
		}
		again = time.After(tellEvery)
	}
}
