package daemon

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

// peers is a local copy of the pods of other nodes, of which network policies speak. It is
// kept once there are policies.
type peers struct {
	mirror *client.Mirror
	want   func() // begins to keep it
	wanted chan struct{}
	// patient is closed peersPatience after that.
	patient chan struct{}
}

func newPeers(cfg *Config, at controlPlaneAt) (*peers, error) {
	m, err := newMirror(cfg, at, client.PeerSelections(), "peers")
	if err != nil {
		return nil, err
	}
	p := &peers{mirror: m, wanted: make(chan struct{}), patient: make(chan struct{})}
	p.want = sync.OnceFunc(func() {
		close(p.wanted)
		time.AfterFunc(peersPatience, func() { close(p.patient) })
	})
	return p, nil
}

// run keeps the copy, and signals its changes.
func (p *peers) run(ctx context.Context, changed chan<- struct{}) error {
	select {
	case <-p.wanted:
	case <-ctx.Done():
		return nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-p.mirror.Changed():
			}
			select {
			case changed <- struct{}{}:
			default: // a signal waits there already
			}
		}
	})
	return p.mirror.Run(ctx)
}

// peersPatience is how long the network waits for the pods of other nodes, once. Without
// them their connections would be cut.
const peersPatience = 5 * time.Second

// pods are those of this node in d, and all others as far as policies need them.
func (p *peers) pods(ctx context.Context, d *netplane.Desired) []*corev1.Pod {
	if len(d.Policies) == 0 {
		return d.Pods
	}
	p.want()
	select {
	case <-p.mirror.Synced():
	case <-p.patient:
	case <-ctx.Done():
	}
	out := d.Pods
	for pod := range api.List[*corev1.Pod](p.mirror.View(), "") {
		if pod.Spec.NodeName != "" && pod.Spec.NodeName != d.Node {
			out = append(out, pod)
		}
	}
	return out
}
