package state

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// placeService settles what the state machine assigns to svc, which the caller owns, and
// updates the pools. old is nil on Create.
func (d *draft) placeService(key api.Key, old, svc *corev1.Service) *command.Rejection {
	if rejection := d.placeAddresses(key, old, svc); rejection != nil {
		return rejection
	}
	return d.placePorts(key, old, svc)
}

// placeAddresses settles the cluster IPs of svc.
func (d *draft) placeAddresses(key api.Key, old, svc *corev1.Service) *command.Rejection {
	wanted, rejection := wantedIPs(key, svc)
	if rejection != nil {
		return rejection
	}
	switch {
	case svc.Spec.Type == corev1.ServiceTypeExternalName:
		if len(wanted) > 0 && wanted[0] != serviceIP(old) {
			return invalid(key, "a service of type ExternalName has no cluster IP: remove spec.clusterIP")
		}
		d.releaseAddresses(old)
		svc.Spec.ClusterIP, svc.Spec.ClusterIPs = "", nil
		return nil
	case len(wanted) == 1 && wanted[0] == corev1.ClusterIPNone:
		d.releaseAddresses(old)
		svc.Spec.ClusterIP, svc.Spec.ClusterIPs = corev1.ClusterIPNone, []string{corev1.ClusterIPNone}
		if !d.choosesFamilies(svc) {
			return nil // its endpoints are of the family that its pods have
		}
		_, rejection := d.chooseFamilies(key, svc, nil)
		return rejection
	}
	families, rejection := d.chooseFamilies(key, svc, wanted)
	if rejection != nil {
		return rejection
	}
	return d.assignAddresses(key, old, svc, families, wanted)
}

// wantedIPs are the addresses that svc names.
func wantedIPs(key api.Key, svc *corev1.Service) ([]string, *command.Rejection) {
	wanted := svc.Spec.ClusterIPs
	if ip := svc.Spec.ClusterIP; ip != "" && (len(wanted) == 0 || wanted[0] != ip) {
		if len(wanted) > 1 {
			return nil, invalid(key, "spec.clusterIP %s is not the first of spec.clusterIPs, which is %s", ip, wanted[0])
		}
		wanted = []string{ip}
	}
	if len(wanted) == 1 && wanted[0] == "" {
		wanted = nil
	}
	if len(wanted) > maxFamilies {
		return nil, invalid(key, "spec.clusterIPs has %d addresses: one of each address family is possible", len(wanted))
	}
	return wanted, nil
}

// assignAddresses gives svc an address of each of the families, which are indexes of
// Bootstrap.Families: the one that it names, the one that it has, or a free one.
func (d *draft) assignAddresses(key api.Key, old, svc *corev1.Service, families []int, wanted []string) *command.Rejection {
	before := d.heldAddresses(old)
	ips := make([]string, 0, len(families))
	for i, f := range families {
		had, want := before[f], ""
		if i < len(wanted) {
			want = wanted[i]
		}
		ip, rejection := had, (*command.Rejection)(nil)
		switch {
		case had != "" && (want == "" || want == had):
		case want == "":
			ip, rejection = d.allocateAddress(key, f)
		default:
			ip, rejection = d.claimAddress(key, f, want, had)
		}
		if rejection != nil {
			return rejection
		}
		before[f] = ""
		ips = append(ips, ip)
	}
	for f, ip := range before { // of families that it has no longer
		d.releaseAddress(f, ip)
	}
	svc.Spec.ClusterIP, svc.Spec.ClusterIPs = ips[0], ips
	return nil
}

func (d *draft) allocateAddress(key api.Key, family int) (string, *command.Rejection) {
	b := d.next.settings
	cidr := b.Families()[family].ServiceCIDR
	low, high := serviceBounds(cidr)
	dns, ok := numberOf(cidr, b.DNS)
	if !ok {
		dns = high + 1 // of the other family
	}
	pool, n, ok := d.next.services[family].free(low, high, dns)
	if !ok {
		return "", invalid(key, "no address is left in the service range %s: all %d are in use, delete a service that is not needed", cidr, pool.used.Len())
	}
	pool.take(d.edit, n, holderOf(key))
	d.next.services[family] = pool
	return addressAt(cidr, n, 0).String(), nil
}

// claimAddress takes an address that a service names in place of the one it had.
func (d *draft) claimAddress(key api.Key, family int, wanted, had string) (string, *command.Rejection) {
	b := d.next.settings
	cidr := b.Families()[family].ServiceCIDR
	addr, err := netip.ParseAddr(wanted)
	if err != nil {
		return "", invalid(key, "spec.clusterIP %q is not an IP address", wanted)
	}
	n, ok := numberOf(cidr, addr)
	if low, high := serviceBounds(cidr); !ok || n < low || n > high {
		return "", invalid(key, "spec.clusterIP %s is not in the service range %s", wanted, cidr)
	}
	if addr == b.DNS {
		return "", invalid(key, "spec.clusterIP %s is the cluster DNS address, choose another or none", wanted)
	}
	if holder, taken := d.next.services[family].holder(n); taken && holder != holderOf(key) {
		return "", invalid(key, "spec.clusterIP %s is in use by services %q, choose another or none", wanted, holder)
	}
	d.releaseAddress(family, had)
	d.next.services[family].take(d.edit, n, holderOf(key))
	return addr.String(), nil
}

