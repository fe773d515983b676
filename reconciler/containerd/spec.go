package containerd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent"
)

// spec builds the OCI description of a container.
func (r *Runtime) spec(ctx context.Context, id string, cfg agent.ContainerConfig, rec sandboxRecord, img *imageInfo) (*oci.Spec, error) {
	args, err := processArgs(cfg, img)
	if err != nil {
		return nil, err
	}
	user, err := r.processUser(ctx, cfg, img)
	if err != nil {
		return nil, err
	}
	cwd := cfg.Container.WorkingDir
	if cwd == "" {
		cwd = img.Config.WorkingDir
	}
	if cwd == "" {
		cwd = "/"
	}
	opts := []oci.SpecOpts{
		oci.WithProcessArgs(args...),
		oci.WithEnv(img.Config.Env),
		oci.WithEnv(append([]string{"HOSTNAME=" + rec.Hostname}, cfg.Env...)),
		oci.WithProcessCwd(cwd),
		func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
			s.Process.User = user
			s.Process.Rlimits = nil // those of the node; 1024 files are too few for servers
			return nil
		},
		oci.WithCgroup(r.containerCgroup(cfg.Pod.UID, id)),
		oci.WithAnnotations(map[string]string{shimGroup: string(cfg.Pod.UID)}),
		withDefaultPath,
	}
	if cfg.Container.TTY {
		opts = append(opts, oci.WithTTY, oci.WithEnv([]string{"TERM=xterm"}))
	}
	opts = append(opts, r.namespaceOpts(cfg, rec)...)
	opts = append(opts, r.resourceOpts(cfg)...)
	shm := "/dev/shm"
	if !rec.HostIPC {
		shm = r.nsPath(rec.UID, shmName)
	}
	opts = append(opts, withMounts(shm, cfg.Mounts))
	security, err := securityOpts(cfg)
	if err != nil {
		return nil, err
	}
	opts = append(opts, security...)
	return oci.GenerateSpec(ctx, nil, &containers.Container{ID: id}, opts...)
}

// processArgs returns the command line: that of the pod, or the image's own.
func processArgs(cfg agent.ContainerConfig, img *imageInfo) ([]string, error) {
	if len(cfg.Args) > 0 && len(cfg.Container.Command) == 0 {
		// The pod gives arguments only: the image's entrypoint takes them.
		if len(img.Config.Entrypoint) > 0 {
			return append(slices.Clone(img.Config.Entrypoint), cfg.Args...), nil
		}
		return cfg.Args, nil
	}
	if len(cfg.Args) > 0 {
		return cfg.Args, nil
	}
	args := append(slices.Clone(img.Config.Entrypoint), img.Config.Cmd...)
	if len(args) == 0 {
		return nil, fmt.Errorf("%w: neither the container nor its image %s names a command: set command", agent.ErrInvalidContainer, cfg.Container.Image)
	}
	return args, nil
}

func withDefaultPath(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	for _, env := range s.Process.Env {
		if strings.HasPrefix(env, "PATH=") {
			return nil
		}
	}
	s.Process.Env = append(s.Process.Env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	return nil
}

// namespaceOpts joins the sandbox's namespaces; process and mount namespaces are the
// container's own.
func (r *Runtime) namespaceOpts(cfg agent.ContainerConfig, rec sandboxRecord) []oci.SpecOpts {
	kinds := map[string]specs.LinuxNamespaceType{"net": specs.NetworkNamespace, "ipc": specs.IPCNamespace, "uts": specs.UTSNamespace}
	own := rec.namespaces()
	var opts []oci.SpecOpts
	for kind, typ := range kinds {
		if slices.Contains(own, kind) {
			opts = append(opts, oci.WithLinuxNamespace(specs.LinuxNamespace{Type: typ, Path: r.nsPath(rec.UID, kind)}))
		} else {
			opts = append(opts, oci.WithHostNamespace(typ))
		}
	}
	if cfg.Pod.Spec.HostPID {
		opts = append(opts, oci.WithHostNamespace(specs.PIDNamespace))
	}
	if tree, err := cgroups(); err == nil && tree.unified != "" {
		opts = append(opts, oci.WithNamespacedCgroup())
	}
	return opts
}

func (r *Runtime) resourceOpts(cfg agent.ContainerConfig) []oci.SpecOpts {
	res := cfg.Container.Resources
	opts := []oci.SpecOpts{oci.WithCPUShares(cpuShares(res))}
	if quota := cpuQuota(res); quota > 0 {
		opts = append(opts, oci.WithCPUCFS(quota, cfsPeriod))
	}
	if limit := memoryLimit(res); limit > 0 {
		opts = append(opts, oci.WithMemoryLimit(uint64(limit)))
	}
	if r.cfg.PidsLimit > 0 {
		opts = append(opts, oci.WithPidsLimit(r.cfg.PidsLimit))
	}
	score := oomScore(cfg.Pod, cfg.Container)
	return append(opts, func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		s.Process.OOMScoreAdj = &score
		return nil
	})
}

// oomScore says who dies first when the node runs out of memory: those without
// requests (1000), then those that use most beyond their request, last the
// guaranteed (-997). The values are the kubelet's.
func oomScore(pod *corev1.Pod, c *corev1.Container) int {
	guaranteed, any := true, false
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		any = any || len(c.Resources.Requests) > 0 || len(c.Resources.Limits) > 0
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			limit, limited := c.Resources.Limits[name]
			request, requested := c.Resources.Requests[name]
			if !limited || limit.IsZero() || requested && request.Cmp(limit) != 0 {
				guaranteed = false
			}
		}
	}
	if !any {
		return 1000
	}
	if guaranteed {
		return -997
	}
	capacity := memoryCapacity()
	if capacity <= 0 {
		return 999
	}
	return int(min(max(1000-1000*c.Resources.Requests.Memory().Value()/capacity, 3), 999))
}

// withMounts adds the agent's mounts to the default ones. A mount over a default one
// replaces it.
func withMounts(shm string, mounts []agent.Mount) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		taken := map[string]bool{"/run": true} // the image's own /run, not a tmpfs
		for _, m := range mounts {
			taken[filepath.Clean(m.ContainerPath)] = true
		}
		s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool {
			return taken[filepath.Clean(m.Destination)] || m.Destination == "/dev/shm"
		})
		if !taken["/dev/shm"] {
			s.Mounts = append(s.Mounts, specs.Mount{
				Destination: "/dev/shm", Type: "bind", Source: shm, Options: []string{"rbind", "rprivate", "rw"},
			})
		}
		s.Mounts = append(s.Mounts, specs.Mount{
			Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"},
		})
		mounts = slices.Clone(mounts)
		// A mount inside another one comes after it.
		slices.SortStableFunc(mounts, func(a, b agent.Mount) int {
			return strings.Count(filepath.Clean(a.ContainerPath), "/") - strings.Count(filepath.Clean(b.ContainerPath), "/")
		})
		for _, m := range mounts {
			if _, err := os.Stat(m.HostPath); err != nil {
				return fmt.Errorf("mount %s: %w", m.ContainerPath, err)
			}
			mode := "rw"
			if m.ReadOnly {
				mode = "ro"
			}
			s.Mounts = append(s.Mounts, specs.Mount{
				Destination: m.ContainerPath, Source: m.HostPath, Type: "bind", Options: []string{"rbind", "rprivate", mode},
			})
		}
		return nil
	}
}
