package agent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// Versioned is implemented by runtimes that can say their name and version, such
// as "containerd://1.6.20".
type Versioned interface {
	Version(ctx context.Context) (string, error)
}

// runNode registers the node and reports its status: at every heartbeat, and when
// the runtime is lost or found.
func (a *Agent) runNode(ctx context.Context) {
	facts, err := a.measure(ctx)
	if err != nil {
		a.log.Warn("measure the node", "err", err)
	}
	tick := time.NewTicker(a.cfg.Heartbeat)
	defer tick.Stop()
	var reported *corev1.Node
	lost := true
	a.settle(ctx)
	for {
		since, err := a.obs.health()
		_, list := a.obs.all()
		if err == nil && list == 0 {
			err = errors.New("the runtime has not answered yet")
		}
		reported = a.reportNode(facts, reported, err, since)
		switch {
		case err != nil && list > 0:
			a.log.Warn("container runtime", "err", err)
			if !lost {
				a.events.aboutNode(true, "NodeNotReady", "The container runtime does not answer: "+oneLine(err.Error()))
			}
		case err == nil && lost:
			a.events.aboutNode(false, "NodeReady", "The agent runs and the container runtime answers")
		}
		lost = err != nil
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-a.obs.turned:
		}
		if facts.runtime == "" && !lost {
			facts.runtime = runtimeVersion(ctx, a.cfg.Runtime)
		}
	}
}

// settleTime is how long a new agent waits, at most, before it first says how its
// node does.
const settleTime = 3 * time.Second

// settle waits until the runtime has answered, or not, and the view is there: a node
// whose agent restarts is not to be taken for a broken one.
func (a *Agent) settle(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	end := time.After(settleTime)
	for {
		_, err := a.obs.health()
		if _, list := a.obs.all(); err != nil || list > 0 && a.isSynced() {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-end:
			return
		case <-tick.C:
		}
	}
}

// facts are what is measured once.
type facts struct {
	capacity corev1.ResourceList
	runtime  string
	info     corev1.NodeSystemInfo
}

func (a *Agent) measure(ctx context.Context) (facts, error) {
	f := facts{runtime: runtimeVersion(ctx, a.cfg.Runtime), capacity: corev1.ResourceList{
		corev1.ResourceCPU:  *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI),
		corev1.ResourcePods: *resource.NewQuantity(a.cfg.MaxPods, resource.DecimalSI),
	}}
	f.info = corev1.NodeSystemInfo{Architecture: runtime.GOARCH, OperatingSystem: runtime.GOOS, KubeletVersion: a.cfg.Version}
	var errs []error
	if b, err := memoryTotal(); err != nil {
		errs = append(errs, err)
	} else {
		f.capacity[corev1.ResourceMemory] = *resource.NewQuantity(b, resource.BinarySI)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(a.cfg.Dir, &fs); err != nil {
		errs = append(errs, fmt.Errorf("size of %s: %w", a.cfg.Dir, err))
	} else {
		f.capacity[corev1.ResourceEphemeralStorage] = *resource.NewQuantity(int64(fs.Blocks)*fs.Bsize, resource.BinarySI)
	}
	maps.Copy(f.capacity, a.cfg.Capacity)
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		f.info.KernelVersion = unix.ByteSliceToString(uts.Release[:])
	}
	f.info.MachineID = readLine("/etc/machine-id")
	f.info.BootID = readLine("/proc/sys/kernel/random/boot_id")
	f.info.OSImage = osImage()
	return f, errors.Join(errs...)
}

