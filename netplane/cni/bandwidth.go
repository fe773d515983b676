package cni

import (
	"encoding/json"
	"fmt"
	"math"

	"github.com/containernetworking/cni/libcni"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// minBurst is the least that may pass at once, in bits: some full packets.
const minBurst = 64 << 10 * 8

// bandwidth is the capability "bandwidth" of the CNI conventions, in bits and bits per
// second; nil for a pod without limits. A burst is what passes in a tenth of a second.
func bandwidth(pod *corev1.Pod) (map[string]any, error) {
	limits := map[string]any{}
	for _, c := range []struct{ annotation, name string }{{api.IngressBandwidth, "ingress"}, {api.EgressBandwidth, "egress"}} {
		text, ok := pod.Annotations[c.annotation]
		if !ok {
			continue
		}
		rate, err := api.ParseBandwidth(text)
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %w", c.annotation, err)
		}
		limits[c.name+"Rate"] = rate
		limits[c.name+"Burst"] = min(max(rate/10, minBurst), math.MaxInt32)
	}
	if len(limits) == 0 {
		return nil, nil
	}
	return limits, nil
}

// limited is the generated network with the plugin that limits pods, which the others
// are spared.
func limited(list *libcni.NetworkConfigList) (*libcni.NetworkConfigList, error) {
	var conf map[string]json.RawMessage
	var plugins []json.RawMessage
	if err := json.Unmarshal(list.Bytes, &conf); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(conf["plugins"], &plugins); err != nil {
		return nil, err
	}
	all, err := json.Marshal(append(plugins, json.RawMessage(`{"type":"bandwidth","capabilities":{"bandwidth":true}}`)))
	if err != nil {
		return nil, err
	}
	conf["plugins"] = all
	b, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	return parseConf(b, true)
}
