package cli

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"decree.dev/decree/reconciler/containerd"
)

// imageCmd holds what tasks and tests need to make images without a registry.
func imageCmd(e *env) *cobra.Command {
	c := &cobra.Command{Use: "image", Short: "Make container images", Hidden: true}
	var name, output string
	pack := &cobra.Command{
		Use:     "pack BINARY",
		Short:   "Make an OCI image of one static binary",
		Example: "  decree image pack bin/hello --name decree.dev/hello:v1 --output hello.tar",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := os.Create(output)
			if err != nil {
				return fmt.Errorf("pack %s: %w", args[0], err)
			}
			if err := containerd.PackImage(args[0], name, nil, f); err != nil {
				f.Close()
				return fmt.Errorf("pack %s: %w", args[0], err)
			}
			return f.Close()
		},
	}
	pack.Flags().StringVar(&name, "name", "", "name of the image, with its tag")
	pack.Flags().StringVar(&output, "output", "image.tar", "file to write")
	_ = pack.MarkFlagRequired("name")
	c.AddCommand(pack)
	return c
}