func runtimeVersion(ctx context.Context, r Runtime) string {
	v, ok := r.(Versioned)
	if !ok {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := v.Version(ctx)
	if err != nil {
		return ""
	}
	return s
}

func memoryTotal() (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemTotal")
}

func readLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func osImage() string {
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return ""
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "PRETTY_NAME="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return ""
}

// reportNode reports the node's status. The object itself is written only when it
// is missing or lacks our labels or annotations; what others set in it stays.
func (a *Agent) reportNode(f facts, last *corev1.Node, lost error, since time.Time) *corev1.Node {
	var have *corev1.Node
	synced := a.isSynced()
	if view := a.cfg.ControlPlane.View(); view != nil {
		have, _ = api.Get[*corev1.Node](view, "", a.cfg.Node)
	}
	node := &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: a.cfg.Node}}
	if have != nil {
		node = api.Clone(have)
	}
	if node.Labels == nil {
		node.Labels = map[string]string{}
	}
	wanted := a.nodeLabels()
	missing := false
	for k, v := range wanted {
		missing = missing || node.Labels[k] != v
		node.Labels[k] = v
	}
	for k, v := range a.cfg.Annotations {
		missing = missing || node.Annotations[k] != v
		if v == "" {
			delete(node.Annotations, k)
			continue
		}
		metav1.SetMetaDataAnnotation(&node.ObjectMeta, k, v)
	}
	if last != nil {
		node.Status.Conditions = last.Status.Conditions
	}
	a.fillNode(node, f, lost, since)
	key := api.KeyOf(node)
	refused := func(err error) { a.log.Warn("report the node", "node", a.cfg.Node, "err", err) }
	switch {
	case have == nil && last != nil && !synced:
		// The view may be behind: our node is probably there.
		a.report.put(api.Mutation{Verb: api.UpdateStatus, Key: key, Object: node}, refused)
	case have == nil:
		a.report.put(api.Mutation{Verb: api.Create, Key: key, Object: node}, func(error) {
			a.report.put(api.Mutation{Verb: api.UpdateStatus, Key: key, Object: node}, refused)
		})
	case missing:
		a.report.put(api.Mutation{Verb: api.Update, Key: key, Object: node}, func(err error) {
			refused(err) // by a server of a version that does not take it
			a.report.put(api.Mutation{Verb: api.UpdateStatus, Key: key, Object: node}, refused)
		})
	case last != nil && sameStatus(have, node):
		a.report.beat() // contact is all there is to say: nothing for the log
	default:
		a.report.put(api.Mutation{Verb: api.UpdateStatus, Key: key, Object: node}, refused)
	}
	return node
}

// sameStatus reports whether two nodes differ in the time of the heartbeat at most.
func sameStatus(a, b *corev1.Node) bool {
	a, b = api.Clone(a), api.Clone(b)
	for _, n := range []*corev1.Node{a, b} {
		for i := range n.Status.Conditions {
			n.Status.Conditions[i].LastHeartbeatTime = metav1.Time{}
		}
	}
	return equality.Semantic.DeepEqual(a.Status, b.Status)
}

func (a *Agent) nodeLabels() map[string]string {
	l := map[string]string{corev1.LabelHostname: a.cfg.Node, corev1.LabelArchStable: runtime.GOARCH, corev1.LabelOSStable: runtime.GOOS}
	maps.Copy(l, a.cfg.Labels)
	return l
}

func (a *Agent) fillNode(node *corev1.Node, f facts, lost error, since time.Time) {
	st := &node.Status
	st.Capacity, st.Allocatable = f.capacity, maps.Clone(f.capacity)
	st.NodeInfo = f.info
	st.NodeInfo.ContainerRuntimeVersion = f.runtime
	st.Addresses = nil
	for _, ip := range a.cfg.HostIPs {
		st.Addresses = append(st.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip.String()})
	}
	st.Addresses = append(st.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: a.cfg.Node})
	now := *seconds(time.Now())
	ready := corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "AgentReady",
		Message: "the agent runs and the container runtime answers", LastHeartbeatTime: now, LastTransitionTime: now}
	if lost != nil {
		ready.Status, ready.Reason = corev1.ConditionFalse, "RuntimeUnreachable"
		ready.Message = "the container runtime does not answer: " + oneLine(lost.Error())
		if !since.IsZero() {
			ready.Message = fmt.Sprintf("the container runtime does not answer since %s: %s", since.UTC().Format(time.RFC3339), oneLine(lost.Error()))
		}
	}
	conditions := []corev1.NodeCondition{ready}
	for _, c := range st.Conditions {
		if c.Type != corev1.NodeReady {
			conditions = append(conditions, c)
			continue
		}
		if c.Status == ready.Status {
			conditions[0].LastTransitionTime = c.LastTransitionTime
		}
	}
	st.Conditions = conditions
}
