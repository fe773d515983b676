package apiserver

import (
	"fmt"
	"net/http"
	goruntime "runtime"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"

	"decree.dev/decree/schemas/api"
)

// apiLevel is the Kubernetes version whose types are served.
const apiLevel = "1.37"

func (s *Server) serveLive(w http.ResponseWriter, _ *http.Request) { writeText(w, http.StatusOK, "ok") }

func (s *Server) serveReady(w http.ResponseWriter, r *http.Request) {
	if s.cfg.Ready != nil {
		if err := s.cfg.Ready(r.Context()); err != nil {
			s.log.Debug("not ready", "error", err)
			writeText(w, http.StatusServiceUnavailable, "not ready") // the reason is not for strangers
			return
		}
	}
	writeText(w, http.StatusOK, "ok")
}

func writeText(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(text))
}

func (s *Server) serveVersion(w http.ResponseWriter, _ *http.Request) {
	v := version.Info{Major: "1", Minor: "37", GitVersion: "v" + apiLevel + ".0", GoVersion: goruntime.Version(), Compiler: goruntime.Compiler, Platform: goruntime.GOOS + "/" + goruntime.GOARCH}
	if s.cfg.Version != "" {
		v.GitVersion += "+decree." + s.cfg.Version
	}
	writeJSON(w, http.StatusOK, v)
}

func (s *Server) serveCoreVersions(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, metav1.APIVersions{
		TypeMeta: metav1.TypeMeta{Kind: "APIVersions"},
		Versions: []string{"v1"},
	})
}

func (s *Server) serveGroups(w http.ResponseWriter, _ *http.Request) {
	list := metav1.APIGroupList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIGroupList"}, Groups: []metav1.APIGroup{}}
	var seen []string
	for _, k := range api.Served() {
		if k.Group != "" && !slices.Contains(seen, k.Group) {
			seen = append(seen, k.Group)
			list.Groups = append(list.Groups, apiGroup(k.Group))
		}
	}
	writeJSON(w, http.StatusOK, list)
}

func apiGroup(name string) metav1.APIGroup {
	g := metav1.APIGroup{Name: name}
	for _, k := range api.Served() {
		v := metav1.GroupVersionForDiscovery{GroupVersion: k.GroupVersion().String(), Version: k.Version}
		if k.Group == name && !slices.Contains(g.Versions, v) {
			g.Versions = append(g.Versions, v)
		}
	}
	if len(g.Versions) > 0 {
		g.PreferredVersion = g.Versions[0]
	}
	return g
}

func (s *Server) serveGroup(w http.ResponseWriter, r *http.Request) {
	g := apiGroup(r.PathValue("group"))
	if len(g.Versions) == 0 {
		s.fail(w, r, notServed(schema.GroupVersion{Group: g.Name}, "*"))
		return
	}
	g.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "APIGroup"}
	writeJSON(w, http.StatusOK, g)
}

// The verbs that discovery shows. Delete is shown for pods, so that `kubectl delete
// pod` works, and nothing else: desired state comes from Git.
var readVerbs = metav1.Verbs{"get", "list", "watch"}

func (s *Server) serveResources(w http.ResponseWriter, r *http.Request) {
	gv := schema.GroupVersion{Group: r.PathValue("group"), Version: r.PathValue("version")}
	list := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIResourceList"}, GroupVersion: gv.String(), APIResources: []metav1.APIResource{}}
	for _, k := range api.Served() {
		if k.GroupVersion() != gv {
			continue
		}
		res := metav1.APIResource{Name: k.Plural, SingularName: k.Singular, Namespaced: k.Namespaced, Kind: k.Kind, ShortNames: k.ShortNames, Verbs: readVerbs, Categories: categories(k)}
		if k.Resource == api.Pods {
			res.Verbs = append(slices.Clip(readVerbs), "delete")
		}
		list.APIResources = append(list.APIResources, res)
		list.APIResources = append(list.APIResources, subresources(k)...)
	}
	if len(list.APIResources) == 0 {
		s.fail(w, r, notServed(gv, "*"))
		return
	}
	writeJSON(w, http.StatusOK, list)
}

// categories puts what people run into `kubectl get all`.
func categories(k *api.Kind) []string {
	switch k.Resource {
	case api.Pods, api.Services, api.Deployments, api.ReplicaSets:
		return []string{"all"}
	}
	return nil
}

func subresources(k *api.Kind) []metav1.APIResource {
	sub := func(name, kind string, verbs ...string) metav1.APIResource {
		return metav1.APIResource{Name: k.Plural + "/" + name, Namespaced: k.Namespaced, Kind: kind, Verbs: verbs}
	}
	switch k.Resource {
	case api.Pods:
		return []metav1.APIResource{sub("log", "Pod", "get"), sub("exec", "PodExecOptions", "create", "get")}
	case api.Nodes:
		return []metav1.APIResource{sub("proxy", "NodeProxyOptions", "get")}
	case api.Sources:
		return []metav1.APIResource{sub("sync", "Source", "create"), sub("suspend", "Source", "create"), sub("resume", "Source", "create"), sub("plan", "Source", "create")}
	}
	return nil
}

// serveOpenAPIv2 answers with a document that describes no types: kubectl asks for
// it before it sends a write, which is then refused with the place in Git. The
// types are described by the CUE definitions.
func (s *Server) serveOpenAPIv2(w http.ResponseWriter, r *http.Request) {
	const proto = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf" // not a valid media type, but what clients ask for
	if !accepts(r, proto) {
		writeJSON(w, http.StatusOK, map[string]any{"swagger": "2.0", "info": map[string]string{"title": "Decree", "version": s.openAPIVersion()}, "paths": map[string]any{}})
		return
	}
	// openapi.v2.Document{swagger = 1, info = 2 {title = 1, version = 2}, paths = 8}
	var info, doc []byte
	info = protowire.AppendString(protowire.AppendTag(info, 1, protowire.BytesType), "Decree")
	info = protowire.AppendString(protowire.AppendTag(info, 2, protowire.BytesType), s.openAPIVersion())
	doc = protowire.AppendString(protowire.AppendTag(doc, 1, protowire.BytesType), "2.0")
	doc = protowire.AppendBytes(protowire.AppendTag(doc, 2, protowire.BytesType), info)
	doc = protowire.AppendBytes(protowire.AppendTag(doc, 8, protowire.BytesType), nil)
	w.Header().Set("Content-Type", strings.Replace(proto, "@", ".", 1))
	_, _ = w.Write(doc)
}

func (s *Server) serveOpenAPIv3(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]any{"paths": map[string]any{}})
}

func (s *Server) openAPIVersion() string {
	return fmt.Sprintf("v%s.0 %s", apiLevel, s.cfg.Version)
}
