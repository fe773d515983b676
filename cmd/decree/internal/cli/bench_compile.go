package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"decree.dev/decree/schemas/compile"
)

// benchApps is how many applications the measured tree holds, in packages of
// benchApps/benchPackages.
const (
	benchApps     = 1000
	benchPackages = 20
)

// benchCompile measures a tree of a thousand applications (2,000 objects): cold, then
// with one package changed, then with nothing changed, and a tree of one file.
func benchCompile(ctx context.Context, runs int) ([]figure, error) {
	dir, err := os.MkdirTemp("", "decree-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	small := filepath.Join(dir, "small")
	large := filepath.Join(dir, "large")
	if err := benchPackage(small, 0, 1, 2); err != nil {
		return nil, err
	}
	for p := range benchPackages {
		if err := benchPackage(filepath.Join(large, fmt.Sprintf("p%02d", p)), p, benchApps/benchPackages, 2); err != nil {
			return nil, err
		}
	}
	var b compileBench
	for run := range runs {
		if err := b.run(ctx, small, large, 3+run); err != nil {
			return nil, err
		}
	}
	list := []figure{
		summarize("one application, cold", "ms", b.one),
		summarize("1,000 applications, cold", "objects/s", b.cold),
		summarize("one package of 20 changed", "objects/s", b.changed),
		summarize("nothing changed", "objects/s", b.unchanged),
	}
	for i := range list {
		list[i].Note = "in a child process, from a folder"
	}
	return list, nil
}

// compileBench collects milliseconds in one, and objects per second elsewhere.
type compileBench struct{ one, cold, changed, unchanged []float64 }

// run measures with a new compiler; replicas is what changes in one package.
func (b *compileBench) run(ctx context.Context, small, large string, replicas int) error {
	compiler, err := newCompiler()
	if err != nil {
		return err
	}
	defer compiler.Close()
	measure := func(tree string) (ms, rate float64, err error) {
		begun := time.Now()
		res, err := compiler.Compile(ctx, os.DirFS(tree), compile.Options{Timeout: time.Minute})
		if err != nil {
			return 0, 0, err
		}
		if len(res.Diagnostics) > 0 {
			return 0, 0, res.Diagnostics[0]
		}
		return milliseconds(begun), float64(len(res.Objects)) / time.Since(begun).Seconds(), nil
	}
	ms, _, err := measure(small)
	if err != nil {
		return err
	}
	_, cold, err := measure(large)
	if err != nil {
		return err
	}
	if err := benchPackage(filepath.Join(large, "p00"), 0, benchApps/benchPackages, replicas); err != nil {
		return err
	}
	_, changed, err := measure(large)
	if err != nil {
		return err
	}
	_, unchanged, err := measure(large)
	if err != nil {
		return err
	}
	b.one, b.cold, b.changed, b.unchanged = append(b.one, ms), append(b.cold, cold), append(b.changed, changed), append(b.unchanged, unchanged)
	return nil
}

// benchPackage writes one package of applications.
func benchPackage(dir string, p, apps, replicas int) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("package p%02d\n\nimport \"decree.dev/app\"\n\n", p)
	for i := range apps {
		text += fmt.Sprintf("app%d: app.#App & {name: \"app-%d-%d\", image: \"example.com/app:v1\", port: 8080, replicas: %d}\n", i, p, i, replicas)
	}
	return os.WriteFile(filepath.Join(dir, "apps.cue"), []byte(text), 0o644)
}
