package apiserver

import (
	"mime"
	"net/http"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// format is how a client wants an answer.
type format struct {
	table   bool   // a meta.k8s.io Table instead of objects
	version string // "v1" or "v1beta1" of the Table
	include metav1.IncludeObjectPolicy
	yaml    bool
}

// negotiate picks the first acceptable format. Order counts, weights do not: that
// is how Kubernetes clients list what they want.
func negotiate(r *http.Request) (format, error) {
	f := format{include: metav1.IncludeObjectPolicy(r.URL.Query().Get("includeObject"))}
	switch f.include {
	case "":
		f.include = metav1.IncludeMetadata
	case metav1.IncludeMetadata, metav1.IncludeNone, metav1.IncludeObject:
	default:
		return f, statusError(http.StatusBadRequest, metav1.StatusReasonBadRequest, "includeObject must be None, Metadata or Object")
	}
	accept := strings.Join(r.Header.Values("Accept"), ",")
	if accept == "" {
		return f, nil
	}
	for part := range strings.SplitSeq(accept, ",") {
		media, params, err := mime.ParseMediaType(strings.TrimSpace(part))
		if err != nil {
			continue
		}
		switch as := params["as"]; {
		case as == "Table" && params["g"] == metav1.GroupName && media == "application/json" && (params["v"] == "v1" || params["v"] == "v1beta1"):
			f.table, f.version = true, params["v"]
			return f, nil
		case as != "":
			continue // PartialObjectMetadata and others: a later entry is plain
		case media == "application/json" || media == "*/*" || media == "application/*":
			return f, nil
		case media == "application/yaml":
			f.yaml = true
			return f, nil
		}
	}
	return f, statusError(http.StatusNotAcceptable, metav1.StatusReasonNotAcceptable, "the server answers with application/json or application/yaml, not "+clip(accept, 200))
}

// accepts reports whether the client names exactly this media type.
func accepts(r *http.Request, media string) bool {
	for _, h := range r.Header.Values("Accept") {
		if slices.ContainsFunc(strings.Split(h, ","), func(s string) bool { return strings.TrimSpace(s) == media }) {
			return true
		}
	}
	return false
}
