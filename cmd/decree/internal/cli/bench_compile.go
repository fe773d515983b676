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
	var cold, changed, unchanged, one []float64
	for run := range runs {
		compiler, err := newCompiler()
		if err != nil {
			return nil, err
		}
		measure := func(tree string, into *[]float64) error {
			begun := time.Now()
			res, err := compiler.Compile(ctx, os.DirFS(tree), compile.Options{Timeout: time.Minute})
			if err != nil {
				return err
			}
			if len(res.Diagnostics) > 0 {
				return res.Diagnostics[0]
			}
			if into == &one {
				*into = append(*into, milliseconds(begun))
			} else {
				*into = append(*into, float64(len(res.Objects))/time.Since(begun).Seconds())
			}
			return nil
		}
		err = func() error {
			defer compiler.Close()
			if err := measure(small, &one); err != nil {
				return err
			}
			if err := measure(large, &cold); err != nil {
				return err
			}
			if err := benchPackage(filepath.Join(large, "p00"), 0, benchApps/benchPackages, 3+run); err != nil {
				return err
			}
			if err := measure(large, &changed); err != nil {
				return err
			}
			return measure(large, &unchanged)
		}()
		if err != nil {
			return nil, err
		}
	}
	list := []figure{
		summarize("one application, cold", "ms", one),
		summarize("1,000 applications, cold", "objects/s", cold),
		summarize("one package of 20 changed", "objects/s", changed),
		summarize("nothing changed", "objects/s", unchanged),
	}
	for i := range list {
		list[i].Note = "in a child process, from a folder"
	}
	return list, nil
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
