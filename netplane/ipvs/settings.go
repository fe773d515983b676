package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"time"

	"decree.dev/decree/netplane/nft"
)

// sysctls are the settings that services need, in /proc/sys/net/ipv4, of either family
// (Documentation/networking/ipvs-sysctl.rst and ip-sysctl.rst).
var sysctls = []struct {
	note uint32
	name string
	want uint32
}{
	// So that conntrack knows the connections, for masquerading and for their state.
	{1, "vs/conntrack", 1},
	// What goes on to an endpoint that was removed begins anew instead of vanishing.
	{2, "vs/expire_nodest_conn", 1},
	// Affinity does not lead to endpoints that get no more connections.
	{3, "vs/expire_quiescent_template", 1},
	// What an endpoint answers to this node is given to a socket once IPVS has put the
	// service's address into it, not before: the node may talk to the endpoint directly, too,
	// from the same port.
	{4, "tcp_early_demux", 0},
	{5, "udp_early_demux", 0},
}

// noteTimeout is where the numbers of timeouts begin, in notes: their attribute is
// added.
const noteTimeout = 100

// settings are values of the kernel that differ from what they were before.
type settings struct {
	// files are the sysctls, opened in the network namespace that they are of.
	files []*os.File
	// timeouts are in seconds, by attribute.
	timeouts map[uint16]uint32
	// before is what has been found, by number.
	before map[uint32]uint32
}

// openSettings opens the sysctls in the network namespace of the calling thread.
func openSettings(cfg *Config) (*settings, error) {
	s := &settings{timeouts: map[uint16]uint32{}, before: map[uint32]uint32{}}
	for kind, d := range map[uint16]time.Duration{attrTimeoutTCP: cfg.TCP, attrTimeoutTCPFin: cfg.TCPFin, attrTimeoutUDP: cfg.UDP} {
		if d > 0 {
			s.timeouts[kind] = max(1, uint32(d/time.Second))
		}
	}
	for _, x := range sysctls {
		f, err := os.OpenFile("/proc/sys/net/ipv4/"+x.name, os.O_RDWR, 0)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open setting net.ipv4: %s (needs root): %w", x.name, err), s.close())
		}
		s.files = append(s.files, f)
	}
	return s, nil
}

func (s *settings) close() error {
	var errs []error
	for _, f := range s.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// wrong returns the values that are not as they should be, as they are.
func (s *settings) wrong(k *kernel) (map[uint32]uint32, error) {
	out := map[uint32]uint32{}
	for i, x := range sysctls {
		var b [32]byte
		n, err := s.files[i].ReadAt(b[:], 0)
		if n == 0 && err != nil {
			return nil, fmt.Errorf("read setting net.ipv4: %s: %w", x.name, err)
		}
		v, err := strconv.ParseUint(strings.TrimSpace(string(b[:n])), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("setting net.ipv4: %s: %w", x.name, err)
		}
		if uint32(v) != x.want {
			out[x.note] = uint32(v)
		}
	}
	if len(s.timeouts) == 0 {
		return out, nil
	}
	have, err := k.timeouts()
	if err != nil {
		return nil, err
	}
	for kind, want := range s.timeouts {
		if have[kind] != want {
			out[noteTimeout+uint32(kind)] = have[kind]
		}
	}
	return out, nil
}

func (s *settings) kept(k *kernel) (bool, error) {
	wrong, err := s.wrong(k)
	return len(wrong) == 0, err
}

// keep makes the settings what they should be, and returns whether any was not. What
// they were is noted first, in g; noted is what is there of earlier times.
func (s *settings) keep(ctx context.Context, g *nft.Guard, k *kernel, noted map[uint32]uint32) (bool, error) {
	wrong, err := s.wrong(k)
	if err != nil {
		return false, err
	}
	before := maps.Clone(wrong)
	maps.Copy(before, s.before) // the older the truer
	maps.Copy(before, noted)
	s.before = before
	// Again, too: the table may be a new one.
	if err := g.Note(ctx, before); err != nil {
		return false, err
	}
	want := map[uint32]uint32{}
	for _, x := range sysctls {
		want[x.note] = x.want
	}
	for kind, v := range s.timeouts {
		want[noteTimeout+uint32(kind)] = v
	}
	maps.DeleteFunc(want, func(note, _ uint32) bool { _, is := wrong[note]; return !is })
	return len(wrong) > 0, s.write(k, want)
}

// restore makes the settings what they were.
func (s *settings) restore(k *kernel, noted map[uint32]uint32) error {
	before := maps.Clone(s.before)
	maps.Copy(before, noted)
	if err := s.write(k, before); err != nil {
		return err
	}
	clear(s.before)
	return nil
}

// write changes settings by their notes.
func (s *settings) write(k *kernel, values map[uint32]uint32) error {
	timeouts := map[uint16]uint32{}
	for note, v := range values {
		if note > noteTimeout {
			timeouts[uint16(note-noteTimeout)] = v
		}
	}
	for i, x := range sysctls {
		v, ok := values[x.note]
		if !ok {
			continue
		}
		if _, err := s.files[i].WriteAt(strconv.AppendUint(nil, uint64(v), 10), 0); err != nil {
			return fmt.Errorf("change setting net.ipv4: %s: %w", x.name, err)
		}
	}
	if len(timeouts) == 0 {
		return nil
	}
	return k.setTimeouts(timeouts)
}
