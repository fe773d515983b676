package cli

import (
	"github.com/spf13/cobra"
)

func completionCmd(e *env) *cobra.Command {
	shells := map[string]func(*cobra.Command) error{
		"bash": func(root *cobra.Command) error { return root.GenBashCompletionV2(e.Out, true) },
		"zsh":  func(root *cobra.Command) error { return root.GenZshCompletion(e.Out) },
		"fish": func(root *cobra.Command) error { return root.GenFishCompletion(e.Out, true) },
	}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print the script that lets a shell complete verbs, kinds and names",
		Example: `  source <(decree completion bash)
  decree completion bash > /etc/bash_completion.d/decree
  decree completion zsh > "${fpath[1]}/_decree"`,
		ValidArgs: sortedKeys(shells),
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		RunE:      func(c *cobra.Command, args []string) error { return shells[args[0]](c.Root()) },
	}
}
