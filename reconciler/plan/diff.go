package plan

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// keepAssigned copies into desired what the cluster has assigned to current and
// the user left open, so that it neither counts as a difference nor gets lost.
func keepAssigned(desired, current api.Object) {
	desired.SetUID(current.GetUID())
	desired.SetResourceVersion(current.GetResourceVersion())
	desired.SetCreationTimestamp(current.GetCreationTimestamp())
	desired.SetGeneration(current.GetGeneration())
	desired.SetManagedFields(current.GetManagedFields())
	desired.SetFinalizers(current.GetFinalizers())
	desired.SetOwnerReferences(current.GetOwnerReferences())
	switch d := desired.(type) {
	case *corev1.Service:
		keepServiceAddresses(&d.Spec, &current.(*corev1.Service).Spec)
	case *corev1.Pod:
		if d.Spec.NodeName == "" {
			d.Spec.NodeName = current.(*corev1.Pod).Spec.NodeName
		}
	}
}

// keepServiceAddresses takes over what d leaves open. Families that the cluster chose
// by itself go on; a choice of the user that is gone from Git is gone, so that the state
// machine decides anew.
func keepServiceAddresses(d, c *corev1.ServiceSpec) {
	if d.Type == corev1.ServiceTypeExternalName || c.Type == corev1.ServiceTypeExternalName {
		return
	}
	keepFamilies(d, c)
	if d.HealthCheckNodePort == 0 && d.Type == c.Type && d.ExternalTrafficPolicy == c.ExternalTrafficPolicy {
		d.HealthCheckNodePort = c.HealthCheckNodePort
	}
	if d.Type == corev1.ServiceTypeClusterIP || d.AllocateLoadBalancerNodePorts != nil && !*d.AllocateLoadBalancerNodePorts {
		return
	}
	for i := range d.Ports {
		for _, old := range c.Ports {
			if p := &d.Ports[i]; p.NodePort == 0 && p.Port == old.Port && p.Protocol == old.Protocol && !names(d.Ports, old) {
				p.NodePort = old.NodePort
			}
		}
	}
}

// names reports whether one of ports names the node port of p.
func names(ports []corev1.ServicePort, p corev1.ServicePort) bool {
	return slices.ContainsFunc(ports, func(o corev1.ServicePort) bool { return o.NodePort == p.NodePort && o.Protocol == p.Protocol })
}

// keepFamilies takes over the families and addresses of c. The primary family of a
// service cannot change, as little as its address.
func keepFamilies(d, c *corev1.ServiceSpec) {
	if d.IPFamilyPolicy == nil && (len(c.IPFamilies) < 2 || len(d.IPFamilies) > 1 || len(d.ClusterIPs) > 1) {
		d.IPFamilyPolicy = c.IPFamilyPolicy
	}
	same := d.IPFamilyPolicy == c.IPFamilyPolicy || d.IPFamilyPolicy != nil && c.IPFamilyPolicy != nil && *d.IPFamilyPolicy == *c.IPFamilyPolicy
	if len(d.IPFamilies) == 0 && (same || len(c.IPFamilies) == 1) {
		d.IPFamilies = slices.Clone(c.IPFamilies)
	}
	if len(d.IPFamilies) > 0 && len(c.IPFamilies) > 0 && d.IPFamilies[0] != c.IPFamilies[0] {
		return
	}
	if d.ClusterIP == "" && c.ClusterIP != corev1.ClusterIPNone {
		d.ClusterIP = c.ClusterIP
	}
	if d.ClusterIP == c.ClusterIP && len(d.ClusterIPs) == 0 && same {
		d.ClusterIPs = slices.Clone(c.ClusterIPs)
	}
}

// differences lists the fields in which the desired object differs from the
// current one, in path order, at most MaxEdits. Status, the metadata that the
// server assigns and the origin annotations are not compared.
func differences(it *item) []Edit {
	d := differ{item: it, hidden: it.key.Resource == api.Secrets}
	d.walk("", tree(it.current), tree(it.object))
	return d.edits
}

