package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "dev"

func versionCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this binary and of what it is made of",
		Example: "  decree version -o json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			info := map[string]string{"version": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH}
			if bi, ok := debug.ReadBuildInfo(); ok {
				for _, d := range bi.Deps {
					switch d.Path {
					case "cuelang.org/go", "github.com/hashicorp/raft", "github.com/containerd/containerd/v2", "github.com/go-git/go-git/v5", "k8s.io/api":
						info[d.Path] = d.Version
					}
				}
			}
			if output == "json" {
				return e.writeJSON(info)
			}
			_, err := fmt.Fprintf(e.Out, "decree %s %s %s\n", version, info["go"], info["platform"])
			return err
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "json for everything")
	return c
}
