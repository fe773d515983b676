package state

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

func invalid(k api.Key, format string, args ...any) *command.Rejection {
	return &command.Rejection{Code: command.Invalid, Key: k, Message: fmt.Sprintf(format, args...)}
}

func forbidden(k api.Key, format string, args ...any) *command.Rejection {
	return &command.Rejection{Code: command.Forbidden, Key: k, Message: fmt.Sprintf(format, args...)}
}

// checkMutation refuses what makes no sense whatever the state is.
func checkMutation(m *api.Mutation) (*kindInfo, *command.Rejection) {
	kind, ok := kinds[m.Key.Resource]
	if !ok {
		return nil, invalid(m.Key, "no kind has the resource %q", m.Key.Resource)
	}
	switch m.Verb {
	case api.Create, api.Update, api.UpdateStatus, api.Delete:
	default:
		return nil, invalid(m.Key, "verb %d is not known", m.Verb)
	}
	if m.Verb != api.Delete {
		if m.Object == nil || reflect.ValueOf(m.Object).IsNil() {
			return nil, invalid(m.Key, "%s without an object", m.Verb)
		}
		if got := api.KeyOf(m.Object); got != m.Key {
			return nil, invalid(m.Key, "%s carries %s", m.Verb, got)
		}
	}
	return kind, checkName(m.Key, kind.Kind)
}

// checkName keeps names apart in tables and URLs. The fine rules of names are the
// compiler's.
func checkName(k api.Key, kind *api.Kind) *command.Rejection {
	switch {
	case kind.Namespaced && k.Namespace == "":
		return invalid(k, "%s live in a namespace, none is given", kind.Plural)
	case !kind.Namespaced && k.Namespace != "":
		return invalid(k, "%s live in no namespace, %q is given", kind.Plural, k.Namespace)
	case k.Name == "":
		return invalid(k, "%s without a name", kind.Kind)
	}
	for _, s := range [...]string{k.Namespace, k.Name} {
		if !isName(s) {
			return invalid(k, "%.40q is not a name: at most 253 printable ASCII characters without / and %%", s)
		}
	}
	return nil
}

func isName(s string) bool {
	if len(s) > 253 || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == '/' || c == '%' || c >= 0x7f {
			return false
		}
	}
	return true
}

// mayGovern keeps what the control plane is made of from everybody else: who could
// write a JoinToken or the Authority would be admitted to everything.
func (d *draft) mayGovern(m *api.Mutation, kind *kindInfo) *command.Rejection {
	switch {
	case !kind.controlPlane:
		return nil
	case d.txn.Commit != nil:
		return forbidden(m.Key, "%s never come from git, decree writes them itself", kind.Plural)
	case d.txn.Actor != "system" && !strings.HasPrefix(d.txn.Actor, "server/"):
		return forbidden(m.Key, "only a server may %s %s, %q may not", m.Verb, kind.Plural, d.txn.Actor)
	}
	return nil
}

func checkPreconditions(m *api.Mutation, old api.Object) *command.Rejection {
	if m.UID != "" && m.UID != old.GetUID() {
		return &command.Rejection{Code: command.Conflict, Key: m.Key, Message: fmt.Sprintf("was replaced: uid %s is expected, it is %s", m.UID, old.GetUID())}
	}
	if m.Revision != 0 && strconv.FormatUint(m.Revision, 10) != old.GetResourceVersion() {
		return &command.Rejection{Code: command.Conflict, Key: m.Key, Message: fmt.Sprintf("was changed: revision %d is expected, it is at %s", m.Revision, old.GetResourceVersion())}
	}
	return nil
}

// createTaken is the answer to the creation of a key that exists.
func (d *draft) createTaken(m *api.Mutation, old api.Object) *command.Rejection {
	if d.txn.Commit != nil && sourceOf(old) != d.txn.Commit.Source {
		return takeover(m, old)
	}
	return &command.Rejection{Code: command.Exists, Key: m.Key, Message: "exists already" + fromGit(old)}
}