// tree is the comparable content of o as JSON values.
func tree(o api.Object) map[string]any {
	raw, err := json.Marshal(o)
	if err != nil {
		panic(fmt.Sprintf("plan: encode %s: %v", api.KeyOf(o), err)) // registered types encode
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	t := map[string]any{}
	if err := dec.Decode(&t); err != nil {
		panic(fmt.Sprintf("plan: decode %s: %v", api.KeyOf(o), err))
	}
	delete(t, "status")
	delete(t, "apiVersion")
	delete(t, "kind")
	meta, content := t["metadata"].(map[string]any), map[string]any{}
	content["labels"] = meta["labels"]
	if a, ok := meta["annotations"].(map[string]any); ok {
		maps.DeleteFunc(a, func(name string, _ any) bool { return strings.HasPrefix(name, reservedPrefix) })
		content["annotations"] = a
	}
	t["metadata"] = content
	return t
}

type differ struct {
	item   *item
	hidden bool // the values are secret
	edits  []Edit
}

func (d *differ) walk(path string, old, new any) {
	if len(d.edits) >= MaxEdits {
		return
	}
	oldMap, ok1 := old.(map[string]any)
	newMap, ok2 := new.(map[string]any)
	if ok1 && ok2 {
		for _, k := range unionKeys(oldMap, newMap) {
			d.walk(join(path, k), oldMap[k], newMap[k])
		}
		return
	}
	oldList, ok1 := old.([]any)
	newList, ok2 := new.([]any)
	if ok1 && ok2 {
		for i := range max(len(oldList), len(newList)) {
			d.walk(path+"["+strconv.Itoa(i)+"]", at(oldList, i), at(newList, i))
		}
		return
	}
	if absent(old) && absent(new) || scalarsEqual(old, new) {
		return
	}
	e := Edit{Field: path, Pos: d.item.position(path), Hidden: d.hidden && !strings.HasPrefix(path, "metadata.")}
	if !e.Hidden {
		e.Old, e.New = short(old), short(new)
	}
	d.edits = append(d.edits, e)
}

func unionKeys(a, b map[string]any) []string {
	keys := slices.AppendSeq(slices.Collect(maps.Keys(a)), maps.Keys(b))
	slices.Sort(keys)
	return slices.Compact(keys)
}

func at(list []any, i int) any {
	if i < len(list) {
		return list[i]
	}
	return nil
}

// absent treats null, an empty list and a map of absent values under metadata alike;
// an empty struct such as emptyDir: {} is a value.
func absent(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case []any:
		return len(v) == 0
	case map[string]any:
		return false
	}
	return false
}

func scalarsEqual(a, b any) bool {
	switch a.(type) {
	case map[string]any, []any:
		return false
	}
	switch b.(type) {
	case map[string]any, []any:
		return false
	}
	return a == b
}

// maxValue is how many characters of a value are shown.
const maxValue = 60

// short renders a JSON value for one line of text; "" for an absent one.
func short(v any) string {
	if v == nil {
		return ""
	}
	if s, ok := v.(string); ok && s != "" && !strings.ContainsAny(s, " \t\r\n\"→") && len(s) <= maxValue {
		return s
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return "?"
	}
	r := []rune(string(raw))
	if len(r) > maxValue {
		return string(r[:maxValue-1]) + "…"
	}
	return string(r)
}

// join appends a map key to a field path; keys that are not identifiers are quoted.
func join(path, key string) string {
	if strings.ContainsAny(key, `./[]" `) || key == "" {
		return path + "[" + strconv.Quote(key) + "]"
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// position is where field is written, or else the nearest enclosing field, or else
// where the object begins.
func (it *item) position(field string) api.Position {
	for field != "" {
		if pos, ok := it.Fields[field]; ok {
			return pos
		}
		i := strings.LastIndexAny(field, ".[")
		if j := strings.LastIndex(field, `["`); j >= 0 && strings.HasSuffix(field, `"]`) {
			i = j
		}
		if i < 0 {
			break
		}
		field = field[:i]
	}
	return it.Pos
}
