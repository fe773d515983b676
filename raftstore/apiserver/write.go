package apiserver

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// serveWrite refuses every write to desired state, and deletes pods.
func (s *Server) serveWrite(w http.ResponseWriter, r *http.Request, t target, who Identity, verb string) error {
	if verb == VerbDelete && t.kind.Resource == api.Pods && t.name != "" && t.subresource == "" {
		return s.deletePod(w, r, t, who)
	}
	return refuseWrite(s.cfg.Store.View(), t)
}

// refuseWrite says where to make the change instead: the place in Git that an
// object, or the owner it is derived from, comes from.
func refuseWrite(view api.Reader, t target) error {
	message := "desired state comes from Git: write it in a source and push"
	if o, ok := view.Get(t.key()); ok && t.name != "" {
		message = fmt.Sprintf("%s %q is kept by Decree itself and cannot be written", t.kind.Resource, t.name)
		if root, found := gitRoot(view, o); found {
			origin, _ := api.OriginOf(root)
			message = fmt.Sprintf("%s %q comes from git: %s", t.kind.Resource, t.name, origin)
			if k := api.KeyOf(root); k != t.key() {
				message = fmt.Sprintf("%s %q is derived from %s %q, which comes from git: %s", t.kind.Resource, t.name, k.Resource, k.Name, origin)
			}
		}
	} else if !t.kind.FromGit() {
		message = fmt.Sprintf("%s are kept by Decree itself and cannot be written", t.kind.Resource)
	}
	status := newStatus(http.StatusForbidden, metav1.StatusReasonForbidden, message)
	status.Details = &metav1.StatusDetails{Name: t.name, Group: t.kind.Group, Kind: t.kind.Plural}
	return &apierrors.StatusError{ErrStatus: *status}
}

// gitRoot follows the owners of o to an object that comes from Git.
func gitRoot(view api.Reader, o api.Object) (api.Object, bool) {
	for range 8 { // no chain is longer; a cycle must not hang the server
		if _, ok := api.OriginOf(o); ok {
			return o, true
		}
		ref := metav1.GetControllerOf(o)
		if ref == nil {
			return nil, false
		}
		i := slices.IndexFunc(api.Kinds(), func(k *api.Kind) bool {
			return k.GroupVersion().String() == ref.APIVersion && k.Kind == ref.Kind
		})
		if i < 0 {
			return nil, false
		}
		k := api.Key{Resource: api.Kinds()[i].Resource, Name: ref.Name}
		if api.Kinds()[i].Namespaced {
			k.Namespace = o.GetNamespace()
		}
		owner, ok := view.Get(k)
		if !ok || owner.GetUID() != ref.UID {
			return nil, false
		}
		o = owner
	}
	return nil, false
}

// deletePod ends a pod, which its owner then replaces: the operator's restart. It is
// recorded as a transaction of the user.
func (s *Server) deletePod(w http.ResponseWriter, r *http.Request, t target, who Identity) error {
	opts, err := parseDeleteOptions(r)
	if err != nil {
		return err
	}
	f, err := negotiate(r)
	if err != nil {
		return err
	}
	o, ok := s.cfg.Store.View().Get(t.key())
	if !ok {
		return apierrors.NewNotFound(groupResource(t.kind.Resource), t.name)
	}
	if len(opts.DryRun) > 0 {
		return writeObject(w, http.StatusOK, f, withType(t.kind, o))
	}
	m := api.Mutation{Verb: api.Delete, Key: t.key(), Grace: opts.GracePeriodSeconds}
	if p := opts.Preconditions; p != nil {
		if p.UID != nil {
			m.UID = *p.UID
		}
		if p.ResourceVersion != nil {
			if m.Revision, err = parseRevision(*p.ResourceVersion); err != nil {
				return err
			}
		}
	}
	err = propose(r.Context(), s.cfg.Store, command.Txn{
		Key: rand.Text(), Time: time.Now().UnixMilli(), Actor: who.Actor(), Reason: "delete pod", Mutations: []api.Mutation{m},
	})
	if err != nil {
		return fmt.Errorf("delete %s: %w", t.key(), err)
	}
	s.log.Info("pod deleted", "pod", t.key(), "user", who.Name)
	if now, ok := s.cfg.Store.View().Get(t.key()); ok && now.GetUID() == o.GetUID() {
		return writeObject(w, http.StatusOK, f, withType(t.kind, now)) // it is terminating
	}
	return writeObject(w, http.StatusOK, f, &metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Status:   metav1.StatusSuccess,
		Details:  &metav1.StatusDetails{Name: t.name, Kind: t.kind.Plural, UID: o.GetUID()},
	})
}

// parseDeleteOptions reads the body, if there is one, and the query.
func parseDeleteOptions(r *http.Request) (metav1.DeleteOptions, error) {
	var opts metav1.DeleteOptions
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return opts, fmt.Errorf("read delete options: %w", err)
	}
	if len(body) > 0 {
		if err := json.Unmarshal(body, &opts); err != nil {
			return opts, apierrors.NewBadRequest("delete options: " + err.Error())
		}
	}
	q := r.URL.Query()
	if v := q.Get("gracePeriodSeconds"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return opts, apierrors.NewBadRequest("gracePeriodSeconds must be a number")
		}
		opts.GracePeriodSeconds = &n
	}
	if q.Has("dryRun") {
		opts.DryRun = q["dryRun"]
	}
	if g := opts.GracePeriodSeconds; g != nil && *g < 0 {
		opts.GracePeriodSeconds = nil // -1 is kubectl's "the pod's own"
	}
	return opts, nil
}
