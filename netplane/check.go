package netplane

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/reach"
)

// checkPrefix begins the names of namespaces that checks make.
const checkPrefix = "netcheck-"

// maxChecks is how many checks a node takes part in at a time, maxProbes how many probes it
// takes for each.
const (
	maxChecks = 4
	maxProbes = 1000
)

// probeTime bounds what the probes of one check take together. It is shorter than the time
// of the whole check, so that what is known by then is told.
const probeTime = 15 * time.Second

// Check takes this node's part in a check of the network: a conversation as netcheck has it.
// It ends when the other side closes, or ctx ends; what was made for it is gone then. Trouble
// of this node is told to the other side; an error means that there is no conversation.
func (p *Plane) Check(ctx context.Context, with io.ReadWriter) error {
	in, out := json.NewDecoder(with), json.NewEncoder(with)
	var begin netcheck.Begin
	if err := in.Decode(&begin); err != nil {
		return fmt.Errorf("check of the network: %w", err)
	}
	select {
	case p.checking <- struct{}{}:
		defer func() { <-p.checking }()
	default:
		return out.Encode(netcheck.End{Error: fmt.Sprintf("it takes part in %d checks already", maxChecks)})
	}
	pod, end, done := p.checkEnd(ctx, begin)
	defer done()
	if err := out.Encode(end); err != nil {
		return fmt.Errorf("check of the network: %w", err)
	}
	var probes []netcheck.Probe
	if err := in.Decode(&probes); err != nil {
		return fmt.Errorf("check of the network: %w", err)
	}
	if len(probes) > maxProbes {
		return fmt.Errorf("check of the network: %d probes, at most %d are sent", len(probes), maxProbes)
	}
	sending, cancel := context.WithTimeoutCause(ctx, probeTime, errors.New("there was no time left to try it"))
	outcomes := reach.Send(sending, reach.From{Node: p.cfg.NetNS, Pod: pod}, probes)
	cancel()
	if err := out.Encode(outcomes); err != nil {
		return fmt.Errorf("check of the network: %w", err)
	}
	// Others may still try to reach the namespace.
	if err := in.Decode(&struct{}{}); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
		return fmt.Errorf("check of the network: %w", err)
	}
	return nil
}

// checkEnd finds the network namespace of a pod, or makes one. The returned function takes
// away what was made.
func (p *Plane) checkEnd(ctx context.Context, begin netcheck.Begin) (netns string, end netcheck.End, done func()) {
	if begin.Pod != "" {
		netns, addrs, err := p.networks.Find(begin.Pod)
		if err == nil {
			return netns, netcheck.End{Addresses: addrs}, func() {}
		}
		return "", netcheck.End{Error: err.Error()}, func() {}
	}
	p.swept.Do(func() {
		if err := p.removeCheckEnds(ctx); err != nil {
			p.log.Warn("network namespaces of earlier checks", "err", err)
		}
	})
	name := checkPrefix + strings.ToLower(rand.Text()[:10])
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "decree-system", Name: name, UID: types.UID(name)}}
	netns = p.checkPath(name)
	done = func() {
		after := context.WithoutCancel(ctx)
		if err := errors.Join(p.Detach(after, pod.UID, netns), netspace.Remove(netns)); err != nil {
			p.log.Warn("end of a check of the network", "err", err)
		}
	}
	err := netspace.Create(netns)
	if err == nil {
		end.Addresses, err = p.Attach(ctx, pod, netns)
	}
	if err != nil {
		end.Error = err.Error()
	}
	return netns, end, done
}

func (p *Plane) checkPath(name string) string { return filepath.Join(p.cfg.DataDir, "check", name) }

// removeCheckEnds removes the namespaces that checks of an earlier process have left.
func (p *Plane) removeCheckEnds(ctx context.Context) error {
	entries, err := os.ReadDir(p.checkPath(""))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		err = errors.Join(err, p.networks.Detach(ctx, types.UID(e.Name()), p.checkPath(e.Name())), netspace.Remove(p.checkPath(e.Name())))
	}
	return err
}