func (d *draft) mayCreate(m *api.Mutation) *command.Rejection {
	if d.txn.Commit != nil {
		return d.ownOrigin(m)
	}
	if origin, ok := api.OriginOf(m.Object); ok {
		return forbidden(m.Key, "only a commit of %s may create it, %q may not", origin, d.txn.Actor)
	}
	return nil
}

// mayUpdate decides whether old may become o, as far as sources go. That nothing
// but a commit changes what comes from Git is checked by keptFromGit.
func (d *draft) mayUpdate(m *api.Mutation, old, o api.Object) *command.Rejection {
	if c := d.txn.Commit; c != nil {
		if sourceOf(old) != c.Source {
			return takeover(m, old)
		}
		return d.ownOrigin(m)
	}
	if origin, ok := api.OriginOf(o); ok && sourceOf(old) == "" {
		return forbidden(m.Key, "only a commit of %s may take it over, %q may not", origin, d.txn.Actor)
	}
	return nil
}

// keptFromGit reports whether the update of old to o leaves alone what comes from
// Git: outside a commit, an object from there may only be bound to a node.
func (d *draft) keptFromGit(old, o api.Object) bool {
	if d.txn.Commit != nil || sourceOf(old) == "" {
		return true
	}
	if p, ok := o.(*corev1.Pod); ok {
		o = shallow(p)
		o.(*corev1.Pod).Spec.NodeName = old.(*corev1.Pod).Spec.NodeName
		o.(*corev1.Pod).Status = old.(*corev1.Pod).Status // not from Git: bind adds PodScheduled
	}
	return d.equal(o, old)
}

// mayDelete: a Pod from Git that a commit has deleted is removed by its node.
func (d *draft) mayDelete(m *api.Mutation, old api.Object) *command.Rejection {
	if c := d.txn.Commit; c != nil {
		if sourceOf(old) != c.Source {
			return takeover(m, old)
		}
		return nil
	}
	if _, ok := api.OriginOf(old); ok && old.GetDeletionTimestamp() == nil {
		return comesFromGit(m.Key, old)
	}
	return nil
}

func comesFromGit(k api.Key, old api.Object) *command.Rejection {
	origin, _ := api.OriginOf(old)
	return forbidden(k, "comes from git: %s; change it there", origin)
}

// takeover refuses a commit that reaches for what is not its source's.
func takeover(m *api.Mutation, old api.Object) *command.Rejection {
	here := "this commit"
	if m.Object != nil {
		if origin, ok := api.OriginOf(m.Object); ok {
			here = origin.String()
		}
	}
	if origin, ok := api.OriginOf(old); ok {
		return forbidden(m.Key, "%s cannot %s it: it comes from git, %s; remove one of the two", here, m.Verb, origin)
	}
	by := "was not made from git"
	if owner := controllerOf(old); owner != nil {
		by = fmt.Sprintf("was not made from git but by %s %q", owner.Kind, owner.Name)
	}
	return forbidden(m.Key, "%s cannot %s it: it %s, at revision %s; choose another name or delete it first", here, m.Verb, by, old.GetResourceVersion())
}

// ownOrigin makes sure that what a commit writes says that it comes from there.
func (d *draft) ownOrigin(m *api.Mutation) *command.Rejection {
	origin, ok := api.OriginOf(m.Object)
	if !ok {
		return invalid(m.Key, "a commit of source %q carries it without its origin", d.txn.Commit.Source)
	}
	if origin.Source != d.txn.Commit.Source {
		return forbidden(m.Key, "a commit of source %q cannot %s what comes from %s", d.txn.Commit.Source, m.Verb, origin)
	}
	return nil
}

func fromGit(o api.Object) string {
	if origin, ok := api.OriginOf(o); ok {
		return ", it comes from git: " + origin.String()
	}
	return ""
}
