// Package agent runs the pods that are bound to one node: it decides each pod's
// next step, carries it out through a Runtime and a Network, probes containers,
// prepares volumes, and reports status.
package agent

import (
	"context"
	"io"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/schemas/api"
)

// ControlPlane is the agent's view of the cluster: a local copy that survives the
// loss of every server, and a way to report.
type ControlPlane interface {
	// View is the local copy as of now: the pods bound to this node, the config maps
	// and secrets they use, namespaces, services, endpoint slices and nodes.
	View() api.Reader
	// Changed receives after the view has changed; it holds at most one signal.
	Changed() <-chan struct{}
	// Synced is closed once the view was loaded from the control plane: what it does
	// not hold is then taken for removed. Until then it may be nil, or what an earlier
	// process kept.
	Synced() <-chan struct{}
	// Report sends mutations (status of pods and of the node, events, removal of
	// terminated pods). It returns one error per mutation, nil for the applied ones.
	Report(ctx context.Context, ms []api.Mutation) ([]error, error)
}

// Network gives pods their addresses. All methods are idempotent.
type Network interface {
	// Attach connects the network namespace at path netns to the cluster and returns
	// the pod's addresses, the primary one first.
	Attach(ctx context.Context, pod *corev1.Pod, netns string) ([]netip.Addr, error)
	// Withdraw returns once no service of this node sends new connections to the pod,
	// and those just made have had time to be accepted. A pod behind no service is
	// withdrawn at once. It waits for the control plane to take the pod out, and
	// returns the cause when ctx ends first.
	Withdraw(ctx context.Context, pod types.UID) error
	// Detach undoes Attach; netns may be gone already.
	Detach(ctx context.Context, pod types.UID, netns string) error
	// Attached lists the pods that hold network resources, for garbage collection.
	Attached(ctx context.Context) ([]types.UID, error)
}

// Runtime runs sandboxes and containers. All methods are idempotent and return an
// error matching ErrNotFound for what does not exist. A lost connection is an
// error, never an exit.
type Runtime interface {
	// List returns everything the runtime holds for this agent, running or not:
	// the only source of truth after a restart of either side.
	List(ctx context.Context) ([]Sandbox, error)
	// Events receives after any container has changed state; it holds at most one
	// signal and never replaces List.
	Events() <-chan struct{}

	// PullImage makes the image present and returns its digest reference.
	PullImage(ctx context.Context, image string, policy corev1.PullPolicy, auth []RegistryAuth) (ref string, err error)

	// CreateSandbox makes the pod's network, IPC and UTS namespaces and its cgroup.
	CreateSandbox(ctx context.Context, cfg SandboxConfig) (Sandbox, error)
	// RemoveSandbox removes the namespaces and the cgroup; containers must be gone.
	RemoveSandbox(ctx context.Context, pod types.UID) error

	// CreateContainer prepares a container; StartContainer runs it.
	CreateContainer(ctx context.Context, cfg ContainerConfig) (id string, err error)
	StartContainer(ctx context.Context, id string) error
	// SignalContainer sends a signal to the container's first process.
	SignalContainer(ctx context.Context, id string, signal int) error
	// RemoveContainer kills what still runs and removes container and snapshot. Logs
	// stay until RemoveSandbox.
	RemoveContainer(ctx context.Context, id string) error

	// Exec runs a command in a container and returns its exit code.
	Exec(ctx context.Context, id string, cfg ExecConfig) (int, error)
	// Logs copies a container's log to w.
	Logs(ctx context.Context, pod types.UID, container string, opts LogOptions, w io.Writer) error
}

// SandboxConfig describes a pod to the runtime.
type SandboxConfig struct {
	Pod       *corev1.Pod
	Hostname  string
	HostNet   bool
	Resources corev1.ResourceRequirements // of the whole pod
}

// Sandbox is a pod as the runtime holds it.
type Sandbox struct {
	UID             types.UID
	Namespace, Name string
	NetNS           string // path of the network namespace; "" with host network
	CreatedAt       time.Time
	// Lost is set when the namespaces are gone, as after a restart of the machine.
	// CreateSandbox makes them anew; the containers have ended with them.
	Lost       bool
	Containers []Container
}

// ContainerState is the state of one container.
type ContainerState uint8

// The states of a container.
const (
	Created ContainerState = iota + 1
	Running
	Exited
)

// Container is one attempt to run one container of a pod.
type Container struct {
	ID         string
	Name       string // the container's name in the pod
	Attempt    int    // 0 for the first, one more for each restart
	Init       bool
	State      ContainerState
	Image      string // as written in the pod
	ImageRef   string // by digest
	Pid        uint32
	CreatedAt  time.Time
	StartedAt  time.Time
	FinishedAt time.Time
	ExitCode   int32
	Signal     int32
	OOMKilled  bool
	// Hash is ContainerConfig.Hash as given at creation.
	Hash string
}

// Mount is one path of the node made visible in a container.
type Mount struct {
	HostPath, ContainerPath string
	ReadOnly                bool
}

// ContainerConfig describes one container to the runtime.
type ContainerConfig struct {
	Pod       *corev1.Pod
	Container *corev1.Container // with env already expanded into Env below
	Attempt   int
	Init      bool
	ImageRef  string
	Hostname  string
	Env       []string // NAME=value, final
	Args      []string // command and args after $(VAR) expansion; empty: the image's own
	Mounts    []Mount
	Hash      string
}

// ExecConfig describes a process to run in a container.
type ExecConfig struct {
	Command        []string
	TTY            bool
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Resize         <-chan TerminalSize
	Timeout        time.Duration // zero: none
}

// TerminalSize is the size of a terminal in characters.
type TerminalSize struct{ Width, Height uint16 }

// LogOptions choose a part of a log, as in the Kubernetes API (PodLogOptions).
type LogOptions struct {
	Follow, Previous, Timestamps bool
	TailLines                    int64 // negative: all
	Since                        time.Time
	LimitBytes                   int64 // zero: no limit
}

// RegistryAuth is a credential for one registry host.
type RegistryAuth struct{ Host, Username, Password string }
