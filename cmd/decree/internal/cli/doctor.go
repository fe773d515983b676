package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
)

// requirement is one thing a node needs, whether it is there, and what mends it.
type requirement struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Optional bool   `json:"optional,omitempty"`
	Detail   string `json:"detail"`
	Mend     string `json:"mend,omitempty"`
}

func doctorCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:     "doctor",
		Short:   "Check what this machine needs to run pods, and say how to mend what is missing",
		Example: "  decree doctor\n  decree doctor -o json | jq '.[] | select(.ok | not)'",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			list := requirements()
			failed := 0
			for _, r := range list {
				if !r.OK && !r.Optional {
					failed++
				}
			}
			write := func() error { return e.printRequirements(list) }
			if output == "json" {
				write = func() error { return e.writeJSON(list) }
			}
			if err := write(); err != nil {
				return err
			}
			if failed > 0 {
				return errors.New(count(failed, "requirement") + " missing")
			}
			return nil
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "json for everything")
	return c
}

func (e *env) printRequirements(list []requirement) error {
	w := tabwriter.NewWriter(e.Out, 0, 0, 2, ' ', 0)
	for _, r := range list {
		state := "ok"
		if !r.OK {
			state = "MISSING"
			if r.Optional {
				state = "absent"
			}
		}
		line := r.Detail
		if !r.OK && r.Mend != "" {
			line += "; mend: " + r.Mend
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", state, r.Name, line)
	}
	return w.Flush()
}

// requirements looks at this machine; it changes nothing.
func requirements() []requirement {
	list := []requirement{root()}
	for _, b := range []struct{ name, pkg string }{
		{"containerd", "containerd"},
		{"runc", "runc"},
		{"git", "git"},
	} {
		list = append(list, binary(b.name, b.pkg))
	}
	list = append(list, cgroups(), overlay(), kernelNamespaces())
	return append(list, network()...)
}

func root() requirement {
	r := requirement{Name: "root", OK: os.Geteuid() == 0, Detail: fmt.Sprintf("running as uid %d", os.Geteuid())}
	if !r.OK {
		r.Mend = "sudo decree up"
	}
	return r
}

func binary(name, pkg string) requirement {
	path, err := exec.LookPath(name)
	if err != nil {
		return requirement{Name: name, Detail: "not in PATH", Mend: "apt-get install --no-install-recommends " + pkg}
	}
	return requirement{Name: name, OK: true, Detail: path}
}

func cgroups() requirement {
	r := requirement{Name: "cgroups", Mend: "mount a cgroup hierarchy (systemd does it)"}
	if data, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		r.Detail = "v2 with " + strings.TrimSpace(string(data))
		r.OK = strings.Contains(string(data), "memory") && strings.Contains(string(data), "cpu")
		return r
	}
	if _, err := os.Stat("/sys/fs/cgroup/memory"); err == nil {
		r.OK, r.Detail = true, "v1"
		return r
	}
	r.Detail = "no controllers under /sys/fs/cgroup"
	return r
}

func overlay() requirement {
	r := requirement{Name: "overlayfs", Mend: "modprobe overlay"}
	data, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		r.Detail = err.Error()
		return r
	}
	r.OK = strings.Contains(string(data), "\toverlay\n")
	r.Detail = "in /proc/filesystems"
	if !r.OK {
		r.Detail = "not in /proc/filesystems"
	}
	return r
}

// kernelNamespaces checks that namespaces can be made at all.
func kernelNamespaces() requirement {
	r := requirement{Name: "namespaces", OK: true, Detail: "net, ipc, uts, pid, mount"}
	for _, ns := range []string{"net", "ipc", "uts", "pid", "mnt"} {
		if _, err := os.Stat("/proc/self/ns/" + ns); err != nil {
			r.OK, r.Detail, r.Mend = false, ns+" is not in this kernel", "a kernel with CONFIG_"+strings.ToUpper(ns)+"_NS"
		}
	}
	return r
}

// network asks the network plane what it misses.
func network() []requirement {
	var list []requirement
	for _, c := range daemon.Doctor() {
		list = append(list, requirement{Name: c.Requirement, OK: c.OK, Detail: c.Why, Mend: c.Mend})
	}
	return list
}
