package api

import (
	"fmt"

	"k8s.io/apimachinery/pkg/api/resource"
)

// The annotations of a pod that limit what it receives and sends, in bits per second;
// those that Kubernetes knows.
const (
	IngressBandwidth = "kubernetes.io/ingress-bandwidth"
	EgressBandwidth  = "kubernetes.io/egress-bandwidth"
)

var (
	minBandwidth = resource.MustParse("1k")
	maxBandwidth = resource.MustParse("1P")
)

// ParseBandwidth returns the rate in bits per second that the value of such an
// annotation means.
func ParseBandwidth(text string) (int64, error) {
	q, err := resource.ParseQuantity(text)
	if err != nil || q.Cmp(minBandwidth) < 0 || q.Cmp(maxBandwidth) > 0 {
		return 0, fmt.Errorf("%q is no rate in bits per second between 1k and 1P, such as 10M", text)
	}
	return q.Value(), nil
}