// releaseAddresses gives back the addresses that svc holds, if any; svc may be nil.
func (d *draft) releaseAddresses(svc *corev1.Service) {
	for f, ip := range d.heldAddresses(svc) {
		d.releaseAddress(f, ip)
	}
}

func (d *draft) releaseAddress(family int, ip string) {
	if n, ok := addressNumber(d.next.settings, family, ip); ok {
		d.next.services[family].release(d.edit, n)
	}
}

// heldAddresses are the addresses of a stored service by the index of their family, ""
// for none; svc may be nil.
func (d *draft) heldAddresses(svc *corev1.Service) (held [maxFamilies]string) {
	if svc == nil {
		return held
	}
	ips := svc.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{svc.Spec.ClusterIP}
	}
	for _, ip := range ips {
		for f := range d.next.settings.Families() {
			if _, ok := addressNumber(d.next.settings, f, ip); ok {
				held[f] = ip
			}
		}
	}
	return held
}

// addressNumber is the number of an address in the service range of a family.
func addressNumber(b *command.Bootstrap, family int, ip string) (uint64, bool) {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return 0, false
	}
	return numberOf(b.Families()[family].ServiceCIDR, addr)
}

// serviceIP is the address of a stored service, "" for none; svc may be nil.
func serviceIP(svc *corev1.Service) string {
	if svc == nil || svc.Spec.ClusterIP == corev1.ClusterIPNone {
		return ""
	}
	return svc.Spec.ClusterIP
}

// maxFamilies is how many address families there are.
const maxFamilies = 2

func familyOf(p netip.Prefix) corev1.IPFamily {
	if p.Addr().Is6() {
		return corev1.IPv6Protocol
	}
	return corev1.IPv4Protocol
}

// choosesFamilies reports whether the families of svc are a choice: in a cluster that
// has two, or where it asks for them. What a Service of one address had from the start
// means what it always meant, see [command.Assigned].
func (d *draft) choosesFamilies(svc *corev1.Service) bool {
	return len(d.next.settings.Families()) > 1 || command.Assigned(svc)
}

// chooseFamilies settles ipFamilies and ipFamilyPolicy of svc and returns the indexes of
// its families in Bootstrap.Families. wanted are the addresses that it names. The rules
// are those of Kubernetes, but that an object from Git is all there is to say: families
// that it does not name are those of the cluster, whatever it had before.
func (d *draft) chooseFamilies(key api.Key, svc *corev1.Service, wanted []string) ([]int, *command.Rejection) {
	families := d.next.settings.Families()
	s := &svc.Spec
	if !d.choosesFamilies(svc) {
		if s.IPFamilies == nil {
			s.IPFamilies = []corev1.IPFamily{familyOf(families[0].ServiceCIDR)}
		}
		if s.IPFamilyPolicy == nil {
			s.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
		}
		return []int{0}, nil
	}
	named, rejection := d.namedFamilies(key, svc, wanted)
	if rejection != nil {
		return nil, rejection
	}
	if s.IPFamilyPolicy == nil {
		s.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
		if len(named) > 1 {
			s.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
		}
	}
	switch policy := *s.IPFamilyPolicy; {
	case policy == corev1.IPFamilyPolicySingleStack && len(named) > 1:
		return nil, invalid(key, "a service with ipFamilyPolicy SingleStack has one address family, it names two")
	case policy == corev1.IPFamilyPolicyRequireDualStack && len(families) == 1:
		return nil, invalid(key, "ipFamilyPolicy RequireDualStack asks for two address families, and the cluster has %s only", familyOf(families[0].ServiceCIDR))
	case policy == corev1.IPFamilyPolicySingleStack && len(named) == 0:
		named = []int{0}
	case policy != corev1.IPFamilyPolicySingleStack:
		for f := range families {
			if !slices.Contains(named, f) {
				named = append(named, f)
			}
		}
	}
	s.IPFamilies = nil
	for _, f := range named {
		s.IPFamilies = append(s.IPFamilies, familyOf(families[f].ServiceCIDR))
	}
	return named, nil
}

// namedFamilies are the families that svc names, in its order: in ipFamilies, or by its
// addresses.
func (d *draft) namedFamilies(key api.Key, svc *corev1.Service, wanted []string) ([]int, *command.Rejection) {
	names := slices.Clone(svc.Spec.IPFamilies)
	for i, text := range wanted {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil, invalid(key, "spec.clusterIP %q is not an IP address", text)
		}
		family := familyOf(netip.PrefixFrom(addr, addr.BitLen()))
		switch {
		case i >= len(names):
			names = append(names, family)
		case names[i] != family:
			return nil, invalid(key, "spec.clusterIP %s is not of the family %s, as ipFamilies says", text, names[i])
		}
	}
	var named []int
	for _, name := range names {
		f := slices.IndexFunc(d.next.settings.Families(), func(r command.Ranges) bool { return familyOf(r.ServiceCIDR) == name })
		switch {
		case f < 0:
			return nil, invalid(key, "ipFamilies names %s, which this cluster has no addresses of", name)
		case slices.Contains(named, f):
			return nil, invalid(key, "the service names the family %s twice: one is possible of each", name)
		}
		named = append(named, f)
	}
	return named, nil
}
