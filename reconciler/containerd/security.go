package containerd

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent"
)

// defaultCaps is what root in a container may do. Compared with Docker's set it
// lacks NET_RAW (forging packets of other pods; ping works without it), MKNOD,
// AUDIT_WRITE and SETFCAP (files that give privileges): images rarely need them, and
// those that do name them in capabilities.add.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE",
	"CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// securityOpts carries out the pod's and the container's security contexts, with
// safe defaults: a seccomp profile, few capabilities and no new privileges.
func securityOpts(cfg agent.ContainerConfig) ([]oci.SpecOpts, error) {
	sc := cfg.Container.SecurityContext
	if sc == nil {
		sc = &corev1.SecurityContext{}
	}
	if sc.Privileged != nil && *sc.Privileged {
		opts := []oci.SpecOpts{oci.WithPrivileged, oci.WithAllDevicesAllowed, oci.WithHostDevices, oci.WithNewPrivileges}
		return append(opts, withReadOnlyRoot(sc)...), nil
	}
	caps, err := capabilities(sc.Capabilities)
	if err != nil {
		return nil, err
	}
	opts := []oci.SpecOpts{oci.WithCapabilities(caps), withNoInheritable, oci.WithNoNewPrivileges}
	if asksPrivileges(sc) {
		opts = append(opts, oci.WithNewPrivileges)
	}
	if sc.ProcMount != nil && *sc.ProcMount == corev1.UnmaskedProcMount {
		opts = append(opts, oci.WithMaskedPaths(nil), oci.WithReadonlyPaths(nil))
	}
	profile, err := seccompOpts(cfg.Pod, sc)
	if err != nil {
		return nil, err
	}
	opts = append(opts, profile...)
	return append(opts, withReadOnlyRoot(sc)...), nil
}

func withReadOnlyRoot(sc *corev1.SecurityContext) []oci.SpecOpts {
	if sc.ReadOnlyRootFilesystem != nil && *sc.ReadOnlyRootFilesystem {
		return []oci.SpecOpts{oci.WithRootFSReadonly()}
	}
	return nil
}

// asksPrivileges reports whether processes may gain privileges by set-uid files.
// Kubernetes allows it unless forbidden; here it must be asked for.
func asksPrivileges(sc *corev1.SecurityContext) bool {
	if sc.AllowPrivilegeEscalation != nil {
		return *sc.AllowPrivilegeEscalation
	}
	return false
}

// withNoInheritable keeps the inheritable set empty: with it, a program with file
// capabilities would gain what its caller does not have (CVE-2022-24769).
func withNoInheritable(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	s.Process.Capabilities.Inheritable = nil
	s.Process.Capabilities.Ambient = nil
	return nil
}

// capabilities applies add and drop to the default set; ALL stands for every one.
// What is both added and dropped by name is added, as drop ALL with single additions
// is the usual way to write it.
func capabilities(c *corev1.Capabilities) ([]string, error) {
	set := slices.Clone(defaultCaps)
	if c == nil {
		return set, nil
	}
	available, err := cap.Current()
	if err != nil {
		return nil, fmt.Errorf("capabilities of this node: %w", err)
	}
	known := cap.Known()
	name := func(c corev1.Capability) (string, error) {
		n := "CAP_" + strings.TrimPrefix(strings.ToUpper(string(c)), "CAP_")
		if n != "CAP_ALL" && !slices.Contains(known, n) {
			return "", fmt.Errorf("%w: capability %q is not known", agent.ErrInvalidContainer, c)
		}
		return n, nil
	}
	// Root in a restricted machine lacks some, which cannot be given away.
	has := func(n string) bool { return slices.Contains(available, n) }
	var add, drop []string
	for list, dst := range map[*[]corev1.Capability]*[]string{&c.Add: &add, &c.Drop: &drop} {
		for _, one := range *list {
			n, err := name(one)
			if err != nil {
				return nil, err
			}
			*dst = append(*dst, n)
		}
	}
	if slices.Contains(drop, "CAP_ALL") {
		set = nil
	}
	if slices.Contains(add, "CAP_ALL") {
		set = slices.Clone(available)
	}
	set = slices.DeleteFunc(set, func(n string) bool { return slices.Contains(drop, n) })
	for _, n := range add {
		if n != "CAP_ALL" && !has(n) {
			return nil, fmt.Errorf("%w: this node does not have capability %s", agent.ErrInvalidContainer, n)
		}
		if n != "CAP_ALL" && !slices.Contains(set, n) {
			set = append(set, n)
		}
	}
	slices.Sort(set)
	return set, nil
}

