package compile_test

import (
	"os"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

// TestHello compiles the example that a newcomer reads first.
func TestHello(t *testing.T) {
	r, err := compile.Evaluate(t.Context(), os.DirFS("../../examples/hello"), compile.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Diagnostics) > 0 {
		t.Fatal(r.Diagnostics)
	}
	objects := map[string]compile.Object{}
	for _, o := range r.Objects {
		objects[api.KeyOf(o.Object).String()] = o
	}
	d, ok := objects[`deployments.apps "default/hello"`].Object.(*appsv1.Deployment)
	if !ok || *d.Spec.Replicas != 2 || d.Spec.Template.Spec.Containers[0].Image != "decree.dev/hello:v1" {
		t.Fatalf("deployment = %v", d)
	}
	want := api.Position{File: "hello.cue", Line: 10, Column: 12}
	if got := objects[`deployments.apps "default/hello"`].Fields["spec.replicas"]; got != want {
		t.Errorf("spec.replicas is at %v, want %v", got, want)
	}
	s, ok := objects[`services "default/hello"`].Object.(*corev1.Service)
	if !ok || s.Spec.Ports[0].Port != 80 || s.Spec.Ports[0].TargetPort.IntValue() != 8080 {
		t.Fatalf("service = %v", s)
	}
}
