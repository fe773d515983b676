package api

import "k8s.io/apimachinery/pkg/runtime"

// DeepCopyObject implements runtime.Object.
func (s *Source) DeepCopyObject() runtime.Object {
	c := *s
	s.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Spec.SecretRef = clonePtr(s.Spec.SecretRef)
	c.Spec.Prune = clonePtr(s.Spec.Prune)
	c.Spec.DeletionBudget = clonePtr(s.Spec.DeletionBudget)
	c.Status.AppliedAt = s.Status.AppliedAt.DeepCopy()
	c.Status.FetchedAt = s.Status.FetchedAt.DeepCopy()
	c.Status.Suspended = clonePtr(s.Status.Suspended)
	c.Status.Conditions = append(s.Status.Conditions[:0:0], s.Status.Conditions...)
	return &c
}

// DeepCopyObject implements runtime.Object.
func (r *Revision) DeepCopyObject() runtime.Object {
	c := *r
	r.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Spec.Changes = append(r.Spec.Changes[:0:0], r.Spec.Changes...)
	for i, ch := range c.Spec.Changes {
		c.Spec.Changes[i].Fields = append(ch.Fields[:0:0], ch.Fields...)
	}
	return &c
}

// DeepCopyObject implements runtime.Object.
func (p *AddressPool) DeepCopyObject() runtime.Object {
	c := *p
	p.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Spec.Addresses = append(p.Spec.Addresses[:0:0], p.Spec.Addresses...)
	c.Spec.AutoAssign = clonePtr(p.Spec.AutoAssign)
	c.Spec.ServiceSelector = p.Spec.ServiceSelector.DeepCopy()
	c.Spec.NamespaceSelector = p.Spec.NamespaceSelector.DeepCopy()
	return &c
}

// DeepCopyObject implements runtime.Object.
func (s *Server) DeepCopyObject() runtime.Object {
	c := *s
	s.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Status.Removed = s.Status.Removed.DeepCopy()
	return &c
}

// DeepCopyObject implements runtime.Object.
func (a *Authority) DeepCopyObject() runtime.Object {
	c := *a
	a.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Spec.CAs = append(a.Spec.CAs[:0:0], a.Spec.CAs...)
	return &c
}

// DeepCopyObject implements runtime.Object.
func (t *JoinToken) DeepCopyObject() runtime.Object {
	c := *t
	t.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	return &c
}

// DeepCopyObject implements runtime.Object.
func (m *Machine) DeepCopyObject() runtime.Object {
	c := *m
	m.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Status.Trusts = append(m.Status.Trusts[:0:0], m.Status.Trusts...)
	return &c
}

// clonePtr copies what p points to; T must hold no pointers that are written to.
func clonePtr[T any](p *T) *T {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}
