package apiserver

import (
	"net/http"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"decree.dev/decree/schemas/api"
)

// target is the object or collection that a path names.
type target struct {
	kind        *api.Kind
	namespace   string // "" for cluster-scoped kinds and for all namespaces
	name        string // "" for a collection
	subresource string
	rest        string // of the path, below the proxy of a node
}

func (t target) key() api.Key {
	return api.Key{Resource: t.kind.Resource, Namespace: t.namespace, Name: t.name}
}

// newRoutes puts the fixed paths into a mux; objects are found by parsing.
func (s *Server) newRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", s.serveLive)
	mux.HandleFunc("GET /readyz", s.serveReady)
	mux.HandleFunc("GET /healthz", s.serveReady)
	mux.HandleFunc("GET /version", s.serveVersion)
	mux.HandleFunc("GET /api", s.serveCoreVersions)
	mux.HandleFunc("GET /apis", s.serveGroups)
	mux.HandleFunc("GET /apis/{group}", s.serveGroup)
	mux.HandleFunc("GET /api/{version}", s.serveResources)
	mux.HandleFunc("GET /apis/{group}/{version}", s.serveResources)
	mux.HandleFunc("GET /openapi/v2", s.serveOpenAPIv2)
	mux.HandleFunc("GET /openapi/v3", s.serveOpenAPIv3)
	mux.HandleFunc("/api/{version}/{path...}", s.serveObjects)
	mux.HandleFunc("/apis/{group}/{version}/{path...}", s.serveObjects)
	mux.HandleFunc("POST /apis/"+api.GroupVersion.String()+"/nodes/{node}/report", s.serveReport)
	if s.cfg.Metrics != nil {
		mux.Handle("GET /metrics", s.cfg.Metrics)
	}
	for _, handlers := range []map[string]http.Handler{s.cfg.Mount, s.cfg.Open} {
		for pattern, h := range handlers {
			mux.Handle(pattern, h)
		}
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, statusError(http.StatusNotFound, metav1.StatusReasonNotFound, "the server has nothing at "+r.URL.Path))
	})
	return mux
}

// parseTarget reads what follows the group and version in a path:
//
//	RESOURCE[/NAME[/SUBRESOURCE]]
//	namespaces/NAMESPACE/RESOURCE[/NAME[/SUBRESOURCE]]
//	nodes/NAME/proxy/REST
func parseTarget(gv schema.GroupVersion, path string) (target, error) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	var t target
	if parts[0] == "namespaces" && len(parts) > 2 && !namespaceSubresource(gv, parts) {
		t.namespace, parts = parts[1], parts[2:]
	}
	for _, k := range api.Served() {
		if k.Plural == parts[0] && k.Group == gv.Group && k.Version == gv.Version {
			t.kind = k
		}
	}
	if t.kind != nil && t.kind.Resource == api.Nodes && len(parts) > 3 && parts[2] == "proxy" {
		t.rest, parts = strings.Join(parts[3:], "/"), parts[:3]
	}
	switch {
	case t.kind == nil, len(parts) > 3, t.namespace != "" && !t.kind.Namespaced:
		return t, notServed(gv, parts[0])
	case len(parts) == 3:
		t.name, t.subresource = parts[1], parts[2]
	case len(parts) == 2:
		t.name = parts[1]
	}
	if t.kind.Namespaced && t.name != "" && t.namespace == "" {
		return t, apierrors.NewBadRequest("an object of a namespaced kind needs its namespace in the path")
	}
	return t, nil
}

// namespaceSubresource tells namespaces/NAME/status from namespaces/NAME/pods.
func namespaceSubresource(gv schema.GroupVersion, parts []string) bool {
	return gv.Group == "" && len(parts) == 3 && (parts[2] == "status" || parts[2] == "finalize")
}

func notServed(gv schema.GroupVersion, resource string) error {
	return statusError(http.StatusNotFound, metav1.StatusReasonNotFound,
		"the server does not serve "+schema.GroupResource{Group: gv.Group, Resource: resource}.String()+" in "+gv.String())
}

