package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"decree.dev/decree/netplane/ingress/route"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

func describeCmd(e *env) *cobra.Command {
	g := &getter{env: e}
	c := &cobra.Command{
		Use:   "describe KIND [NAME...]",
		Short: "Show objects with their origin in Git, their state and what happened to them",
		Example: `  decree describe pod web-7d4b9c-x2x5k
  decree describe deployment/web service/web
  decree describe pods -l app=web -n shop
  decree describe revision cluster-000042     # what a commit changed, and who pushed it`,
		Args:              kindArgs,
		ValidArgsFunction: completeObjects(e),
		RunE: func(c *cobra.Command, args []string) (err error) {
			ts, err := targets(args)
			if err != nil {
				return err
			}
			if err := g.check(ts); err != nil {
				return err
			}
			if g.client, err = e.client(); err != nil {
				return err
			}
			defer g.client.Close()
			return g.describe(c.Context(), ts)
		},
	}
	namespaceFlag(e, c)
	c.Flags().BoolVarP(&g.all, "all-namespaces", "A", false, "objects of all namespaces")
	c.Flags().StringVarP(&g.labels, "selector", "l", "", "label selector, such as app=web")
	return c
}

func (g *getter) describe(ctx context.Context, ts []target) error {
	var errs []error
	first := true
	for _, t := range ts {
		list, err := g.fetch(ctx, t)
		errs = append(errs, err)
		for _, o := range list {
			r, err := related(ctx, g.client, o)
			if err != nil {
				return err
			}
			if !first {
				fmt.Fprintln(g.env.Out)
			}
			first = false
			if err := describe(g.env.Out, o, r, now()); err != nil {
				return err
			}
		}
	}
	err := errors.Join(errs...)
	if first && err == nil {
		g.env.nothing("resources", ts[0].kind.Namespaced && !g.all)
	}
	return err
}

// relations are the other objects that the description of one object shows.
type relations struct {
	events    []*corev1.Event              // oldest first
	slices    []*discoveryv1.EndpointSlice // of a service
	pods      []*corev1.Pod                // on a node
	sets      []*appsv1.ReplicaSet         // of a deployment
	revisions []*api.Revision              // of a source, newest first
	routes    *route.Table                 // of which an ingress is a part
	origin    string                       // in Git, of a derived object: through its owners
}

// maxOwners is how many owners up an origin is looked for.
const maxOwners = 4

// originOf follows the owners of a derived object up to the one that is written in
// Git; "" if there is none.
func originOf(ctx context.Context, c *client.Client, o api.Object) (string, error) {
	for range maxOwners {
		ref := metav1.GetControllerOf(o)
		if ref == nil {
			return "", nil
		}
		kind, ok := api.KindForGVK(schema.FromAPIVersionAndKind(ref.APIVersion, ref.Kind))
		if !ok {
			return "", nil
		}
		owner, err := c.GetObject(ctx, kind, o.GetNamespace(), ref.Name)
		if apierrors.IsNotFound(err) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		if g, ok := api.OriginOf(owner); ok {
			return fmt.Sprintf("%s (through %s)", g, api.KeyOf(owner)), nil
		}
		o = owner
	}
	return "", nil
}

// related reads what belongs into the description of o.
func related(ctx context.Context, c *client.Client, o api.Object) (r relations, err error) {
	in := client.ListOptions{Namespace: o.GetNamespace()}
	switch o := o.(type) {
	case *corev1.Service:
		in.LabelSelector = discoveryv1.LabelServiceName + "=" + o.Name
		r.slices, _, err = client.List[*discoveryv1.EndpointSlice](ctx, c, in)
	case *corev1.Node:
		in.FieldSelector = "spec.nodeName=" + o.Name
		r.pods, _, err = client.List[*corev1.Pod](ctx, c, in)
	case *appsv1.Deployment:
		r.sets, _, err = client.List[*appsv1.ReplicaSet](ctx, c, in)
		r.sets = slices.DeleteFunc(r.sets, func(rs *appsv1.ReplicaSet) bool { return !metav1.IsControlledBy(rs, o) })
	case *networkingv1.Ingress:
		r.routes, err = routes(ctx, c, o.Namespace)
	case *api.Source:
		in.FieldSelector = "spec.source=" + o.Name
		r.revisions, _, err = client.List[*api.Revision](ctx, c, in)
		slices.SortFunc(r.revisions, func(a, b *api.Revision) int { return cmp.Compare(api.RevisionOf(b), api.RevisionOf(a)) })
	}
	if err != nil {
		return r, err
	}
	if r.origin, err = originOf(ctx, c, o); err != nil {
		return r, err
	}
	r.events, _, err = client.List[*corev1.Event](ctx, c, client.ListOptions{
		Namespace:     cmp.Or(o.GetNamespace(), "default"),
		FieldSelector: "involvedObject.kind=" + api.KindOf(o).Kind + ",involvedObject.name=" + o.GetName(),
	})
	sortEvents(r.events)
	return r, err
}
