package compile_test

import (
	"fmt"
	"os"
	"testing"
	"testing/fstest"

	"decree.dev/decree/schemas/compile"
)

func BenchmarkHello(b *testing.B) {
	tree := os.DirFS("../../examples/hello")
	b.Run("in process", func(b *testing.B) {
		for b.Loop() {
			if _, err := compile.Evaluate(b.Context(), tree, compile.Options{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, idle := range []struct {
		name string
		cfg  compile.ProcessConfig
	}{{"cold worker", compile.ProcessConfig{Idle: -1}}, {"warm worker", compile.ProcessConfig{}}} {
		b.Run(idle.name, func(b *testing.B) {
			p := newProcess(b, idle.cfg)
			i := 0
			for b.Loop() {
				i++
				text, _ := os.ReadFile("../../examples/hello/hello.cue")
				r, err := p.Compile(b.Context(), fstest.MapFS{"hello.cue": {Data: fmt.Appendf(text, "// %d\n", i)}}, compile.Options{})
				if err != nil || len(r.Objects) != 2 {
					b.Fatal(err, r)
				}
				if idle.cfg.Idle == 0 {
					b.StopTimer()
					p.AwaitWarm()
					b.StartTimer()
				}
			}
		})
	}
	b.Run("cached", func(b *testing.B) {
		p := newProcess(b, compile.ProcessConfig{})
		for b.Loop() {
			if _, err := p.Compile(b.Context(), tree, compile.Options{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// manyPackages is a tree of n packages with one application and one plain Deployment
// each: four objects.
func manyPackages(n int) fstest.MapFS {
	fsys := fstest.MapFS{"cue.mod/module.cue": {Data: []byte("module: \"example.com/many\"\nlanguage: version: \"v0.17.0\"\n")}}
	for i := range n {
		fsys[fmt.Sprintf("apps/p%03d/app.cue", i)] = &fstest.MapFile{Data: fmt.Appendf(nil, packageText, i)}
	}
	return fsys
}

const packageText = `package p%03[1]d

import "decree.dev/app"

web: app.#App & {
	name:  "web-%[1]d"
	image: "registry.example.com/shop/web:v1"
	port:  8080
	env: LOG_LEVEL: "info"
}
settings: {
	apiVersion: "v1"
	kind:       "ConfigMap"
	metadata: name: "settings-%[1]d"
	data: "config.json": "{}"
}
worker: {
	apiVersion: "apps/v1"
	kind:       "Deployment"
	metadata: name: "worker-%[1]d"
	spec: {
		replicas: 3
		selector: matchLabels: app: "worker-%[1]d"
		template: {
			metadata: labels: app: "worker-%[1]d"
			spec: containers: [{
				name:  "worker"
				image: "registry.example.com/shop/worker:v1"
				args: ["--queue", "orders"]
				env: [{name: "LOG_LEVEL", value: "info"}]
				resources: requests: {cpu: "100m", memory: "64Mi"}
				livenessProbe: httpGet: {path: "/healthz", port: 8080}
			}]
		}
	}
}
`

func BenchmarkMany(b *testing.B) {
	const n = 250
	b.Run("in process", func(b *testing.B) {
		tree := manyPackages(n)
		objects := 0
		for b.Loop() {
			r, err := compile.Evaluate(b.Context(), tree, compile.Options{})
			if err != nil || len(r.Diagnostics) > 0 {
				b.Fatal(err, r.Diagnostics)
			}
			objects += len(r.Objects)
		}
		b.ReportMetric(float64(objects)/b.Elapsed().Seconds(), "objects/s")
	})
	b.Run("worker, cold", func(b *testing.B) {
		tree := manyPackages(n)
		objects := 0
		for b.Loop() {
			p := newProcess(b, compile.ProcessConfig{})
			r, err := p.Compile(b.Context(), tree, compile.Options{})
			if err != nil || len(r.Diagnostics) > 0 {
				b.Fatal(err, r.Diagnostics)
			}
			objects += len(r.Objects)
		}
		b.ReportMetric(float64(objects)/b.Elapsed().Seconds(), "objects/s")
	})
	b.Run("worker, one package changed", func(b *testing.B) {
		tree := manyPackages(n)
		p := newProcess(b, compile.ProcessConfig{})
		if _, err := p.Compile(b.Context(), tree, compile.Options{}); err != nil {
			b.Fatal(err)
		}
		i, objects := 0, 0
		for b.Loop() {
			i++
			tree["apps/p001/app.cue"] = &fstest.MapFile{Data: fmt.Appendf(nil, packageText+"n: %[2]d\n", 1, i)}
			r, err := p.Compile(b.Context(), tree, compile.Options{})
			if err != nil || len(r.Diagnostics) > 0 {
				b.Fatal(err, r.Diagnostics)
			}
			objects += len(r.Objects)
		}
		b.ReportMetric(float64(objects)/b.Elapsed().Seconds(), "objects/s")
	})
}