// serveObjects authorizes and dispatches everything about objects.
func (s *Server) serveObjects(w http.ResponseWriter, r *http.Request) {
	gv := schema.GroupVersion{Group: r.PathValue("group"), Version: r.PathValue("version")}
	t, err := parseTarget(gv, r.PathValue("path"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if err := s.dispatch(w, r, t); err != nil {
		s.fail(w, r, err)
	}
}

func (s *Server) dispatch(w http.ResponseWriter, r *http.Request, t target) error {
	verb := verbOf(r, t)
	who, _ := IdentityFrom(r.Context())
	if verb == "" {
		return apierrors.NewMethodNotSupported(groupResource(t.kind.Resource), r.Method)
	}
	resource, view := t.kind.Resource, s.cfg.Store.View()
	if t.subresource != "" && t.subresource != "status" {
		resource += api.Resource("/" + t.subresource)
	}
	if !Authorize(who, verb, resource, t.namespace, t.name, view) {
		return forbidden(who, verb, resource, t)
	}
	switch {
	case t.subresource != "" && t.subresource != "status":
		return s.serveSubresource(w, r, t, who)
	case verb == VerbGet:
		return s.serveGet(w, r, t)
	case verb == VerbList:
		return s.serveList(w, r, t, who)
	case verb == VerbWatch:
		return s.serveWatch(w, r, t, who)
	}
	return s.serveWrite(w, r, t, who, verb)
}

// verbOf returns the verb of authorization, "" if the method makes no sense.
func verbOf(r *http.Request, t target) string {
	watch := r.URL.Query().Get("watch")
	switch {
	case r.Method == http.MethodGet && (watch == "true" || watch == "1") && t.subresource == "":
		return VerbWatch
	case r.Method == http.MethodGet && t.name == "":
		return VerbList
	case r.Method == http.MethodGet && t.subresource == "exec":
		return VerbCreate // a WebSocket begins with GET and is no less powerful
	case r.Method == http.MethodGet:
		return VerbGet
	case r.Method == http.MethodPost:
		return VerbCreate
	case r.Method == http.MethodPut:
		return VerbUpdate
	case r.Method == http.MethodPatch:
		return VerbPatch
	case r.Method == http.MethodDelete:
		return VerbDelete
	}
	return ""
}

// serveSubresource handles everything below an object except its status.
func (s *Server) serveSubresource(w http.ResponseWriter, r *http.Request, t target, who Identity) error {
	switch t.kind.Resource + api.Resource("/"+t.subresource) {
	case api.Pods + "/log":
		return s.serveLog(w, r, t)
	case api.Pods + "/exec":
		return s.serveExec(w, r, t)
	case api.Nodes + "/proxy":
		return s.serveNodeProxy(w, r, t)
	case api.Pods + "/attach", api.Pods + "/portforward", api.Pods + "/proxy":
		return notServed(t.kind.GroupVersion(), t.kind.Plural+"/"+t.subresource) // they change nothing: Git is not the answer
	}
	if t.kind.GroupVersionKind.Group == api.GroupVersion.Group {
		return s.serveDecree(w, r, t, who)
	}
	if r.Method != http.MethodGet { // "scale" and its like change desired state too
		return refuseWrite(s.cfg.Store.View(), t)
	}
	return notServed(t.kind.GroupVersion(), t.kind.Plural+"/"+t.subresource)
}

func forbidden(who Identity, verb string, resource api.Resource, t target) error {
	where := "in all namespaces"
	if t.namespace != "" {
		where = "in namespace " + t.namespace
	} else if !t.kind.Namespaced {
		where = "at the cluster scope"
	}
	s := newStatus(http.StatusForbidden, metav1.StatusReasonForbidden,
		string(resource)+quoted(t.name)+" is forbidden: user "+who.Name+" may not "+verb+" it "+where)
	s.Details = &metav1.StatusDetails{Name: t.name, Group: t.kind.Group, Kind: t.kind.Plural}
	return &apierrors.StatusError{ErrStatus: *s}
}

func quoted(name string) string {
	if name == "" {
		return ""
	}
	return ` "` + name + `"`
}
