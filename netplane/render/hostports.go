package render

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// hostPorts claims the ports of this node that lead to its pods (hostPort): on the
// addresses of the Node object, or the one of them that hostIP names. Pods in the node's
// own network have their ports without any help.
func (r *renderer) hostPorts(pods []*corev1.Pod) {
	var mine []*corev1.Pod
	for _, p := range pods {
		ended := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
		if p.Spec.NodeName == r.node && !p.Spec.HostNetwork && !ended && len(p.Status.PodIPs) > 0 && hasHostPorts(&p.Spec) {
			mine = append(mine, p)
		}
	}
	slices.SortFunc(mine, func(a, b *corev1.Pod) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	for _, p := range mine {
		for _, containers := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
			for i := range containers {
				for k := range containers[i].Ports {
					r.hostPort(p, &containers[i].Ports[k])
				}
			}
		}
	}
}

func hasHostPorts(s *corev1.PodSpec) bool {
	has := func(c corev1.Container) bool {
		return slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.HostPort > 0 })
	}
	return slices.ContainsFunc(s.Containers, has) || slices.ContainsFunc(s.InitContainers, has)
}

func (r *renderer) hostPort(pod *corev1.Pod, p *corev1.ContainerPort) {
	proto, ok := ProtoOf(p.Protocol)
	if !ok || p.HostPort < 1 || p.HostPort > 65535 || p.ContainerPort < 1 || p.ContainerPort > 65535 {
		return
	}
	at := r.own
	if host, err := netip.ParseAddr(p.HostIP); err == nil && !host.IsUnspecified() {
		at = slices.DeleteFunc(slices.Clone(r.own), func(a netip.Addr) bool { return a != host.Unmap() })
	}
	for _, ip := range pod.Status.PodIPs {
		a, err := netip.ParseAddr(ip.IP)
		if err != nil || a.Zone() != "" {
			continue
		}
		a = a.Unmap()
		ep := netip.AddrPortFrom(a, uint16(p.ContainerPort))
		r.found = append(r.found[:0], candidate{addr: ep, ready: true, local: true})
		r.claim(podClaim, open([]netip.AddrPort{ep}, 0), Port{Proto: proto, Port: uint16(p.HostPort)}, at, a.Is4())
	}
}
