package containerd

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// logPaths are the files of one attempt of a container, below
// Dir/logs/POD/CONTAINER:
//
//	N.log, N.log.1, …  lines as "TIME STREAM F|P TEXT", newest file first
//	N.started          present once a start was tried; holds when it succeeded
//	N.raw/             what the shim writes and the pump has not yet finished with
type logPaths struct{ dir, base string }

func (cfg Config) containerLogDir(pod types.UID, container string) string {
	return filepath.Join(cfg.logDir(), string(pod), container)
}

func (cfg Config) logPaths(m meta) logPaths {
	return logPaths{dir: cfg.containerLogDir(m.pod, m.name), base: strconv.Itoa(m.attempt)}
}

func (p logPaths) raw() string    { return filepath.Join(p.dir, p.base+".raw") }
func (p logPaths) log() string    { return filepath.Join(p.dir, p.base+".log") }
func (p logPaths) marker() string { return filepath.Join(p.dir, p.base+".started") }
func (p logPaths) stdout() string { return filepath.Join(p.raw(), "stdout") }
func (p logPaths) stderr() string { return filepath.Join(p.raw(), "stderr") }
func (p logPaths) stdin() string  { return filepath.Join(p.raw(), "stdin") }
func (p logPaths) state() string  { return filepath.Join(p.raw(), "state") }
func (p logPaths) old(i int) string {
	if i == 0 {
		return p.log()
	}
	return fmt.Sprintf("%s.%d", p.log(), i)
}

// started reports whether a start was tried, and when it succeeded.
func (p logPaths) started() (bool, time.Time) {
	st, err := os.Stat(p.marker())
	if err != nil {
		return false, time.Time{}
	}
	if t := readTime(p.marker()); !t.IsZero() {
		return true, t
	}
	return true, st.ModTime().UTC()
}

// attempts lists the attempts of a container that have a log, oldest first.
func attempts(dir string) ([]int, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	seen := map[int]bool{}
	var out []int
	for _, e := range entries {
		base, rest, _ := strings.Cut(e.Name(), ".")
		n, err := strconv.Atoi(base)
		if err == nil && !seen[n] && rest != "started" {
			seen[n] = true
			out = append(out, n)
		}
	}
	return out, nil
}