// seccompOpts chooses the system call filter: the container's, the pod's, or the
// default profile.
func seccompOpts(pod *corev1.Pod, sc *corev1.SecurityContext) ([]oci.SpecOpts, error) {
	profile := sc.SeccompProfile
	if profile == nil && pod.Spec.SecurityContext != nil {
		profile = pod.Spec.SecurityContext.SeccompProfile
	}
	if profile == nil || profile.Type == corev1.SeccompProfileTypeRuntimeDefault {
		return []oci.SpecOpts{seccomp.WithDefaultProfile()}, nil
	}
	switch profile.Type {
	case corev1.SeccompProfileTypeUnconfined:
		return []oci.SpecOpts{oci.WithSeccompUnconfined}, nil
	case corev1.SeccompProfileTypeLocalhost:
		return nil, fmt.Errorf("%w: seccompProfile.type Localhost is not supported: use RuntimeDefault or Unconfined", agent.ErrInvalidContainer)
	default:
		return nil, fmt.Errorf("%w: seccompProfile.type %q is not known", agent.ErrInvalidContainer, profile.Type)
	}
}

// processUser resolves the user and groups of a container, from its own security
// context, the pod's, or the image.
func (r *Runtime) processUser(ctx context.Context, cfg agent.ContainerConfig, img *imageInfo) (specs.User, error) {
	sc, psc := cfg.Container.SecurityContext, cfg.Pod.Spec.SecurityContext
	if sc == nil {
		sc = &corev1.SecurityContext{}
	}
	if psc == nil {
		psc = &corev1.PodSecurityContext{}
	}
	want, fromImage := img.Config.User, true
	if uid := firstSet(sc.RunAsUser, psc.RunAsUser); uid != nil {
		want, fromImage = fmt.Sprint(*uid), false
	}
	if err := r.loadUsers(ctx, img); err != nil {
		return specs.User{}, err
	}
	user, err := img.lookupUser(want)
	if err != nil {
		if fromImage {
			return user, fmt.Errorf("%w: the user %q of image %s: %v: set securityContext.runAsUser", agent.ErrInvalidContainer, want, img.Name, err)
		}
		return user, fmt.Errorf("%w: runAsUser %s: %v", agent.ErrInvalidContainer, want, err)
	}
	if gid := firstSet(sc.RunAsGroup, psc.RunAsGroup); gid != nil {
		user.GID = uint32(*gid)
	}
	if nonRoot := firstSet(sc.RunAsNonRoot, psc.RunAsNonRoot); nonRoot != nil && *nonRoot && user.UID == 0 {
		return user, fmt.Errorf("container %s: %w: set securityContext.runAsUser, or a user in image %s", cfg.Container.Name, agent.ErrRunAsRoot, img.Name)
	}
	for _, gid := range psc.SupplementalGroups {
		user.AdditionalGids = append(user.AdditionalGids, uint32(gid))
	}
	if psc.FSGroup != nil {
		user.AdditionalGids = append(user.AdditionalGids, uint32(*psc.FSGroup))
	}
	slices.Sort(user.AdditionalGids)
	user.AdditionalGids = slices.Compact(user.AdditionalGids)
	return user, nil
}

func firstSet[T any](values ...*T) *T {
	for _, v := range values {
		if v != nil {
			return v
		}
	}
	return nil
}
