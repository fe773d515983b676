package simnet

import (
	"context"
	"net/netip"

	"decree.dev/decree/netplane/policy"
)

// Policies is the kernel as what enforces network policies: Set is in force for the packets
// that follow.
func (k *Kernel) Policies() *Policies { return &Policies{k: k} }

// Policies are the network policies of a Kernel. All methods are safe for concurrent use.
type Policies struct{ k *Kernel }

// Set makes p the plan in force, and returns 1 if it is another one. What is local to the
// node is known without ranges.
func (p *Policies) Set(ctx context.Context, plan *policy.Plan, _ []netip.Prefix) (int, error) {
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	p.k.mu.Lock()
	defer p.k.mu.Unlock()
	if p.k.plan == plan {
		return 0, nil
	}
	p.k.plan = plan
	return 1, nil
}

// Read reports that nobody changed anything.
func (p *Policies) Read(ctx context.Context) (bool, error) { return true, context.Cause(ctx) }

// Purge forgets the plan: nobody is isolated.
func (p *Policies) Purge(ctx context.Context) error {
	p.k.mu.Lock()
	defer p.k.mu.Unlock()
	p.k.plan = nil
	return context.Cause(ctx)
}
