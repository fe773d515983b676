// Command gen writes the generated half of the CUE module in schemas/module: the
// definitions of the served kinds, from the Go types of k8s.io/api and of
// schemas/api. Run it by `go generate ./schemas`; with -check it changes nothing
// and fails if there would be a difference.
//
// It runs `cue get go` in a folder of its own, and then takes over only what the
// roots in fields.go need. Compared with what `cue get go` writes, embedded structs are
// embedded, mandatory fields are required (a!), enumerations are closed, fields
// that Decree does not implement are listed in an attribute, and comments are
// dropped: loading time is part of the time from push to running.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

func main() {
	root := flag.String("root", "..", "folder of go.mod")
	out := flag.String("out", "module", "folder of the CUE module")
	check := flag.Bool("check", false, "report a difference instead of writing")
	flag.Parse()
	if err := run(*root, *out, *check); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run(root, out string, check bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	raw, err := getGo(ctx, root)
	if err != nil {
		return err
	}
	files, err := trim(raw)
	if err != nil {
		return err
	}
	for _, f := range files {
		name := filepath.Join(out, filepath.FromSlash(f.path), "types_go_gen.cue")
		old, _ := os.ReadFile(name)
		if bytes.Equal(old, f.text) {
			continue
		}
		if check {
			return fmt.Errorf("%s is not what the generator writes; run: go generate ./schemas", name)
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, f.text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// getGo runs `cue get go` on all packages in a temporary module with the same
// requirements as ours, and returns the parsed output by user import path.
func getGo(ctx context.Context, root string) (map[string]*rawPackage, error) {
	dir, err := os.MkdirTemp("", "decree-gen-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	for _, f := range []string{"go.mod", "go.sum"} {
		if err := copyFile(filepath.Join(dir, f), filepath.Join(root, f)); err != nil {
			return nil, err
		}
	}
	sources, err := filepath.Glob(filepath.Join(root, "schemas", "api", "*.go"))
	if err != nil {
		return nil, err
	}
	for _, f := range sources {
		if err := copyFile(filepath.Join(dir, "schemas", "api", filepath.Base(f)), f); err != nil {
			return nil, err
		}
	}
	const mod = "module: \"gen.decree.dev/gen@v0\"\nlanguage: version: \"v0.17.0\"\n"
	if err := writeFile(filepath.Join(dir, "cue.mod", "module.cue"), []byte(mod)); err != nil {
		return nil, err
	}
	args := []string{"tool", "cue", "get", "go"}
	for _, p := range packages {
		args = append(args, p.goPath)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod")
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go %v: %w\n%s", args, err, text)
	}
	raw := map[string]*rawPackage{}
	for _, p := range packages {
		if raw[p.cuePath], err = readRaw(filepath.Join(dir, "cue.mod", "gen", filepath.FromSlash(p.goPath))); err != nil {
			return nil, err
		}
	}
	return raw, nil
}

func copyFile(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return writeFile(to, data)
}

func writeFile(name string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o644)
}
